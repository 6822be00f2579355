#include "cache/cached_image.hpp"

#include "catch.hpp"
#include "image_bytes.hpp"
#include "memory_storage.hpp"

#include <memory>
#include <vector>

using namespace qcowcache;
using Kind = MemoryStorage::Kind;

namespace {

constexpr std::uint64_t disk_size = std::uint64_t{1} << 20U;

struct Bench {
  explicit Bench(std::size_t memory, std::uint64_t size = disk_size)
      : budget(memory), storage(MemoryStorage::everything(size)),
        cache(std::make_shared<WriteCache>(WriteCache::Settings{}, storage.capabilities(), ranges,
                                           budget)),
        image(*cache, storage) {
    budget.add_holder(cache);
  }

  RangeLock ranges;
  MemoryBudget budget;
  MemoryStorage storage;
  std::shared_ptr<WriteCache> cache;
  CachedImage image;
};

} // namespace

TEST_CASE("the image is what clients see: the cache over storage", "[cached_image]") {
  Bench bench(16U << 20U);
  bench.storage.disk().write(0, qcow2_header(16), true);
  bench.cache->learn_layout(bench.storage);
  const auto data = pattern(100, 1);
  bench.cache->write(bench.storage, 70000, data, false);
  CHECK(bench.image.size() == disk_size);
  std::vector<std::byte> found(100);
  bench.image.read(70000, found);
  CHECK(found == data);
}

TEST_CASE("the cache's knowledge of the header is used, and is enough", "[cached_image]") {
  Bench bench(16U << 20U);
  CHECK_FALSE(bench.image.header());
  bench.storage.forget_calls();
  bench.cache->write(bench.storage, 0, qcow2_header(12), false);
  REQUIRE(bench.image.header());
  CHECK(bench.image.header()->cluster_bits == 12);
  bench.cache->write(bench.storage, 23, std::vector(1, std::byte{16}), false);
  CHECK(bench.image.header()->cluster_bits == 16);
  CHECK(bench.storage.calls(Kind::read).empty());
}

TEST_CASE("where nothing is cached the header is read", "[cached_image]") {
  Bench bench(0);
  CHECK_FALSE(bench.image.header());
  bench.storage.disk().write(0, qcow2_header(16), true);
  REQUIRE(bench.image.header());
}

TEST_CASE("a file too short for a header has none", "[cached_image]") {
  const std::uint64_t size = GENERATE(0U, 1U, 71U);
  Bench bench(GENERATE(0U, 16U << 20U), size);
  CHECK_FALSE(bench.image.header());
}
