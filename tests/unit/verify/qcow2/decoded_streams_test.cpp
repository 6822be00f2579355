#include "verify/qcow2/decoded_streams.hpp"

#include "catch.hpp"

#include <map>
#include <memory_resource>
#include <random>
#include <set>

using qcowcache::ByteRange;
using qcowcache::qcow2::DecodedStreams;

namespace {

constexpr std::uint64_t region = std::uint64_t{4} << 20U;

/// Memory that ends after so many bytes.
class LittleMemory final : public std::pmr::memory_resource {
public:
  explicit LittleMemory(std::size_t bytes) : left_(bytes) {}

private:
  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    if (bytes > left_)
      throw std::bad_alloc();
    left_ -= bytes;
    return std::pmr::new_delete_resource()->allocate(bytes, alignment);
  }
  void do_deallocate(void* memory, std::size_t bytes, std::size_t alignment) override {
    left_ += bytes;
    std::pmr::new_delete_resource()->deallocate(memory, bytes, alignment);
  }
  [[nodiscard]] bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override {
    return this == &other;
  }

  std::size_t left_;
};

} // namespace

TEST_CASE("a stream is found where it begins, and nowhere else", "[decoded_streams]") {
  DecodedStreams streams(std::pmr::new_delete_resource());
  streams.remember(65541, 3000);
  CHECK(streams.size_at(65541) == 3000);
  CHECK(streams.size_at(65540) == 0);
  CHECK(streams.size_at(65542) == 0);
  CHECK(streams.size_at(65541 + region) == 0);
}

TEST_CASE("one changed byte is enough to forget a stream, a neighbour's is not",
          "[decoded_streams]") {
  DecodedStreams streams(std::pmr::new_delete_resource());
  const std::uint64_t begin = GENERATE(std::uint64_t{1000}, region - 50, 3 * region);
  streams.remember(begin, 100);
  streams.forget({begin - 1, begin});
  streams.forget({begin + 100, begin + 101});
  CHECK(streams.size_at(begin) == 100);
  const std::uint64_t at = GENERATE(0U, 50U, 99U);
  streams.forget({begin + at, begin + at + 1});
  CHECK(streams.size_at(begin) == 0);
  CHECK_FALSE(streams.drop_lowest());
}

TEST_CASE("streams are remembered in any order", "[decoded_streams]") {
  DecodedStreams streams(std::pmr::new_delete_resource());
  for (const std::uint64_t begin : {5000U, 1000U, 9000U, 3000U, 7000U})
    streams.remember(begin, 1000);
  for (const std::uint64_t begin : {1000U, 3000U, 5000U, 7000U, 9000U})
    CHECK(streams.size_at(begin) == 1000);
  streams.forget({3500, 7500});
  CHECK(streams.size_at(1000) == 1000);
  CHECK(streams.size_at(9000) == 1000);
  for (const std::uint64_t begin : {3000U, 5000U, 7000U})
    CHECK(streams.size_at(begin) == 0);
}

TEST_CASE("a stream takes the place of those that it overlaps", "[decoded_streams]") {
  DecodedStreams streams(std::pmr::new_delete_resource());
  streams.remember(1000, 100);
  streams.remember(1100, 100);
  streams.remember(1050, 100);
  CHECK(streams.size_at(1000) == 0);
  CHECK(streams.size_at(1100) == 0);
  CHECK(streams.size_at(1050) == 100);
}

TEST_CASE("without memory the lowest are forgotten, and nothing fails", "[decoded_streams]") {
  LittleMemory memory(20000);
  DecodedStreams streams(&memory);
  constexpr std::uint64_t step = region / 16;
  for (std::uint64_t i = 0; i < 5000; ++i)
    streams.remember(i * step, 1000);
  CHECK(streams.size_at(4899 * step) == 1000);
  CHECK(streams.size_at(4999 * step) == 1000);
  CHECK(streams.size_at(0) == 0);
  for (const std::size_t bytes : {0U, 64U, 80U, 96U, 112U, 128U}) {
    LittleMemory hardly(bytes);
    DecodedStreams one(&hardly);
    one.remember(0, 1000); // remembered or not
    CHECK(one.size_at(1) == 0);
  }
  LittleMemory none(0);
  DecodedStreams nothing(&none);
  nothing.remember(0, 1000);
  CHECK(nothing.size_at(0) == 0);
}

TEST_CASE("random streams and changes agree with a simple model", "[decoded_streams]") {
  std::mt19937_64 random(1);
  DecodedStreams streams(std::pmr::new_delete_resource());
  std::map<std::uint64_t, std::uint32_t> model;
  std::set<std::uint64_t> offsets;
  const auto forget = [&](const ByteRange& range) {
    std::erase_if(model, [&](const auto& item) {
      return ByteRange{item.first, item.first + item.second}.overlaps(range);
    });
  };
  for (unsigned i = 0; i < 20000; ++i) {
    const std::uint64_t begin = random() % (4 * region);
    const auto size = static_cast<std::uint32_t>(1 + random() % 60000);
    forget({begin, begin + size});
    if (random() % 3 == 0) {
      streams.forget({begin, begin + size});
    } else {
      streams.remember(begin, size);
      model[begin] = size;
      offsets.insert(begin);
    }
    if (i % 1000 == 0) {
      for (const std::uint64_t offset : offsets)
        REQUIRE(streams.size_at(offset) == (model.contains(offset) ? model[offset] : 0));
    }
  }
}
