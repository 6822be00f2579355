// Units as large as the blocks that storage prefers: how large they are, and what of them is read
// and written.

#include "cache/write_cache.hpp"

#include "catch.hpp"
#include "gate.hpp"
#include "image_bytes.hpp"
#include "memory_storage.hpp"
#include "watched_thread.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

using namespace qcowcache;
using Kind = MemoryStorage::Kind;

namespace {

constexpr std::uint64_t kibibyte = 1024;
constexpr std::uint64_t mebibyte = 1024 * kibibyte;
constexpr std::uint64_t disk_size = 32 * mebibyte;

Capabilities preferring(std::uint64_t block) {
  Capabilities capabilities = MemoryStorage::everything(disk_size);
  capabilities.preferred = static_cast<std::uint32_t>(block);
  return capabilities;
}

/// An object store, as blocksize-policy describes it.
Capabilities objects_of(std::uint64_t block) {
  Capabilities capabilities = preferring(block);
  capabilities.maximum = capabilities.preferred;
  capabilities.can_extents = false;
  return capabilities;
}

/// A cache over a disk with a qcow2 header, which remembers what it said of its memory.
struct Bench {
  Bench(MemoryBudget& shared, const Capabilities& capabilities, unsigned cluster_bits = 16,
        WriteCache::Settings settings = {})
      : budget(shared), storage(capabilities) {
    settings.short_of_memory = [this](std::uint64_t preferred, std::uint64_t unit_size) {
      told.emplace_back(preferred, unit_size);
    };
    cache = std::make_shared<WriteCache>(std::move(settings), capabilities, ranges, budget);
    budget.add_holder(cache);
    storage.disk().write(0, qcow2_header(cluster_bits), true);
    cache->learn_layout(storage);
    storage.forget_calls();
  }

  void write(std::uint64_t offset, std::span<const std::byte> data) {
    cache->write(storage, offset, data, false);
  }
  /// The ranges of all requests of a kind.
  [[nodiscard]] std::vector<ByteRange> ranges_of(Kind kind) const {
    std::vector<ByteRange> found;
    for (const MemoryStorage::Call& call : storage.calls(kind))
      found.push_back(call.range);
    return found;
  }

  MemoryBudget& budget;
  RangeLock ranges;
  MemoryStorage storage;
  std::vector<std::pair<std::uint64_t, std::uint64_t>> told;
  std::shared_ptr<WriteCache> cache;
};

using Ranges = std::vector<ByteRange>;

} // namespace

TEST_CASE("a unit is as large as the block that storage prefers, and goes out in one write",
          "[large_units]") {
  MemoryBudget budget(64 * mebibyte);
  Bench bench(budget, preferring(4 * mebibyte));
  CHECK(bench.cache->unit_size() == 4 * mebibyte);
  const auto data = pattern(4 * mebibyte, 1);
  constexpr std::size_t piece = 100'000;
  for (std::size_t at = 0; at < data.size(); at += piece)
    bench.write(8 * mebibyte + at, std::span(data).subspan(at, std::min(piece, data.size() - at)));
  CHECK(bench.ranges_of(Kind::write) == Ranges{{8 * mebibyte, 12 * mebibyte}});
  CHECK(bench.ranges_of(Kind::read).empty());
  CHECK(bench.storage.disk().now({8 * mebibyte, 12 * mebibyte}) == data);
  CHECK(bench.told.empty());
}

TEST_CASE("a unit is no larger than 32 MiB, and no smaller than a cluster", "[large_units]") {
  MemoryBudget budget(1024 * mebibyte);
  CHECK(Bench(budget, preferring(64 * mebibyte)).cache->unit_size() == 32 * mebibyte);
  CHECK(Bench(budget, preferring(1 * mebibyte), 21).cache->unit_size() == 2 * mebibyte);
  CHECK(Bench(budget, preferring(4096), 9).cache->unit_size() == 64 * kibibyte);
}

TEST_CASE("units are as large as memory has room for eight, and that is told", "[large_units]") {
  const auto [memory, unit_size] = GENERATE(table<std::uint64_t, std::uint64_t>({
      {32 * mebibyte, 4 * mebibyte},
      {32 * mebibyte - 1, 2 * mebibyte},
      {3 * mebibyte, 256 * kibibyte},
      {256 * kibibyte, 64 * kibibyte},
  }));
  MemoryBudget budget(memory);
  Bench bench(budget, preferring(4 * mebibyte));
  CHECK(bench.cache->unit_size() == unit_size);
  if (unit_size == 4 * mebibyte) {
    CHECK(bench.told.empty());
  } else {
    REQUIRE_FALSE(bench.told.empty());
    CHECK(bench.told[0] == std::pair{4 * mebibyte, unit_size});
  }
}

TEST_CASE("where nothing is cached nobody is told of units", "[large_units]") {
  MemoryBudget budget(0);
  Bench bench(budget, preferring(4 * mebibyte));
  CHECK(bench.told.empty());
}

TEST_CASE("a cluster size that was asked for is heeded, and told of, in the same way",
          "[large_units]") {
  MemoryBudget budget(16 * mebibyte);
  WriteCache::Settings settings;
  settings.cluster_size = 64 * kibibyte;
  Bench bench(budget, preferring(4 * mebibyte), 16, std::move(settings));
  CHECK(bench.cache->unit_size() == 2 * mebibyte);
  REQUIRE_FALSE(bench.told.empty());
  CHECK(bench.told[0] == std::pair{4 * mebibyte, 2 * mebibyte});
}

TEST_CASE("units follow the memory: smaller at once, larger when all is stored", "[large_units]") {
  MemoryBudget budget(16 * mebibyte);
  Bench bench(budget, preferring(4 * mebibyte));
  REQUIRE(bench.cache->unit_size() == 2 * mebibyte);
  const auto data = pattern(1000, 1);
  bench.write(5 * mebibyte, data);
  budget.set_limit(64 * mebibyte);
  bench.cache->tick();
  CHECK(bench.cache->unit_size() == 2 * mebibyte);
  CHECK_FALSE(bench.cache->writing());
  bench.cache->flush(bench.storage);
  bench.cache->tick();
  CHECK(bench.cache->unit_size() == 4 * mebibyte);

  bench.write(9 * mebibyte, data);
  budget.set_limit(8 * mebibyte);
  bench.cache->tick();
  while (bench.cache->write_next(bench.storage)) {
  }
  bench.write(13 * mebibyte, data);
  CHECK(bench.cache->unit_size() == 1 * mebibyte);
  bench.cache->flush(bench.storage);
  for (const std::uint64_t begin : {std::uint64_t{5}, std::uint64_t{9}, std::uint64_t{13}})
    CHECK(bench.storage.disk().now({begin * mebibyte, begin * mebibyte + 1000}) == data);
  CHECK(bench.storage.violations().empty());
}

TEST_CASE("who writes at the same time as others has room for four units", "[large_units]") {
  MemoryBudget budget(64 * mebibyte);
  std::list<Bench> exports;
  for (unsigned i = 0; i < 8; ++i)
    exports.emplace_back(budget, preferring(4 * mebibyte));
  const auto data = pattern(1000, 1);
  // Those that only read do not count.
  exports.front().write(5 * mebibyte, data);
  CHECK(exports.front().cache->unit_size() == 4 * mebibyte);
  for (Bench& each : exports)
    each.write(5 * mebibyte, data);
  CHECK(exports.back().cache->unit_size() == 2 * mebibyte);
  // The first one has a unit already, which goes.
  exports.front().cache->tick();
  while (exports.front().cache->write_next(exports.front().storage)) {
  }
  exports.front().write(5 * mebibyte, data);
  CHECK(exports.front().cache->unit_size() == 2 * mebibyte);
  // And when the others have ended there is room again.
  for (Bench& each : exports) {
    each.cache->flush(each.storage);
    CHECK(each.storage.disk().now({5 * mebibyte, 5 * mebibyte + 1000}) == data);
    each.cache->forget_all();
  }
  exports.front().cache->tick();
  exports.front().cache->learn_layout(exports.front().storage);
  CHECK(exports.front().cache->unit_size() == 4 * mebibyte);
}

TEST_CASE("of a large unit only the blocks that clients wrote to are written, and little is read",
          "[large_units]") {
  MemoryBudget budget(64 * mebibyte);
  Capabilities capabilities = preferring(4 * mebibyte);
  capabilities.can_extents = false;
  Bench bench(budget, capabilities);
  bench.write(5 * mebibyte + 17, pattern(700, 1));
  bench.cache->flush(bench.storage);
  const Ranges block{{5 * mebibyte, 5 * mebibyte + 4096}};
  CHECK(bench.ranges_of(Kind::read) == block);
  CHECK(bench.ranges_of(Kind::write) == block);
}

TEST_CASE("an object that was written in part is read once, and written whole each time",
          "[large_units]") {
  MemoryBudget budget(64 * mebibyte);
  Bench bench(budget, objects_of(4 * mebibyte));
  const auto before = pattern(4 * mebibyte, 1);
  bench.storage.disk().write(4 * mebibyte, before, true);
  bench.write(5 * mebibyte + 17, pattern(700, 2));
  bench.write(7 * mebibyte, pattern(700, 3));
  bench.cache->flush(bench.storage);
  const ByteRange object{4 * mebibyte, 8 * mebibyte};
  CHECK(bench.ranges_of(Kind::read) == Ranges{object});
  CHECK(bench.ranges_of(Kind::write) == Ranges{object});
  bench.write(6 * mebibyte + 17, pattern(700, 4));
  bench.cache->flush(bench.storage);
  CHECK(bench.ranges_of(Kind::read) == Ranges{object});
  CHECK(bench.ranges_of(Kind::write) == Ranges{object, object});

  auto expected = before;
  const auto change = [&](std::uint64_t offset, unsigned seed) {
    const auto data = pattern(700, seed);
    std::ranges::copy(data, expected.begin() + static_cast<std::ptrdiff_t>(offset));
  };
  change(1 * mebibyte + 17, 2);
  change(3 * mebibyte, 3);
  change(2 * mebibyte + 17, 4);
  CHECK(bench.storage.disk().now(object) == expected);
}

TEST_CASE("of an object that clients write from its beginning only the rest is read",
          "[large_units]") {
  MemoryBudget budget(64 * mebibyte);
  Bench bench(budget, objects_of(4 * mebibyte));
  const auto data = pattern(1 * mebibyte + 17, 1);
  bench.write(4 * mebibyte, data);
  bench.cache->flush(bench.storage);
  const Ranges reads = bench.ranges_of(Kind::read);
  REQUIRE(reads.size() == 1);
  CHECK(reads[0].begin >= 5 * mebibyte - 64 * kibibyte);
  CHECK(reads[0].end == 8 * mebibyte);
  CHECK(bench.ranges_of(Kind::write) == Ranges{{4 * mebibyte, 8 * mebibyte}});
  CHECK(bench.storage.disk().now({4 * mebibyte, 5 * mebibyte + 17}) == data);
}

TEST_CASE("a unit that is smaller than an object goes out as one piece", "[large_units]") {
  MemoryBudget budget(8 * mebibyte);
  Bench bench(budget, objects_of(4 * mebibyte));
  REQUIRE(bench.cache->unit_size() == 1 * mebibyte);
  bench.write(4 * mebibyte + 4096, pattern(4096, 1));
  bench.write(4 * mebibyte + 65536, pattern(4096, 2));
  bench.write(6 * mebibyte + 4096, pattern(4096, 3));
  bench.cache->flush(bench.storage);
  CHECK(bench.ranges_of(Kind::read) == Ranges{{4 * mebibyte + 8192, 4 * mebibyte + 65536}});
  CHECK(bench.ranges_of(Kind::write) == Ranges{{4 * mebibyte + 4096, 4 * mebibyte + 69632},
                                               {6 * mebibyte + 4096, 6 * mebibyte + 8192}});
}

TEST_CASE("what clients write while the rest of an object is read is not lost", "[large_units]") {
  MemoryBudget budget(64 * mebibyte);
  Bench bench(budget, objects_of(1 * mebibyte));
  const auto before = pattern(1 * mebibyte, 1);
  bench.storage.disk().write(4 * mebibyte, before, true);
  const auto first = pattern(4096, 2);
  const auto second = pattern(10'000, 3);
  bench.write(4 * mebibyte, first);
  Gate gate(bench.storage, Kind::read);
  {
    WatchedThread flushing([&] { bench.cache->flush(bench.storage); });
    gate.wait_until_reached();
    bench.write(4 * mebibyte + 2000, second); // over both
    gate.let_go();
  }
  auto expected = before;
  std::ranges::copy(first, expected.begin());
  CHECK(bench.storage.disk().now({4 * mebibyte, 5 * mebibyte}) == expected);
  std::ranges::copy(second, expected.begin() + 2000);
  std::vector<std::byte> read(1 * mebibyte);
  bench.cache->read(bench.storage, 4 * mebibyte, read);
  CHECK(read == expected);
  bench.cache->flush(bench.storage);
  CHECK(bench.storage.disk().now({4 * mebibyte, 5 * mebibyte}) == expected);
}

TEST_CASE("objects lying side by side are not merged: storage would get them one by one",
          "[large_units]") {
  MemoryBudget budget(64 * mebibyte);
  WriteCache::Settings settings;
  settings.max_write = 4 * mebibyte;
  const bool objects = GENERATE(false, true);
  Bench bench(budget, objects ? objects_of(1 * mebibyte) : preferring(1 * mebibyte), 16,
              std::move(settings));
  bench.write(4 * mebibyte, pattern(4 * mebibyte - 100, 1));
  bench.write(8 * mebibyte - 100, pattern(100, 2));
  while (bench.cache->write_next(bench.storage)) {
  }
  CHECK(bench.cache->counters()->totals()[Count::merged_writes] == (objects ? 0 : 1));
  CHECK(bench.ranges_of(Kind::write).size() == (objects ? 4 : 1));
}

TEST_CASE("a large write that no object ends with is held, and goes out in whole objects",
          "[large_units]") {
  MemoryBudget budget(64 * mebibyte);
  Bench bench(budget, objects_of(1 * mebibyte));
  bench.write(4 * mebibyte + 4096, pattern(5 * mebibyte, 1));
  while (bench.cache->write_next(bench.storage)) {
  }
  CHECK(bench.ranges_of(Kind::write) == Ranges{{5 * mebibyte, 6 * mebibyte},
                                               {6 * mebibyte, 7 * mebibyte},
                                               {7 * mebibyte, 8 * mebibyte},
                                               {8 * mebibyte, 9 * mebibyte}});
  CHECK(bench.ranges_of(Kind::read).empty());
  bench.storage.forget_calls();
  bench.write(16 * mebibyte, pattern(2 * mebibyte, 1));
  CHECK(bench.ranges_of(Kind::write) ==
        Ranges{{16 * mebibyte, 17 * mebibyte}, {17 * mebibyte, 18 * mebibyte}});
}
