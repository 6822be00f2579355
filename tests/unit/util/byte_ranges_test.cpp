#include "util/byte_ranges.hpp"

#include "as_text.hpp"
#include "catch.hpp"

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <random>
#include <string>
#include <vector>

using qcowcache::align_down;
using qcowcache::align_inward;
using qcowcache::align_outward;
using qcowcache::align_up;
using qcowcache::ByteRange;
using qcowcache::ByteRanges;

namespace {

ByteRanges set_of(std::initializer_list<ByteRange> list) {
  ByteRanges set;
  for (const ByteRange& range : list)
    set.add(range);
  return set;
}

/// What a set of ranges has to equal: one flag for each of a small number of bytes.
class Model {
public:
  static constexpr std::uint64_t size = 200;

  void set(const ByteRange& range, bool value) {
    for (std::uint64_t at = range.begin; at < range.end; ++at)
      flags_[at] = value;
  }
  void set(const Model& other, bool value) {
    for (std::uint64_t at = 0; at < size; ++at) {
      if (other.flags_[at])
        flags_[at] = value;
    }
  }
  [[nodiscard]] Model within(const ByteRange& range, bool wanted) const {
    Model part;
    for (std::uint64_t at = range.begin; at < range.end; ++at)
      part.flags_[at] = flags_[at] == wanted;
    return part;
  }
  [[nodiscard]] std::uint64_t bytes() const {
    std::uint64_t sum = 0;
    for (const bool flag : flags_)
      sum += flag ? 1 : 0;
    return sum;
  }
  /// The same form as as_text::ranges, which shows overlapping and touching ranges, too.
  [[nodiscard]] std::string text() const {
    std::string text;
    std::uint64_t begin = 0;
    bool inside = false;
    for (std::uint64_t at = 0; at <= size; ++at) {
      const bool flag = at < size && flags_[at];
      if (flag && !inside)
        begin = at;
      else if (!flag && inside)
        text += (text.empty() ? "" : " ") + std::to_string(begin) + "-" + std::to_string(at);
      inside = flag;
    }
    return text;
  }

private:
  std::vector<bool> flags_ = std::vector<bool>(size, false);
};

class Dice {
public:
  explicit Dice(std::uint64_t seed) : engine_(seed) {}

  /// A number below `end`.
  std::uint64_t below(std::uint64_t end) { return engine_() % end; }

  /// Mostly short, so that many ranges stand side by side; now and then empty, or most of
  /// everything.
  ByteRange range() {
    const std::uint64_t begin = below(Model::size + 1);
    const std::uint64_t longest = below(20) == 0 ? Model::size : 12;
    return {begin, std::min(Model::size, begin + below(longest + 1))};
  }

private:
  std::mt19937_64 engine_;
};

void require_same_answers(const ByteRanges& set, const Model& model, const ByteRange& question) {
  INFO("asked about " << question.begin << "-" << question.end);
  REQUIRE(as_text::ranges(set) == model.text());
  REQUIRE(set.empty() == model.text().empty());
  REQUIRE(set.bytes() == model.bytes());
  REQUIRE(as_text::ranges(set.inside(question)) == model.within(question, true).text());
  REQUIRE(as_text::ranges(set.missing(question)) == model.within(question, false).text());
  REQUIRE(set.contains(question) == (model.within(question, false).bytes() == 0));
  REQUIRE(set.overlaps(question) == (model.within(question, true).bytes() != 0));
}

} // namespace

TEST_CASE("random changes to a set of ranges leave what a flag per byte says", "[byte_ranges]") {
  for (const std::uint64_t seed : {1U, 2U, 3U, 5U, 8U, 13U, 21U, 34U, 55U, 89U}) {
    INFO("seed " << seed);
    Dice dice(seed);
    ByteRanges set;
    Model model;
    ByteRanges other;
    Model other_model;
    for (int step = 0; step < 1000; ++step) {
      const ByteRange range = dice.range();
      const std::uint64_t choice = dice.below(100);
      INFO("step " << step << ", choice " << choice << ", " << range.begin << "-" << range.end
                   << ", before: " << as_text::ranges(set));
      if (choice < 45) {
        set.add(range);
        model.set(range, true);
      } else if (choice < 80) {
        set.remove(range);
        model.set(range, false);
      } else if (choice < 90) {
        other.add(range);
        other_model.set(range, true);
      } else if (choice < 94) {
        set.add(other);
        model.set(other_model, true);
      } else if (choice < 98) {
        set.remove(other);
        model.set(other_model, false);
        other.clear();
        other_model = Model{};
      } else {
        set.clear();
        model = Model{};
      }
      require_same_answers(set, model, dice.range());
    }
  }
}

TEST_CASE("what is added joins what it touches, and what is removed is cut out", "[byte_ranges]") {
  struct Change {
    ByteRanges before;
    bool adds;
    ByteRange range;
    std::string after;
  };
  const std::vector<Change> changes = {
      // behind the last one, before the first, touching either, in a gap, over several, inside
      {set_of({{0, 10}}), true, {20, 30}, "0-10 20-30"},
      {set_of({{20, 30}, {40, 50}, {60, 70}}), true, {0, 10}, "0-10 20-30 40-50 60-70"},
      {set_of({{0, 10}, {20, 30}}), true, {30, 40}, "0-10 20-40"},
      {set_of({{10, 20}, {30, 40}}), true, {5, 10}, "5-20 30-40"},
      {set_of({{0, 10}, {20, 30}, {40, 50}}), true, {10, 20}, "0-30 40-50"},
      {set_of({{0, 10}, {20, 30}, {40, 50}, {60, 70}}), true, {25, 45}, "0-10 20-50 60-70"},
      {set_of({{0, 10}, {20, 30}}), true, {0, 100}, "0-100"},
      {set_of({{0, 10}, {20, 30}}), true, {22, 28}, "0-10 20-30"},
      // the middle, an end, several, what touches, and exactly one
      {set_of({{0, 10}, {20, 50}, {60, 70}}), false, {30, 40}, "0-10 20-30 40-50 60-70"},
      {set_of({{0, 10}, {20, 50}}), false, {20, 25}, "0-10 25-50"},
      {set_of({{0, 10}, {20, 50}}), false, {45, 60}, "0-10 20-45"},
      {set_of({{0, 10}, {20, 30}, {40, 50}, {60, 70}}), false, {5, 65}, "0-5 65-70"},
      {set_of({{10, 20}}), false, {20, 30}, "10-20"},
      {set_of({{10, 20}}), false, {0, 10}, "10-20"},
      {set_of({{0, 10}, {20, 30}, {40, 50}}), false, {20, 30}, "0-10 40-50"},
  };
  for (Change change : changes) {
    if (change.adds)
      change.before.add(change.range);
    else
      change.before.remove(change.range);
    CHECK(as_text::ranges(change.before) == change.after);
  }
}

TEST_CASE("an empty range adds and removes nothing, and is nowhere missing", "[byte_ranges]") {
  const ByteRange empty = GENERATE(ByteRange{5, 5}, ByteRange{15, 15}, ByteRange{8, 3});
  ByteRanges nothing;
  nothing.add(empty);
  CHECK(nothing.empty());
  CHECK(nothing.contains(empty));
  CHECK_FALSE(nothing.overlaps(empty));

  ByteRanges set = set_of({{0, 10}, {20, 30}});
  set.add(empty);
  set.remove(empty);
  CHECK(as_text::ranges(set) == "0-10 20-30");
  CHECK(set.contains(empty));
  CHECK_FALSE(set.overlaps(empty));
  CHECK(set.inside(empty).empty());
  CHECK(set.missing(empty).empty());
}

TEST_CASE("the hull reaches from the first byte to the last", "[byte_ranges]") {
  CHECK(ByteRanges{}.hull() == ByteRange{});
  CHECK(ByteRanges(ByteRange{3, 4}).hull() == ByteRange{3, 4});
  CHECK(set_of({{40, 50}, {10, 20}, {30, 31}}).hull() == ByteRange{10, 50});
}

TEST_CASE("bytes and ranges are counted, a cleared set has none", "[byte_ranges]") {
  ByteRanges set = set_of({{0, 1}, {10, 20}, {UINT64_MAX - 5, UINT64_MAX}});
  CHECK(set.bytes() == 16);
  CHECK(set.count() == 3);
  set.clear();
  CHECK(set.empty());
  CHECK(set.bytes() == 0);
  CHECK(set.count() == 0);
}

TEST_CASE("ranges at the far end of 64 bits are kept exactly", "[byte_ranges]") {
  ByteRanges set(ByteRange{0, UINT64_MAX});
  set.remove({std::uint64_t{1} << 63U, UINT64_MAX - 1});
  CHECK(as_text::ranges(set) == "0-9223372036854775808 18446744073709551614-18446744073709551615");
}

TEST_CASE("room that was reserved is used without moving the ranges", "[byte_ranges]") {
  ByteRanges set = set_of({{0, 1}, {5, 6}});
  set.reserve(100);
  CHECK(as_text::ranges(set) == "0-1 5-6");
  const ByteRange* const first = &*set.begin();
  for (std::uint64_t at = 1; at < 99; ++at)
    set.add({at * 10, at * 10 + 1});
  CHECK(set.count() == 100);
  CHECK(&*set.begin() == first);
}

TEST_CASE("sets are equal when they have the same bytes, however they came about",
          "[byte_ranges]") {
  ByteRanges in_pieces = set_of({{0, 4}, {8, 12}, {4, 8}, {20, 24}});
  const ByteRanges at_once = set_of({{0, 12}, {20, 24}});
  CHECK(in_pieces == at_once);
  in_pieces.add({24, 25});
  CHECK_FALSE(in_pieces == at_once);
  CHECK_FALSE(ByteRanges{} == at_once);
}

TEST_CASE("a copy is a set of its own", "[byte_ranges]") {
  const ByteRanges original = set_of({{0, 10}, {20, 30}, {40, 50}});
  ByteRanges copy = original;
  copy.remove({0, 45});
  CHECK(as_text::ranges(copy) == "45-50");
  CHECK(as_text::ranges(original) == "0-10 20-30 40-50");
}

TEST_CASE("single ranges overlap, contain and intersect", "[byte_ranges]") {
  const ByteRange range{10, 20};
  CHECK(range.size() == 10);
  CHECK_FALSE(range.empty());
  CHECK(ByteRange{20, 10}.empty());
  CHECK(ByteRange{20, 10}.size() == 0);
  CHECK(range.overlaps({19, 30}));
  CHECK_FALSE(range.overlaps({20, 30}));
  CHECK_FALSE(range.overlaps({15, 15}));
  CHECK_FALSE(ByteRange{15, 15}.overlaps(range));
  CHECK(range.contains({10, 20}));
  CHECK(range.contains({50, 50}));
  CHECK_FALSE(range.contains({10, 21}));
  CHECK_FALSE(range.contains({9, 20}));
  CHECK(range.intersection({15, 30}) == ByteRange{15, 20});
  CHECK(range.intersection({0, 100}) == range);
  CHECK(range.intersection({30, 40}).empty());
}

TEST_CASE("offsets are aligned to multiples", "[byte_ranges]") {
  CHECK(align_down(0, 4096) == 0);
  CHECK(align_down(4095, 4096) == 0);
  CHECK(align_down(4096, 4096) == 4096);
  CHECK(align_up(0, 4096) == 0);
  CHECK(align_up(1, 4096) == 4096);
  CHECK(align_up(4096, 4096) == 4096);
  CHECK(align_up(7, 1) == 7);
  constexpr std::uint64_t tebibyte = std::uint64_t{1} << 40U;
  CHECK(align_up(8 * tebibyte + 1, 65536) == 8 * tebibyte + 65536);
}

TEST_CASE("ranges are aligned outward to all blocks touched", "[byte_ranges]") {
  CHECK(align_outward({100, 200}, 512) == ByteRange{0, 512});
  CHECK(align_outward({512, 1024}, 512) == ByteRange{512, 1024});
  CHECK(align_outward({511, 1025}, 512) == ByteRange{0, 1536});
}

TEST_CASE("ranges are aligned inward to whole blocks, or to nothing", "[byte_ranges]") {
  CHECK(align_inward({512, 1024}, 512) == ByteRange{512, 1024});
  CHECK(align_inward({511, 1025}, 512) == ByteRange{512, 1024});
  CHECK(align_inward({513, 1535}, 512).empty());
  CHECK(align_inward({100, 200}, 512) == ByteRange{100, 100});
  CHECK(align_inward({7, 9}, 1) == ByteRange{7, 9});
}
