#include "cache/savings.hpp"

#include <catch2/catch.hpp>

using qcowcache::Savings;

TEST_CASE("as long as nothing was written holding pays") {
  CHECK(Savings().pays());
  CHECK_FALSE(Savings().known());
}

TEST_CASE("holding pays where one request stands for several") {
  Savings savings;
  savings.wrote(4, 1);
  CHECK(savings.pays());
  CHECK(savings.known());
}

TEST_CASE("holding does not pay where each request stands for one") {
  Savings savings;
  savings.wrote(1, 1);
  CHECK_FALSE(savings.pays());
  savings.wrote(2, 2);
  CHECK_FALSE(savings.pays());
}

TEST_CASE("what counts is what was saved lately, in either direction") {
  Savings savings;
  for (int i = 0; i < 1000; ++i)
    savings.wrote(16, 1);
  for (int i = 0; i < 64; ++i)
    savings.wrote(1, 1);
  CHECK_FALSE(savings.pays());
  for (int i = 0; i < 3; ++i)
    savings.wrote(16, 1);
  CHECK(savings.pays());
}
