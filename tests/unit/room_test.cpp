#include "room.hpp"

#include "catch.hpp"

#include <cstdint>
#include <optional>

using qcowcache::ByteRange;
using qcowcache::ByteRanges;
using qcowcache::Room;

namespace {

constexpr std::uint64_t unit = std::uint64_t{64} * 1024;
constexpr std::uint64_t large = 16 * unit;
constexpr std::uint64_t size = 40 * unit + 4096;

ByteRange units(std::uint64_t first, std::uint64_t behind) {
  return {first * unit, behind * unit};
}

} // namespace

TEST_CASE("who is never to ask has room", "[room]") {
  const Room room(0);
  CHECK_FALSE(room.asks());
  CHECK(room.has(units(0, 100)));
  CHECK_FALSE(room.next_window(units(12, 13), size));
}

TEST_CASE("room is where it was found, or reserved, until it is gone", "[room]") {
  Room room(large);
  CHECK(room.asks());
  CHECK_FALSE(room.has(units(1, 2)));
  room.found(units(1, 3));
  room.reserved(units(3, 4));
  CHECK(room.has(units(1, 4)));
  CHECK_FALSE(room.has(units(1, 5)));
  room.gone({2 * unit + 5, 2 * unit + 6});
  CHECK_FALSE(room.has(units(2, 3)));
  CHECK(room.has(units(3, 4)));
  SECTION("storage that cannot reserve counts as having room") {
    room.give_up();
    CHECK_FALSE(room.asks());
    CHECK(room.has(units(0, 100)));
    CHECK(room.has_reserved()); // to be given back all the same
  }
  SECTION("all is forgotten") {
    room.clear();
    CHECK_FALSE(room.has(units(1, 2)));
    CHECK_FALSE(room.has_reserved());
  }
}

TEST_CASE("windows lie on a grid, and are small where room is scarce", "[room]") {
  Room room(large + 1);
  CHECK(room.window(units(3, 4), size) == units(0, 16));
  CHECK(room.window(units(17, 18), size) == units(16, 32));
  CHECK(room.window(units(39, 40), size) == ByteRange{32 * unit, size});
  room.smaller(unit);
  CHECK(room.window(units(9, 10), size) == units(8, 10));
  for (int i = 0; i < 10; ++i)
    room.smaller(unit);
  CHECK(room.window(units(9, 10), size) == units(9, 10));
  room.larger();
  CHECK(room.window(units(9, 10), size) == units(8, 10));
  for (int i = 0; i < 10; ++i)
    room.larger();
  CHECK(room.window(units(9, 10), size) == units(0, 16));
  CHECK(Room(unit / 2).window(units(9, 10), size) == units(9, 10));
}

TEST_CASE("the next window is wanted in the second half of one", "[room]") {
  Room room(large);
  CHECK_FALSE(room.next_window(units(8, 9), size)); // nobody knows whether storage can reserve
  room.prove();
  CHECK_FALSE(room.next_window(units(7, 8), size));
  CHECK(room.next_window(units(8, 9), size) == units(16, 32));
  CHECK(room.next_window(units(30, 31), size) == ByteRange{32 * unit, size});
  CHECK_FALSE(room.next_window(units(40, 41), size));
  room.found(units(16, 32));
  CHECK_FALSE(room.next_window(units(8, 9), size));
  room.gone(units(16, 17));
  CHECK(room.next_window(units(8, 9), size) == units(16, 32));
  room.smaller(unit);
  CHECK_FALSE(room.next_window(units(8, 9), size));
}

TEST_CASE("what was reserved and not written is given back", "[room]") {
  Room room(large);
  room.reserved(units(0, 16));
  room.wrote(units(2, 4));
  room.wrote({5 * unit, 5 * unit + 4096});
  CHECK(room.reserved_in(units(4, 6)).bytes() == 2 * unit - 4096);
  const ByteRanges back = room.give_back(ByteRanges(units(10, 16)));
  CHECK(back.bytes() == 8 * unit - 4096);
  CHECK(back.hull() == units(0, 10));
  CHECK(room.has(units(2, 4)));
  CHECK_FALSE(room.has(units(4, 5)));
  CHECK(room.has(units(10, 16)));
  CHECK(room.has_reserved());
  CHECK(room.give_back({}) == ByteRanges(units(10, 16)));
  CHECK_FALSE(room.has_reserved());
}

TEST_CASE("the memory for it is bounded", "[room]") {
  Room room(large);
  for (std::uint64_t i = 0; i < 2 * Room::most_ranges; ++i)
    room.reserved(units(2 * i, 2 * i + 1));
  CHECK_FALSE(room.has(units(0, 1)));
  // Whoever comes to what was forgotten first must not find it forgotten again.
  room.found(units(0, 1));
  CHECK(room.has(units(0, 1)));
  CHECK(room.give_back({}).count() <= Room::most_ranges);
}
