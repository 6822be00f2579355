#include "cache/write_line.hpp"

#include <catch2/catch.hpp>

using qcowcache::ByteRange;
using qcowcache::WriteLine;

TEST_CASE("nobody is behind an empty line") {
  WriteLine line;
  CHECK_FALSE(line.is_behind(line.behind_all(), {0, 100}));
  CHECK(line.may_take_memory(line.behind_all()));
  CHECK(line.waiting_for_memory() == 0);
}

TEST_CASE("who comes later is behind those who ask for the same bytes") {
  WriteLine line;
  const auto first = line.join({0, 100});
  const auto second = line.join({50, 150});
  CHECK_FALSE(line.is_behind(first, {0, 100}));
  CHECK(line.is_behind(second, {50, 150}));
  CHECK_FALSE(line.is_behind(second, {100, 150}));
  CHECK(line.is_behind(line.behind_all(), {149, 200}));
  CHECK_FALSE(line.is_behind(line.behind_all(), {150, 200}));
  line.leave(first);
  CHECK_FALSE(line.is_behind(second, {50, 150}));
  line.leave(second);
}

TEST_CASE("who has not asked for memory for long keeps it from nobody") {
  using std::chrono::milliseconds;
  WriteLine line;
  const WriteLine::Clock::time_point now{};
  const auto hangs = line.join({0, 1});
  line.wait_for_memory(hangs, true, now);
  const auto later = now + WriteLine::patience;
  CHECK_FALSE(line.may_take_memory(line.behind_all(), later - milliseconds(1)));
  CHECK(line.may_take_memory(line.behind_all(), later));
  line.wait_for_memory(hangs, true, later); // it comes back
  CHECK_FALSE(line.may_take_memory(line.behind_all(), later));
}

TEST_CASE("memory goes to whoever has waited for it longest") {
  WriteLine line;
  const auto through = line.join({0, 1});
  const auto first = line.join({1, 2});
  const auto second = line.join({2, 3});
  CHECK(line.may_take_memory(line.behind_all())); // nobody waits for any
  line.wait_for_memory(first, true);
  line.wait_for_memory(second, true);
  line.wait_for_memory(second, true); // once more changes nothing
  CHECK(line.waiting_for_memory() == 2);
  CHECK(line.may_take_memory(through));
  CHECK(line.may_take_memory(first));
  CHECK_FALSE(line.may_take_memory(second));
  CHECK_FALSE(line.may_take_memory(line.behind_all()));

  SECTION("until that has it") {
    line.leave(first);
  }
  SECTION("or wants it no more") {
    line.wait_for_memory(first, false);
  }
  CHECK(line.may_take_memory(second));
  CHECK_FALSE(line.may_take_memory(line.behind_all()));
  CHECK(line.waiting_for_memory() == 1);
}
