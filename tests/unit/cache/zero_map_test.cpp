#include "cache/zero_map.hpp"

#include "as_text.hpp"
#include "catch.hpp"

#include <cstdint>
#include <string>

using qcowcache::ByteRange;
using qcowcache::ByteRanges;
using qcowcache::ZeroMap;

namespace {

bool are_zeros(const ZeroMap& map, const ByteRange& range) {
  return map.zeros_in(range).contains(range);
}

constexpr ByteRange everything{0, UINT64_MAX};

void learn_at_once(ZeroMap& map, const ByteRange& answered, const ByteRanges& zeros) {
  map.learn(map.ask(), answered, zeros);
}

std::string zeros_of(const ZeroMap& map) {
  return as_text::ranges(map.zeros_in(everything));
}

} // namespace

TEST_CASE("a new map knows nothing", "[zero_map]") {
  const ZeroMap map;
  CHECK_FALSE(map.asked({0, 1}));
  CHECK_FALSE(are_zeros(map, {0, 1}));
  CHECK(zeros_of(map).empty());
}

TEST_CASE("what storage answered is remembered, zeros and data apart", "[zero_map]") {
  ZeroMap map;
  ByteRanges zeros(ByteRange{0, 4096});
  zeros.add({8192, 12288});
  learn_at_once(map, {0, 16384}, zeros);
  CHECK(map.asked({0, 16384}));
  CHECK_FALSE(map.asked({0, 16385}));
  CHECK(are_zeros(map, {0, 4096}));
  CHECK(are_zeros(map, {9000, 9001}));
  CHECK_FALSE(are_zeros(map, {0, 8193}));
  CHECK(as_text::ranges(map.zeros_in({4000, 9000})) == "4000-4096 8192-9000");
}

TEST_CASE("what is changed is no longer known to be zeros, but need not be asked about again",
          "[zero_map]") {
  ZeroMap map;
  learn_at_once(map, {0, 1000}, ByteRanges(ByteRange{0, 1000}));
  map.changed({100, 200});
  CHECK(zeros_of(map) == "0-100 200-1000");
  CHECK(map.asked({0, 1000}));
}

TEST_CASE("what changes while storage answers is left out of the answer", "[zero_map]") {
  ZeroMap map;
  const ZeroMap::Question question = map.ask();
  map.changed({100, 200});
  map.changed({900, 1100});
  map.learn(question, {0, 1000}, ByteRanges(ByteRange{0, 1000}));
  CHECK(zeros_of(map) == "0-100 200-900");
}

TEST_CASE("what changed before a question is not left out of its answer", "[zero_map]") {
  ZeroMap map;
  map.changed({100, 200});
  learn_at_once(map, {0, 1000}, ByteRanges(ByteRange{0, 1000}));
  CHECK(zeros_of(map) == "0-1000");
}

TEST_CASE("each of two questions leaves out what changed during it", "[zero_map]") {
  ZeroMap map;
  const ZeroMap::Question first = map.ask();
  map.changed({0, 10});
  const ZeroMap::Question second = map.ask();
  map.changed({20, 30});
  map.learn(second, {0, 40}, ByteRanges(ByteRange{0, 40}));
  CHECK(zeros_of(map) == "0-20 30-40");
  map.changed({0, 20});
  map.learn(first, {0, 100}, ByteRanges(ByteRange{0, 100}));
  CHECK(zeros_of(map) == "30-100");
}

TEST_CASE("a question that was withdrawn leaves nothing behind", "[zero_map]") {
  ZeroMap map;
  const ZeroMap::Question withdrawn = map.ask();
  const ZeroMap::Question kept = map.ask();
  map.withdraw(withdrawn);
  map.changed({0, 10});
  CHECK_FALSE(map.asked({0, 1}));
  map.learn(kept, {0, 20}, ByteRanges(ByteRange{0, 20}));
  CHECK(zeros_of(map) == "10-20");
}

TEST_CASE("what storage has zeroed is known, also when a question was under way", "[zero_map]") {
  ZeroMap map;
  const ZeroMap::Question question = map.ask();
  map.zeroed({100, 200});
  CHECK(zeros_of(map) == "100-200");
  map.learn(question, {0, 300}, ByteRanges{});
  CHECK(zeros_of(map) == "100-200");
}

TEST_CASE("zeroed and then written while storage answers is not zeros", "[zero_map]") {
  ZeroMap map;
  const ZeroMap::Question question = map.ask();
  map.zeroed({100, 200});
  map.changed({150, 160});
  map.learn(question, {0, 300}, ByteRanges(ByteRange{0, 300}));
  CHECK(zeros_of(map) == "0-150 160-300");
}

TEST_CASE("a cleared map knows nothing, and learns no zeros from questions of before",
          "[zero_map]") {
  ZeroMap map;
  learn_at_once(map, {0, 1000}, ByteRanges(ByteRange{0, 1000}));
  const ZeroMap::Question question = map.ask();
  map.clear();
  CHECK_FALSE(map.asked({0, 1}));
  CHECK(zeros_of(map).empty());
  map.learn(question, {0, 1000}, ByteRanges(ByteRange{0, 1000}));
  CHECK(zeros_of(map).empty());
  learn_at_once(map, {0, 1000}, ByteRanges(ByteRange{0, 1000}));
  CHECK(zeros_of(map) == "0-1000");
}

TEST_CASE("no more ranges are remembered than allowed, and none that is wrong", "[zero_map]") {
  constexpr std::uint64_t many = 2 * ZeroMap::most_ranges;
  ZeroMap map;
  ByteRanges zeros;
  for (std::uint64_t at = 0; at < many; ++at)
    zeros.add({at * 10, at * 10 + 5});

  SECTION("in one answer") {
    learn_at_once(map, {0, many * 10}, zeros);
  }
  SECTION("in many answers") {
    for (const ByteRange& range : zeros)
      learn_at_once(map, range, ByteRanges(range));
  }
  SECTION("zeroed one by one") {
    for (const ByteRange& range : zeros)
      map.zeroed(range);
  }
  SECTION("split by changes") {
    learn_at_once(map, {0, many * 10}, ByteRanges(ByteRange{0, many * 10}));
    for (std::uint64_t at = 0; at < many; ++at)
      map.changed({at * 10 + 5, at * 10 + 10});
  }
  const ByteRanges known = map.zeros_in(everything);
  CHECK(known.count() > ZeroMap::most_ranges / 2);
  CHECK(known.count() <= ZeroMap::most_ranges);
  ByteRanges wrong = known;
  wrong.remove(zeros);
  CHECK(as_text::ranges(wrong).empty());
}

TEST_CASE("where the map is full, what was zeroed last is known rather than what came first",
          "[zero_map]") {
  ZeroMap map;
  for (std::uint64_t at = 0; at <= ZeroMap::most_ranges; ++at)
    map.zeroed({at * 10, at * 10 + 5});
  CHECK(are_zeros(map, {ZeroMap::most_ranges * 10, ZeroMap::most_ranges * 10 + 5}));
  CHECK_FALSE(are_zeros(map, {0, 5}));
}

TEST_CASE("more changes during a question than can be told apart are all left out", "[zero_map]") {
  constexpr std::uint64_t many = ZeroMap::most_ranges + 10;
  ZeroMap map;
  const ZeroMap::Question question = map.ask();
  ByteRanges changes;
  for (std::uint64_t at = 0; at < many; ++at) {
    map.changed({1000 + at * 10, 1000 + at * 10 + 1});
    changes.add({1000 + at * 10, 1000 + at * 10 + 1});
  }
  map.learn(question, {0, 100'000}, ByteRanges(ByteRange{0, 100'000}));
  const ByteRanges known = map.zeros_in(everything);
  CHECK(are_zeros(map, {0, 1000}));
  CHECK(are_zeros(map, {1000 + many * 10, 100'000}));
  for (const ByteRange& change : changes) {
    INFO("change at " << change.begin);
    REQUIRE_FALSE(known.overlaps(change));
  }
}
