#include "cache/room.hpp"

#include "catch.hpp"

#include <cstdint>
#include <optional>

using qcowcache::ByteRange;
using qcowcache::ByteRanges;
using qcowcache::Room;

namespace {

constexpr std::uint64_t unit = std::uint64_t{64} * 1024;
constexpr std::uint64_t large = 32 * unit;
constexpr std::uint64_t size = 100 * unit + 4096;

ByteRange units(std::uint64_t first, std::uint64_t behind) {
  return {first * unit, behind * unit};
}

} // namespace

TEST_CASE("who is never to ask has room", "[room]") {
  const Room room(0);
  CHECK_FALSE(room.asks());
  CHECK(room.has(units(0, 100)));
  CHECK_FALSE(room.next_unit(units(12, 13), size));
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
  room.wrote(units(7, 8));
  CHECK(room.has(units(7, 8)));
  SECTION("storage that cannot reserve counts as having room") {
    room.give_up();
    CHECK_FALSE(room.asks());
    CHECK(room.has(units(0, 100)));
    CHECK(room.reserved() == ByteRanges(units(3, 4))); // to be given back all the same
    room.gone(units(3, 4));
    CHECK(room.reserved().empty());
    room.clear();
    CHECK(room.asks()); // another disk
  }
  SECTION("storage that could not be asked counts as having room for a while") {
    room.pause(Room::Clock::time_point::max());
    CHECK_FALSE(room.asks());
    CHECK(room.has(units(0, 100)));
    room.pause(Room::Clock::time_point::min());
    CHECK(room.asks());
    CHECK(room.has(units(3, 4)));
    CHECK_FALSE(room.has(units(0, 100)));
  }
  SECTION("all is forgotten") {
    room.clear();
    CHECK_FALSE(room.has(units(1, 2)));
    CHECK(room.reserved().empty());
  }
}

TEST_CASE("windows lie on a grid, and are small where room is scarce", "[room]") {
  Room room(large + 1);
  CHECK(room.window(units(35, 36), size) == units(32, 64));
  CHECK(room.window(units(99, 100), size) == ByteRange{96 * unit, size});
  room.smaller(unit);
  CHECK(room.window(units(37, 38), size) == units(36, 40));
  for (int i = 0; i < 10; ++i)
    room.smaller(unit);
  CHECK(room.window(units(37, 38), size) == units(37, 38));
  room.larger();
  CHECK(room.window(units(37, 38), size) == units(36, 38));
  for (int i = 0; i < 10; ++i)
    room.larger();
  CHECK(room.window(units(37, 38), size) == units(32, 64));
  CHECK(Room(unit / 2).window(units(9, 10), size) == units(9, 10));
}

TEST_CASE("the first window is small", "[room]") {
  Room room(large);
  CHECK(room.window(units(0, 1), size) == ByteRange{0, Room::beginning});
  CHECK(room.window(units(15, 16), size) == units(0, 16));
  CHECK(room.window(units(16, 17), size) == units(0, 32));
  CHECK(Room(8 * unit).window(units(9, 10), size) == units(8, 16));
  CHECK(room.window({0, 2 * Room::beginning}, size) == units(0, 32)); // one unit, which is larger
}

TEST_CASE("the next window is wanted in the second half of one", "[room]") {
  Room room(large);
  CHECK_FALSE(room.next_unit(units(50, 51), size)); // nobody knows whether storage can reserve
  room.prove();
  CHECK_FALSE(room.next_unit(units(7, 8), size));
  CHECK(room.next_unit(units(8, 9), size) == units(16, 17)); // of the first window
  CHECK_FALSE(room.next_unit(units(47, 48), size));
  CHECK(room.next_unit(units(48, 49), size) == units(64, 65));
  CHECK(room.next_unit(units(80, 81), size) == units(96, 97));
  CHECK_FALSE(room.next_unit(units(100, 101), size));
  room.found(units(64, 96));
  CHECK_FALSE(room.next_unit(units(48, 49), size));
  room.gone(units(64, 65));
  CHECK(room.next_unit(units(48, 49), size) == units(64, 65));
  room.smaller(unit);
  CHECK_FALSE(room.next_unit(units(48, 49), size));
}

TEST_CASE("what is reserved is what nobody has written to", "[room]") {
  Room room(large);
  room.reserved(units(0, 16));
  room.wrote(units(2, 4));
  room.wrote({5 * unit, 5 * unit + 4096});
  CHECK(room.reserved_in(units(4, 6)).bytes() == 2 * unit - 4096);
  CHECK(room.reserved().bytes() == 14 * unit - 4096);
  room.gone(units(10, 12));
  CHECK(room.has(units(0, 10)));
  CHECK_FALSE(room.has(units(10, 11)));
  CHECK(room.reserved().bytes() == 12 * unit - 4096);
}

TEST_CASE("the memory for it is bounded", "[room]") {
  Room room(large);
  for (std::uint64_t i = 0; i < 2 * Room::most_ranges; ++i)
    room.reserved(units(2 * i, 2 * i + 1));
  CHECK_FALSE(room.has(units(0, 1)));
  // Whoever comes to what was forgotten first must not find it forgotten again.
  room.found(units(0, 1));
  CHECK(room.has(units(0, 1)));
  CHECK(room.reserved().count() <= Room::most_ranges);
}
