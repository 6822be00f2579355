#include "util/all_zeros.hpp"

#include "catch.hpp"

#include <vector>

using namespace qcowcache;

TEST_CASE("zeros are told from other bytes, wherever these are", "[all_zeros]") {
  const std::size_t size = GENERATE(as<std::size_t>{}, 0, 1, 2, 3, 16, 100, 4096);
  std::vector<std::byte> data(size);
  CHECK(all_zeros(data));
  for (std::size_t i = 0; i < size; ++i) {
    data[i] = std::byte{0x80};
    INFO(i);
    REQUIRE_FALSE(all_zeros(data));
    data[i] = std::byte{0};
  }
  data.assign(size, std::byte{1});
  CHECK(all_zeros(data) == (size == 0));
}
