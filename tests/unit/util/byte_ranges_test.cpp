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

TEST_CASE("a range behind the last one becomes another range", "[byte_ranges]") {
  ByteRanges set(ByteRange{0, 10});
  set.add({20, 30});
  CHECK(as_text::ranges(set) == "0-10 20-30");
  CHECK(set.count() == 2);
}

TEST_CASE("a range that touches the last one is joined to it", "[byte_ranges]") {
  ByteRanges set(ByteRange{0, 10});
  set.add({20, 30});
  set.add({30, 40});
  CHECK(as_text::ranges(set) == "0-10 20-40");
}

TEST_CASE("a range that touches the first one from the front is joined to it", "[byte_ranges]") {
  ByteRanges set = set_of({{10, 20}, {30, 40}});
  set.add({5, 10});
  CHECK(as_text::ranges(set) == "5-20 30-40");
}

TEST_CASE("a range that fills a gap exactly joins its neighbours", "[byte_ranges]") {
  ByteRanges set = set_of({{0, 10}, {20, 30}, {40, 50}});
  set.add({10, 20});
  CHECK(as_text::ranges(set) == "0-30 40-50");
}

TEST_CASE("a range over several joins all of them", "[byte_ranges]") {
  ByteRanges set = set_of({{0, 10}, {20, 30}, {40, 50}, {60, 70}});
  set.add({25, 45});
  CHECK(as_text::ranges(set) == "0-10 20-50 60-70");
  set.add({0, 100});
  CHECK(as_text::ranges(set) == "0-100");
}

TEST_CASE("a range that is in the set already changes nothing", "[byte_ranges]") {
  ByteRanges set = set_of({{0, 10}, {20, 30}});
  set.add({22, 28});
  set.add({20, 30});
  set.add({0, 1});
  CHECK(as_text::ranges(set) == "0-10 20-30");
}

TEST_CASE("a range before all others becomes the first one", "[byte_ranges]") {
  ByteRanges set = set_of({{20, 30}, {40, 50}, {60, 70}});
  set.add({0, 10});
  CHECK(as_text::ranges(set) == "0-10 20-30 40-50 60-70");
}

TEST_CASE("removing the middle of a range splits it", "[byte_ranges]") {
  ByteRanges set = set_of({{0, 10}, {20, 50}, {60, 70}});
  set.remove({30, 40});
  CHECK(as_text::ranges(set) == "0-10 20-30 40-50 60-70");
}

TEST_CASE("removing an end of a range shortens it", "[byte_ranges]") {
  ByteRanges set = set_of({{0, 10}, {20, 50}});
  set.remove({20, 25});
  CHECK(as_text::ranges(set) == "0-10 25-50");
  set.remove({45, 60});
  CHECK(as_text::ranges(set) == "0-10 25-45");
}

TEST_CASE("removing across several ranges shortens the outer and drops the inner ones",
          "[byte_ranges]") {
  ByteRanges set = set_of({{0, 10}, {20, 30}, {40, 50}, {60, 70}});
  set.remove({5, 65});
  CHECK(as_text::ranges(set) == "0-5 65-70");
}

TEST_CASE("removing what only touches a range changes nothing", "[byte_ranges]") {
  ByteRanges set(ByteRange{10, 20});
  set.remove({0, 10});
  set.remove({20, 30});
  CHECK(as_text::ranges(set) == "10-20");
}

TEST_CASE("removing exactly a range drops it", "[byte_ranges]") {
  ByteRanges set = set_of({{0, 10}, {20, 30}, {40, 50}});
  set.remove({20, 30});
  CHECK(as_text::ranges(set) == "0-10 40-50");
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

TEST_CASE("a set contains a range only when one of its own covers all of it", "[byte_ranges]") {
  const ByteRanges set = set_of({{0, 10}, {20, 30}, {40, 50}});
  CHECK(set.contains({0, 10}));
  CHECK(set.contains({29, 30}));
  CHECK(set.contains({40, 41}));
  CHECK_FALSE(set.contains({9, 11}));
  CHECK_FALSE(set.contains({10, 20}));
  CHECK_FALSE(set.contains({5, 25}));
  CHECK_FALSE(set.contains({50, 51}));
}

TEST_CASE("a set overlaps a range when they share a byte, not when they touch", "[byte_ranges]") {
  const ByteRanges set = set_of({{10, 20}, {30, 40}, {50, 60}});
  CHECK(set.overlaps({0, 11}));
  CHECK(set.overlaps({19, 31}));
  CHECK(set.overlaps({0, 100}));
  CHECK_FALSE(set.overlaps({0, 10}));
  CHECK_FALSE(set.overlaps({20, 30}));
  CHECK_FALSE(set.overlaps({60, 70}));
}

TEST_CASE("what is inside and what is missing are cut to the range asked about", "[byte_ranges]") {
  const ByteRanges set = set_of({{10, 20}, {30, 40}, {50, 60}});
  CHECK(as_text::ranges(set.inside({15, 55})) == "15-20 30-40 50-55");
  CHECK(as_text::ranges(set.missing({15, 55})) == "20-30 40-50");
  CHECK(as_text::ranges(set.inside({0, 100})) == "10-20 30-40 50-60");
  CHECK(as_text::ranges(set.missing({0, 100})) == "0-10 20-30 40-50 60-100");
  CHECK(set.inside({20, 30}).empty());
  CHECK(as_text::ranges(set.missing({20, 30})) == "20-30");
  CHECK(set.missing({32, 38}).empty());
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
  ByteRanges set;
  set.add({0, 1});
  set.reserve(100);
  const ByteRange* const first = &*set.begin();
  for (std::uint64_t at = 1; at < 100; ++at)
    set.add({at * 10, at * 10 + 1});
  CHECK(set.count() == 100);
  CHECK(&*set.begin() == first);
}

TEST_CASE("reserving keeps what is in the set", "[byte_ranges]") {
  ByteRanges set = set_of({{0, 10}, {20, 30}, {40, 50}});
  set.reserve(1000);
  CHECK(as_text::ranges(set) == "0-10 20-30 40-50");
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
