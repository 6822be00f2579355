#include "cache/witnesses.hpp"

#include "catch.hpp"
#include "image_bytes.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

using qcowcache::ByteRange;
using qcowcache::Witnesses;

namespace {

constexpr std::uint64_t block = Witnesses::largest_block;

/// Those that are remembered, by where they begin, the latest first.
std::vector<std::uint64_t> begins(const Witnesses& witnesses) {
  std::vector<std::uint64_t> found;
  for (const Witnesses::Witness& each : witnesses.all())
    found.push_back(each.block.begin);
  return found;
}

void write(Witnesses& witnesses, std::uint64_t offset, std::size_t size = block,
           Witnesses::Clock::time_point begun = {}) {
  witnesses.wrote({offset, offset + size}, pattern(size, static_cast<unsigned>(offset)), begun);
}

} // namespace

TEST_CASE("of a disk that nobody has looked at there are no witnesses", "[witnesses]") {
  CHECK(Witnesses().all().empty());
}

TEST_CASE("of what is written the first block is remembered, and since when it is there",
          "[witnesses]") {
  Witnesses witnesses;
  const auto data = pattern(3 * block, 1);
  const auto begun = Witnesses::Clock::now();
  witnesses.wrote({10 * block, 13 * block}, data, begun);
  REQUIRE(witnesses.all().size() == 1);
  const Witnesses::Witness& witness = witnesses.all().front();
  CHECK(witness.block == ByteRange{10 * block, 11 * block});
  CHECK(witness.checksum == Witnesses::checksum(std::span(data).first(block)));
  CHECK(witness.written == begun);
}

TEST_CASE("a checksum tells blocks apart that differ in one bit", "[witnesses]") {
  const auto data = pattern(block, 1);
  for (const std::size_t at : {std::size_t{0}, std::size_t{1000}, std::size_t{block - 1}}) {
    auto other = data;
    other[at] ^= std::byte{0x10};
    CHECK(Witnesses::checksum(other) != Witnesses::checksum(data));
  }
  CHECK(Witnesses::checksum(std::vector(data)) == Witnesses::checksum(data));
}

TEST_CASE("what many disks would have is no witness of what was written", "[witnesses]") {
  Witnesses witnesses;
  write(witnesses, block, Witnesses::smallest_block - 1);
  witnesses.wrote({2 * block, 3 * block}, std::vector<std::byte>(block), {});
  CHECK(witnesses.all().empty());
  write(witnesses, block, Witnesses::smallest_block);
  CHECK(begins(witnesses) == std::vector<std::uint64_t>{block});
  // Zeros in front of other bytes are the block that would be looked at.
  std::vector<std::byte> begins_empty(2 * block);
  begins_empty.back() = std::byte{1};
  witnesses.wrote({4 * block, 6 * block}, begins_empty, {});
  CHECK(begins(witnesses) == std::vector<std::uint64_t>{block});
}

TEST_CASE("what was read is remembered whatever it is, but nobody wrote it", "[witnesses]") {
  const std::size_t size = GENERATE(std::size_t{1}, std::size_t{block}, std::size_t{3 * block});
  const bool empty = GENERATE(true, false);
  const auto data = empty ? std::vector<std::byte>(size) : pattern(size, 1);
  Witnesses witnesses;
  witnesses.read({0, size}, data);
  REQUIRE(witnesses.all().size() == 1);
  CHECK(witnesses.all().front().block == ByteRange{0, std::min<std::uint64_t>(size, block)});
  CHECK_FALSE(witnesses.all().front().written);
  witnesses.clear();
  CHECK(witnesses.all().empty());
}

TEST_CASE("of an empty disk nothing is remembered", "[witnesses]") {
  Witnesses witnesses;
  witnesses.read({0, 0}, {});
  CHECK(witnesses.all().empty());
}

TEST_CASE("a block that is changed is no witness any more, those beside it are", "[witnesses]") {
  Witnesses witnesses;
  for (const std::uint64_t at : {1U, 2U, 3U})
    write(witnesses, at * block);
  SECTION("by anybody") {
    witnesses.changed({3 * block - 1, 3 * block});
    CHECK(begins(witnesses) == std::vector{3 * block, block});
  }
  SECTION("by a write that is too small to be one") {
    write(witnesses, 2 * block + 100, 10);
    CHECK(begins(witnesses) == std::vector{3 * block, block});
  }
  SECTION("by a write that takes its place") {
    const auto begun = Witnesses::Clock::now();
    write(witnesses, 2 * block, block, begun);
    CHECK(begins(witnesses) == std::vector{2 * block, 3 * block, block});
    CHECK(witnesses.all().front().written == begun);
  }
  SECTION("by zeros") {
    witnesses.wrote({2 * block, 3 * block}, std::vector<std::byte>(block), {});
    CHECK(begins(witnesses) == std::vector{3 * block, block});
  }
  SECTION("behind the part that is looked at") {
    witnesses.changed({4 * block, 100 * block});
    CHECK(begins(witnesses) == std::vector{3 * block, 2 * block, block});
  }
}

TEST_CASE("the oldest witness makes room for the latest, but the header stays", "[witnesses]") {
  Witnesses witnesses;
  const bool header = GENERATE(true, false);
  if (header)
    witnesses.read({0, block}, pattern(block, 1));
  for (std::uint64_t at = 1; at <= 10; ++at)
    write(witnesses, at * block);
  CHECK(begins(witnesses) == (header ? std::vector{10 * block, 9 * block, 8 * block, 0 * block}
                                     : std::vector{10 * block, 9 * block, 8 * block, 7 * block}));
  CHECK(witnesses.all().size() == Witnesses::most);
}
