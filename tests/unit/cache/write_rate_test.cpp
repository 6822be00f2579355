#include "cache/write_rate.hpp"

#include <catch2/catch.hpp>

using qcowcache::WriteRate;
using namespace std::chrono_literals;

namespace {
const WriteRate::Clock::time_point start{1000s};
}

TEST_CASE("what a single quick write says is too little") {
  WriteRate rate;
  CHECK_FALSE(rate.bytes_in(10s));
  rate.began(start);
  rate.ended(start + 5ms, 1000);
  CHECK_FALSE(rate.bytes_in(10s));
}

TEST_CASE("the rate is what was written in the time that it took") {
  WriteRate rate;
  rate.began(start);
  rate.ended(start + 500ms, 1000000);
  CHECK(rate.bytes_in(10s) == 20000000);
}

TEST_CASE("time in which nothing was written does not count") {
  WriteRate rate;
  rate.began(start);
  rate.ended(start + 100ms, 100000);
  rate.began(start + 100s);
  rate.ended(start + 100s + 150ms, 150000);
  CHECK(rate.bytes_in(1s) == 1000000);
}

TEST_CASE("writes side by side take their time together") {
  WriteRate rate;
  rate.began(start);
  rate.began(start + 100ms);
  rate.ended(start + 400ms, 200000);
  rate.ended(start + 500ms, 300000);
  rate.began(start + 600ms);
  rate.ended(start + 1000ms, 400000);
  const auto bytes = rate.bytes_in(1s);
  REQUIRE(bytes);
  // 200 000 in the first 400 ms, 700 000 in the next 500 ms; the newer one counts for a quarter.
  CHECK(*bytes == 500000 + (1400000 - 500000) / 4);
}

TEST_CASE("what storage has refused was not written, but took time") {
  WriteRate rate;
  rate.began(start);
  rate.ended(start + 500ms, 0);
  CHECK(rate.bytes_in(1s) == 0);
}
