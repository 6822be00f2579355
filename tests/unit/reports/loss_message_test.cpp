#include "reports/loss_message.hpp"

#include "catch.hpp"

#include <algorithm>

using namespace qcowcache;

namespace {

Unsaved lost(std::size_t ranges) {
  Unsaved unsaved;
  for (std::uint64_t i = 0; i < ranges; ++i)
    unsaved.ranges.add({i * 1000, i * 1000 + 10});
  unsaved.bytes = unsaved.ranges.bytes();
  return unsaved;
}

} // namespace

TEST_CASE("a loss is told with its export, its size, and the offsets of its ranges",
          "[loss_message]") {
  CHECK(loss_message("disk", lost(1)) ==
        "export \"disk\": lost 10 bytes that were acknowledged, because storage refused them: 0-9");
  CHECK(loss_message("", lost(4)) ==
        "export \"\": lost 40 bytes that were acknowledged, because storage refused them: "
        "0-9, 1000-1009, 2000-2009, 3000-3009");
}

TEST_CASE("of very many ranges the first are named and the others counted", "[loss_message]") {
  CHECK(loss_message("disk", lost(5)) ==
        "export \"disk\": lost 50 bytes that were acknowledged, because storage refused them: "
        "0-9, 1000-1009, 2000-2009, 3000-3009, and 1 more");
  const std::string of_many = loss_message("disk", lost(100000));
  CHECK(of_many.find("lost 1000000 bytes") != std::string::npos);
  CHECK(of_many.find(", and 99996 more") != std::string::npos);
  CHECK(of_many.size() < 300);
}

TEST_CASE("a name that a client chose cannot break the line or make it long", "[loss_message]") {
  const std::string line = loss_message("a\nb\x1b[31m\xc3\xbc" + std::string(4000, 'x'), lost(1));
  CHECK(line.size() < 300);
  CHECK(line.find("\"a\\x0ab\\x1b[31m\xc3\xbcxxx") != std::string::npos);
  CHECK(line.find("xxx...\"") != std::string::npos);
  CHECK(std::ranges::none_of(line, [](char c) { return c == '\n' || c == '\x1b'; }));
  const std::string longest(64, 'y');
  CHECK(loss_message(longest, lost(1)).find("\"" + longest + "\"") != std::string::npos);
}
