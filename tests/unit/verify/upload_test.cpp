#include "verify/upload.hpp"

#include "catch.hpp"

#include <cstdint>

using qcowcache::Upload;

namespace {
constexpr std::uint64_t mega = std::uint64_t{1} << 20U;
const int one = 1;
const int other = 2;
} // namespace

TEST_CASE("what lies behind the front of an upload is awaited", "[upload]") {
  Upload upload;
  CHECK_FALSE(upload.awaits({0, mega}));
  upload.wrote({0, mega}, &one);
  CHECK(upload.awaits({2 * mega, 3 * mega}));
  CHECK(upload.awaits({mega - 1000, mega + 513}));
  CHECK_FALSE(upload.awaits({mega - 1000, mega})); // its last sector is there
  CHECK_FALSE(upload.awaits({1000, 2000}));
  upload.wrote({2 * mega, 3 * mega}, &one); // overtakes another
  CHECK_FALSE(upload.awaits({mega, 2 * mega}));
  upload.wrote({mega, 2 * mega}, &one);
  CHECK(upload.awaits({3 * mega, 4 * mega}));
  CHECK_FALSE(upload.awaits({}));
}

TEST_CASE("it is over when somebody writes as no upload does", "[upload]") {
  Upload upload;
  upload.wrote({0, 2 * mega}, &one);
  REQUIRE(upload.awaits({3 * mega, 4 * mega}));
  SECTION("the same bytes once more") {
    upload.wrote({36, 48}, &one);
  }
  SECTION("elsewhere") {
    upload.wrote({100 * mega, 101 * mega}, &one);
  }
  SECTION("and has left") {
    upload.left(&one);
  }
  CHECK_FALSE(upload.awaits({500 * mega, 501 * mega}));
  upload.wrote({4 * mega, 5 * mega}, &one);
  CHECK_FALSE(upload.awaits({500 * mega, 501 * mega}));
  upload.wrote({0, 512}, &one); // begins another
  CHECK(upload.awaits({500 * mega, 501 * mega}));
  CHECK_FALSE(upload.awaits({4 * mega, 5 * mega})); // was written before
}

TEST_CASE("it begins with the first byte", "[upload]") {
  Upload upload;
  upload.wrote({512, mega}, &one);
  CHECK_FALSE(upload.awaits({3 * mega, 4 * mega}));
}

TEST_CASE("zeros are part of it, before it and in between", "[upload]") {
  Upload upload;
  upload.zeroed({0, 1000 * mega});
  upload.wrote({0, mega}, &one);
  upload.zeroed({mega, 200 * mega});
  CHECK(upload.awaits({100 * mega, 101 * mega}));
  upload.wrote({200 * mega, 201 * mega}, &one);
  CHECK(upload.awaits({300 * mega, 301 * mega}));
  CHECK_FALSE(upload.awaits({100 * mega, 101 * mega}));
}

TEST_CASE("it goes on until all who take part have left", "[upload]") {
  Upload upload;
  upload.wrote({0, mega}, &one);
  upload.wrote({mega, 2 * mega}, &other);
  upload.left(&one);
  CHECK(upload.awaits({3 * mega, 4 * mega}));
  upload.left(&other);
  CHECK_FALSE(upload.awaits({3 * mega, 4 * mega}));
}

TEST_CASE("of an upload in many pieces the front is known", "[upload]") {
  Upload upload;
  for (std::uint64_t i = 0; i < 5000; ++i)
    upload.wrote({i * 1024, i * 1024 + 512}, &one);
  CHECK(upload.awaits({5000 * 1024, 5001 * 1024}));
  CHECK_FALSE(upload.awaits({4000 * 1024, 4001 * 1024}));
  upload.wrote({100, 200}, &one);
  CHECK_FALSE(upload.awaits({5000 * 1024, 5001 * 1024}));
}
