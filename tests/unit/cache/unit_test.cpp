#include "cache/unit.hpp"

#include "as_text.hpp"
#include "catch.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

using qcowcache::ByteRange;
using qcowcache::MemoryBudget;
using qcowcache::Unit;

namespace {

constexpr std::uint64_t size = 4096;
/// Where the unit lies: not at 0, so that offsets in the export and in the buffer differ.
constexpr std::uint64_t begin = 3 * size;
constexpr std::uint64_t export_size = 100 * size;
constexpr ByteRange whole{begin, begin + size};
constexpr ByteRange everything{0, UINT64_MAX};
constexpr std::size_t most_fragments = 8;

std::shared_ptr<Unit::Buffer> buffer_from(MemoryBudget& budget) {
  std::shared_ptr<Unit::Buffer> buffer = budget.try_take(size, 0);
  std::ranges::fill(buffer->bytes(), std::byte{'?'});
  return buffer;
}

/// A unit whose offsets count from its beginning, which keeps the tests' numbers small.
struct Bench {
  void absorb(std::uint64_t offset, std::string_view text, std::uint64_t moment = 1) {
    unit.absorb(begin + offset, as_text::parse(text), moment);
  }
  void wrote_through(std::uint64_t offset, std::string_view text) {
    unit.wrote_through(begin + offset, as_text::parse(text));
  }
  void learn(std::uint64_t offset, std::string_view text, Unit::Buffer* snapshot = nullptr) {
    unit.learn(begin + offset, as_text::parse(text), snapshot);
  }
  static ByteRange at(std::uint64_t from, std::uint64_t to) { return {begin + from, begin + to}; }
  void replace_buffer() { unit.replace_buffer(buffer_from(budget)); }
  /// Every other byte, so that there is a range for each.
  void absorb_apart(std::size_t count, std::uint64_t moment = 1) {
    for (std::uint64_t i = 0; i < count; ++i)
      absorb(2 * i, "x", moment);
  }

  [[nodiscard]] std::string content(std::uint64_t from, std::uint64_t to) const {
    return as_text::bytes(unit.bytes(at(from, to)));
  }
  [[nodiscard]] std::string content(const Unit::Buffer& buffer, std::uint64_t from,
                                    std::uint64_t to) const {
    return as_text::bytes(buffer.bytes().subspan(from, to - from));
  }
  [[nodiscard]] std::string dirty() const { return shifted(unit.dirty()); }
  [[nodiscard]] std::string in_flight() const { return shifted(unit.in_flight()); }
  [[nodiscard]] std::string known() const { return shifted(unit.known()); }

  MemoryBudget budget{16 * size};
  Unit unit{whole, buffer_from(budget), most_fragments};

private:
  static std::string shifted(const qcowcache::ByteRanges& ranges) {
    qcowcache::ByteRanges from_unit;
    for (const ByteRange& range : ranges)
      from_unit.add({range.begin - begin, range.end - begin});
    return as_text::ranges(from_unit);
  }
};

} // namespace

TEST_CASE("a new unit knows nothing and owes nothing", "[unit]") {
  const Bench bench;
  CHECK(bench.unit.range() == whole);
  CHECK(bench.unit.clean());
  CHECK(bench.known().empty());
  CHECK_FALSE(bench.unit.full(export_size));
  CHECK_FALSE(bench.unit.pinned());
  CHECK_FALSE(bench.unit.fragmented());
  CHECK_FALSE(bench.unit.owes(UINT64_MAX));
  CHECK(bench.unit.turn == Unit::Turn::none);
}

TEST_CASE("what a client wrote is dirty, known and readable", "[unit]") {
  Bench bench;
  bench.absorb(10, "hello");
  CHECK(bench.dirty() == "10-15");
  CHECK(bench.known() == "10-15");
  CHECK(bench.in_flight().empty());
  CHECK(bench.content(10, 15) == "hello");
  CHECK(bench.content(9, 16) == "?hello?");
  CHECK_FALSE(bench.unit.clean());
}

TEST_CASE("a unit is full when clients have written every byte of it that the export has",
          "[unit]") {
  Bench bench;
  CHECK_FALSE(bench.unit.full(begin)); // nobody wrote to it
  CHECK_FALSE(bench.unit.full(begin + 1));
  bench.absorb(0, std::string(100, 'a'));
  CHECK(bench.unit.full(begin + 99));
  CHECK(bench.unit.full(begin + 100));
  CHECK_FALSE(bench.unit.full(begin + 101));
  bench.absorb(100, std::string(size - 101, 'a'));
  CHECK_FALSE(bench.unit.full(export_size));
  bench.absorb(size - 1, "b");
  CHECK(bench.unit.full(export_size));
}

TEST_CASE("bytes that were read, zeroed or learned do not make a unit full", "[unit]") {
  Bench bench;
  bench.absorb(0, std::string(size / 2, 'a'));
  SECTION("read") {
    bench.learn(0, std::string(size, 'b'));
  }
  SECTION("known to be zeros") {
    bench.unit.learn_zeros(whole);
  }
  SECTION("zeroed") {
    bench.unit.zeroed(Bench::at(size / 2, size));
  }
  CHECK(bench.known() == "0-4096");
  CHECK_FALSE(bench.unit.full(export_size));
}

TEST_CASE("bytes written before a flush count towards being full after it", "[unit]") {
  Bench bench;
  bench.absorb(0, std::string(size / 2, 'a'));
  bench.unit.start_writing(everything);
  bench.unit.stored();
  bench.absorb(size / 2, std::string(size / 2, 'b'));
  CHECK(bench.unit.full(export_size));
}

TEST_CASE("a unit that begins anew has to be filled anew", "[unit]") {
  Bench bench;
  bench.absorb(0, std::string(size, 'a'));
  bench.unit.begin_anew();
  CHECK_FALSE(bench.unit.full(export_size));
  CHECK(bench.dirty() == "0-4096");
  CHECK(bench.known() == "0-4096");
  bench.absorb(0, std::string(size, 'b'));
  CHECK(bench.unit.full(export_size));
}

TEST_CASE("writing takes the dirty bytes into flight and pins the buffer", "[unit]") {
  Bench bench;
  bench.absorb(10, "hello", 5);
  bench.absorb(20, "world", 6);
  bench.unit.start_writing(everything);
  CHECK(bench.dirty().empty());
  CHECK(bench.in_flight() == "10-15 20-25");
  CHECK(bench.known() == "10-15 20-25");
  CHECK(bench.unit.pinned());
  CHECK_FALSE(bench.unit.clean());
  CHECK(bench.unit.owes(5));
  CHECK_FALSE(bench.unit.owes(4));
}

TEST_CASE("what is stored is clean and stays known", "[unit]") {
  Bench bench;
  bench.absorb(10, "hello", 5);
  bench.unit.was_refused = true;
  bench.unit.start_writing(everything);
  bench.unit.stored();
  CHECK(bench.unit.clean());
  CHECK_FALSE(bench.unit.pinned());
  CHECK_FALSE(bench.unit.was_refused);
  CHECK_FALSE(bench.unit.owes(UINT64_MAX));
  CHECK(bench.known() == "10-15");
  CHECK(bench.content(10, 15) == "hello");
}

TEST_CASE("what is refused is dirty again, as old as it was", "[unit]") {
  Bench bench;
  bench.absorb(10, "hello", 5);
  if (GENERATE(true, false)) // or the attempt ended before it began
    bench.unit.start_writing(everything);
  bench.unit.refused();
  CHECK(bench.dirty() == "10-15");
  CHECK(bench.in_flight().empty());
  CHECK_FALSE(bench.unit.pinned());
  CHECK(bench.unit.was_refused);
  CHECK(bench.unit.owes(5));
  CHECK_FALSE(bench.unit.owes(4));
  CHECK(bench.content(10, 15) == "hello");
}

TEST_CASE("what is refused joins what was written meanwhile, with the older moment", "[unit]") {
  Bench bench;
  bench.absorb(10, "hello", 5);
  bench.unit.start_writing(everything);
  bench.replace_buffer();
  bench.absorb(12, "LLOWS", 9);
  bench.absorb(30, "z", 10);
  CHECK(bench.unit.owes(5));
  bench.unit.refused();
  CHECK(bench.dirty() == "10-17 30-31");
  CHECK(bench.content(10, 17) == "heLLOWS");
  CHECK(bench.unit.owes(5));
  CHECK_FALSE(bench.unit.owes(4));
}

TEST_CASE("what was written while the rest was stored owes from its own moment on", "[unit]") {
  Bench bench;
  bench.absorb(10, "hello", 5);
  bench.unit.start_writing(everything);
  bench.replace_buffer();
  bench.absorb(30, "z", 9);
  bench.unit.stored();
  CHECK(bench.dirty() == "30-31");
  CHECK_FALSE(bench.unit.owes(8));
  CHECK(bench.unit.owes(9));
}

TEST_CASE("only what lies below the end of a connection's export is written", "[unit]") {
  Bench bench;
  bench.absorb(10, "hello", 5);
  bench.absorb(20, "world", 6);
  bench.unit.start_writing({0, begin + 22});
  CHECK(bench.in_flight() == "10-15 20-22");
  CHECK(bench.dirty() == "22-25");
  CHECK(bench.unit.owes(5));

  SECTION("stored, the rest is still owed") {
    bench.unit.stored();
    CHECK(bench.dirty() == "22-25");
    CHECK(bench.unit.owes(6));
  }
  SECTION("refused, all is as before") {
    bench.unit.refused();
    CHECK(bench.dirty() == "10-15 20-25");
    CHECK(bench.unit.owes(5));
    CHECK_FALSE(bench.unit.owes(4));
  }
}

TEST_CASE("a range of which only the middle is written comes back whole when refused", "[unit]") {
  Bench bench;
  bench.absorb(10, std::string(30, 'a'));
  bench.unit.start_writing(Bench::at(20, 30));
  CHECK(bench.in_flight() == "20-30");
  CHECK(bench.dirty() == "10-20 30-40");
  bench.unit.refused();
  CHECK(bench.dirty() == "10-40");
}

TEST_CASE("a second buffer takes new bytes while the first one stays as it is written", "[unit]") {
  Bench bench;
  bench.absorb(10, "hello");
  bench.learn(40, "storage");
  bench.unit.start_writing(everything);
  const std::shared_ptr<Unit::Buffer> first = bench.unit.buffer();
  bench.replace_buffer();
  CHECK_FALSE(bench.unit.pinned());
  CHECK(bench.unit.buffer() != first);
  CHECK(bench.content(10, 15) == "hello");
  CHECK(bench.content(40, 47) == "storage");

  bench.absorb(11, "EY!", 2);
  CHECK(bench.content(10, 15) == "hEY!o");
  CHECK(bench.content(*first, 10, 15) == "hello");
  CHECK(bench.in_flight() == "10-15");
  CHECK(bench.dirty() == "11-14");

  bench.unit.stored();
  CHECK(bench.dirty() == "11-14");
  CHECK(bench.content(10, 15) == "hEY!o");
  CHECK(bench.known() == "10-15 40-47");
}

TEST_CASE("the second buffer is written after the first, and what comes between is not lost",
          "[unit]") {
  Bench bench;
  bench.absorb(0, "one", 1);
  bench.unit.start_writing(everything);
  bench.replace_buffer();
  bench.absorb(1, "two", 2);
  bench.unit.stored();
  bench.unit.start_writing(everything);
  CHECK(bench.unit.pinned());
  CHECK(bench.in_flight() == "1-4");
  bench.replace_buffer();
  bench.absorb(2, "three", 3);
  bench.unit.refused();
  CHECK(bench.dirty() == "1-7");
  CHECK(bench.content(0, 7) == "otthree");
  CHECK(bench.unit.owes(2));
  CHECK_FALSE(bench.unit.owes(1));
}

TEST_CASE("a fill-up read completes what is not known and changes nothing else", "[unit]") {
  Bench bench;
  bench.absorb(2, "AB");
  const bool in_flight = GENERATE(false, true); // in the only buffer
  if (in_flight)
    bench.unit.start_writing(everything);
  bench.learn(0, "abcdef", in_flight ? bench.unit.buffer().get() : nullptr);
  CHECK(bench.content(0, 6) == "abABef");
  CHECK(bench.known() == "0-6");
  CHECK((in_flight ? bench.in_flight() : bench.dirty()) == "2-4");
}

TEST_CASE("a fill-up read completes both buffers, each around its own bytes", "[unit]") {
  Bench bench;
  bench.absorb(2, "AB", 1);
  bench.unit.start_writing(everything);
  const std::shared_ptr<Unit::Buffer> in_flight = bench.unit.buffer();
  bench.replace_buffer();
  bench.absorb(3, "XY", 2);
  bench.learn(0, "abcdef", in_flight.get());
  // What the client wrote since must not reach storage before its own turn.
  CHECK(bench.content(*in_flight, 0, 6) == "abABef");
  CHECK(bench.content(0, 6) == "abAXYf");
  CHECK(bench.known() == "0-6");
  CHECK(bench.dirty() == "3-5");
}

TEST_CASE("what storage read beyond the unit is left out", "[unit]") {
  Bench bench;
  const std::string around(size + 20, 's');
  bench.unit.learn(begin - 10, as_text::parse(around), nullptr);
  CHECK(bench.known() == "0-4096");
  CHECK(bench.content(0, size) == std::string(size, 's'));
}

TEST_CASE("zeros that storage reports complete what is not known", "[unit]") {
  Bench bench;
  bench.absorb(2, "AB");
  bench.unit.learn_zeros(Bench::at(0, 6));
  CHECK(bench.content(0, 6) == "00AB00");
  CHECK(bench.content(6, 7) == "?");
  CHECK(bench.known() == "0-6");
  CHECK(bench.dirty() == "2-4");
  bench.unit.learn_zeros(everything);
  CHECK(bench.known() == "0-4096");
}

TEST_CASE("a write that went through is known, written and no longer dirty", "[unit]") {
  Bench bench;
  bench.absorb(0, "hello");
  bench.wrote_through(2, "LLOWS");
  CHECK(bench.content(0, 7) == "heLLOWS");
  CHECK(bench.dirty() == "0-2");
  CHECK(bench.known() == "0-7");
  bench.wrote_through(0, std::string(size, 'z'));
  CHECK(bench.unit.clean());
  CHECK(bench.unit.full(export_size));
}

TEST_CASE("a zero that reaches beyond the unit changes its own part only", "[unit]") {
  Bench bench;
  bench.absorb(0, std::string(size, 'a'));
  SECTION("over all of it") {
    bench.unit.zeroed(everything);
    CHECK(bench.unit.clean());
    CHECK(bench.content(0, size) == std::string(size, '0'));
    CHECK(bench.unit.known().hull() == whole);
  }
  SECTION("over its end") {
    bench.unit.zeroed({begin + size - 1, begin + 5 * size});
    CHECK(bench.dirty() == "0-4095");
    CHECK(bench.content(size - 2, size) == "a0");
  }
  SECTION("beside it") {
    bench.unit.zeroed({begin + size, begin + 5 * size});
    CHECK(bench.dirty() == "0-4096");
    CHECK(bench.known() == "0-4096");
  }
}

TEST_CASE("what is discarded is neither owed nor known nor written", "[unit]") {
  Bench bench;
  bench.absorb(0, std::string(size, 'a'));
  bench.unit.discard(Bench::at(100, 200));
  CHECK(bench.dirty() == "0-100 200-4096");
  CHECK(bench.known() == "0-100 200-4096");
  CHECK_FALSE(bench.unit.full(export_size));
  bench.unit.discard(everything);
  CHECK(bench.unit.clean());
  CHECK(bench.known().empty());
}

TEST_CASE("what others changed is forgotten, but for what storage does not have", "[unit]") {
  Bench bench;
  bench.absorb(0, "in flight", 1);
  bench.unit.start_writing(everything);
  bench.replace_buffer();
  bench.absorb(20, "dirty", 2);
  bench.learn(30, "known");
  bench.learn(50, "elsewhere");
  bench.unit.forget(Bench::at(0, 40));
  CHECK(bench.known() == "0-9 20-25 50-59");
  CHECK(bench.in_flight() == "0-9");
  CHECK(bench.dirty() == "20-25");
  CHECK(bench.content(20, 25) == "dirty");
  bench.unit.forget(everything);
  CHECK(bench.known() == "0-9 20-25");
}

TEST_CASE("a unit is fragmented when one of its sets has as many ranges as allowed", "[unit]") {
  Bench bench;
  SECTION("all but one") {
    bench.absorb_apart(most_fragments - 1);
    CHECK_FALSE(bench.unit.fragmented());
    bench.absorb(100, "x");
    CHECK(bench.unit.fragmented());
  }
  SECTION("dirty") {
    bench.absorb_apart(most_fragments);
    bench.unit.learn_zeros(whole);
    bench.unit.begin_anew();
    CHECK(bench.unit.known().count() == 1);
    CHECK(bench.unit.fragmented());
  }
  SECTION("known") {
    for (std::uint64_t i = 0; i + 1 < most_fragments; ++i)
      bench.learn(2 * i, "x");
    CHECK_FALSE(bench.unit.fragmented());
    bench.learn(100, "x");
    CHECK(bench.unit.fragmented());
  }
  SECTION("in flight") {
    bench.absorb_apart(most_fragments);
    bench.unit.start_writing(everything);
    bench.unit.learn_zeros(whole);
    bench.unit.begin_anew();
    CHECK(bench.unit.dirty().empty());
    CHECK(bench.unit.known().count() == 1);
    CHECK(bench.unit.fragmented());
  }
  SECTION("written") {
    bench.absorb_apart(most_fragments);
    bench.unit.start_writing(everything);
    bench.unit.stored();
    bench.unit.learn_zeros(whole);
    CHECK(bench.unit.known().count() == 1);
    CHECK(bench.unit.fragmented());
    bench.unit.begin_anew();
    CHECK_FALSE(bench.unit.fragmented());
  }
}

TEST_CASE("a fragmented unit gets no more ranges, and keeps the bytes right", "[unit]") {
  Bench bench;
  bench.absorb_apart(most_fragments);
  const std::string ranges = "0-1 2-3 4-5 6-7 8-9 10-11 12-13 14-15";
  REQUIRE(bench.unit.fragmented());
  REQUIRE(bench.dirty() == ranges);

  SECTION("a write that went through replaces what is known, which is written once more") {
    bench.wrote_through(0, "abcd");
    CHECK(bench.content(0, 6) == "a?c?x?");
    CHECK(bench.dirty() == ranges);
    CHECK(bench.known() == ranges);
  }
  SECTION("a zero that went through does the same") {
    bench.unit.zeroed(Bench::at(1, 7));
    CHECK(bench.content(0, 10) == "x?0?0?0?x?");
    CHECK(bench.dirty() == ranges);
    CHECK(bench.known() == ranges);
  }
  SECTION("a part that is discarded goes") {
    bench.unit.discard(Bench::at(0, 4));
    CHECK(bench.dirty() == "4-5 6-7 8-9 10-11 12-13 14-15");
    CHECK(bench.known() == bench.dirty());
  }
  SECTION("discarded as a whole, it is empty") {
    bench.unit.discard(whole);
    CHECK(bench.unit.clean());
    CHECK(bench.known().empty());
    CHECK_FALSE(bench.unit.fragmented());
  }
  SECTION("what others changed somewhere, it forgets everywhere") {
    bench.unit.start_writing(everything);
    bench.unit.stored();
    bench.unit.forget(Bench::at(0, 1));
    CHECK(bench.known().empty());
  }
}

TEST_CASE("as many ranges as allowed survive being refused beside as many new ones", "[unit]") {
  Bench bench;
  bench.absorb_apart(most_fragments - 1, 1);
  bench.unit.start_writing(everything);
  bench.replace_buffer();
  for (std::uint64_t i = 0; i < most_fragments; ++i)
    bench.absorb(1000 + 2 * i, "y", 2);
  bench.unit.refused();
  CHECK(bench.unit.dirty().count() == 2 * most_fragments - 1);
  CHECK(bench.content(0, 3) == "x?x");
  CHECK(bench.content(1000, 1003) == "y?y");
  CHECK(bench.unit.owes(1));
}
