#include "../fuzz/targets.hpp"

#include "catch.hpp"

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace {

std::vector<std::byte> content(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  REQUIRE(file);
  const std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const auto as_bytes = std::as_bytes(std::span(bytes));
  return {as_bytes.begin(), as_bytes.end()};
}

} // namespace

TEST_CASE("what the fuzzers start from, and what they found once, breaks nothing", "[fuzz]") {
  for (const fuzz::Target& target : fuzz::targets) {
    std::size_t inputs = 0;
    for (const auto& entry :
         std::filesystem::directory_iterator(std::filesystem::path(FUZZ_CORPUS) / target.name)) {
      INFO(entry.path().string());
      CHECK_NOTHROW(target.run(content(entry.path())));
      ++inputs;
    }
    INFO(target.name);
    CHECK(inputs > 0);
    CHECK_NOTHROW(target.run({}));
  }
}
