#include "verify/qcow2/table_follower.hpp"

#include "catch.hpp"

#include <algorithm>
#include <chrono>
#include <memory_resource>
#include <vector>

using namespace qcowcache;
using namespace qcowcache::qcow2;

namespace {

constexpr std::uint64_t cluster = 4096;
constexpr std::uint32_t entries = 512;
constexpr std::uint64_t l1_at = 3 * cluster;
constexpr std::uint64_t copied = std::uint64_t{1} << 63U;

std::uint64_t stream(std::uint64_t number) {
  return std::uint64_t{1} << 62U | ((std::uint64_t{1} << 30U) + number * 777);
}

std::vector<std::byte> bytes_of(const std::vector<std::uint64_t>& numbers) {
  std::vector<std::byte> bytes;
  for (const std::uint64_t number : numbers) {
    for (unsigned shift = 64; shift > 0; shift -= 8)
      bytes.push_back(static_cast<std::byte>(number >> (shift - 8) & 0xffU));
  }
  return bytes;
}

/// A table with these entries at its begin.
std::vector<std::byte> table_of(std::vector<std::uint64_t> numbers) {
  numbers.resize(entries);
  return bytes_of(numbers);
}

Header image_header(std::uint32_t l1_entries = 4, std::uint64_t at = l1_at) {
  Header header;
  header.version = 3;
  header.cluster_bits = 12;
  header.l1 = {at, l1_entries};
  return header;
}

struct Bench {
  explicit Bench(std::pmr::memory_resource* memory = std::pmr::new_delete_resource())
      : follower(memory) {}

  /// An image with these L1 entries, which count as checked.
  Bench& open(const std::vector<std::uint64_t>& l1) {
    follower.set_header(image_header());
    follower.l1_entries(0, bytes_of(l1), true);
    follower.begin_reading_l1();
    follower.end_reading_l1();
    return *this;
  }
  void read_l1(const std::vector<std::uint64_t>& l1) {
    follower.begin_reading_l1();
    follower.l1_entries(0, bytes_of(l1), false);
    follower.end_reading_l1();
  }
  [[nodiscard]] std::vector<std::uint64_t> unchecked() const {
    std::vector<std::uint64_t> found;
    for (auto next = follower.unchecked_from(0, 0); next;
         next = follower.unchecked_from(next->l1_index, next->l2_index + 1))
      found.push_back(next->value);
    return found;
  }
  void check_all() {
    while (const auto next = follower.unchecked_from(0, 0))
      follower.checked(*next);
  }

  TableFollower follower;
};

using Values = std::vector<std::uint64_t>;

} // namespace

TEST_CASE("many tables that move at once are known where they are", "[table_follower]") {
  Bench bench;
  constexpr std::uint32_t many = 1000;
  bench.follower.set_header(image_header(many));
  Values l1(many);
  const auto move = [&](std::uint32_t first, std::uint32_t count, std::uint64_t seed) {
    for (std::uint32_t i = first; i < first + count; ++i)
      l1[i] = i % 7 == seed % 7 ? 0 : (100 + (i * 7919 + seed * 31) % 900) * cluster;
    bench.follower.wrote(l1_at + first * 8,
                         bytes_of(Values(l1.begin() + first, l1.begin() + first + count)));
  };
  const auto all_known = [&] {
    for (std::uint64_t at = 99; at < 1002; ++at) {
      const bool expected = std::ranges::find(l1, at * cluster) != l1.end();
      if (bench.follower.is_table({at * cluster + 8, at * cluster + 16}) != expected)
        return false;
    }
    return true;
  };
  bench.read_l1(l1);
  move(0, many, 1);
  CHECK(all_known());
  move(300, 300, 2);
  CHECK(all_known());
  move(500, 3, 3);
  CHECK(all_known());
  bench.follower.set_header(image_header(many / 2));
  l1.resize(many / 2);
  bench.read_l1(l1);
  CHECK(all_known());
  bench.follower.lose();
  bench.follower.begin_looking_at_everything();
  for (std::uint32_t i = 0; i < l1.size(); ++i) {
    if (l1[i] != 0)
      bench.follower.looked_at_table(i, l1[i]);
  }
  bench.follower.follow_again();
  CHECK_FALSE(bench.follower.lost());
  CHECK(all_known());
}

TEST_CASE("a million tables that move do not take minutes", "[table_follower]") {
  Bench bench;
  constexpr std::uint32_t many = 1000000;
  bench.follower.set_header(image_header(many));
  Values l1(many);
  for (std::uint32_t i = 0; i < many; ++i)
    l1[i] = (many - i + 10) * cluster;
  const auto bytes = bytes_of(l1);
  const auto begin = std::chrono::steady_clock::now();
  bench.follower.begin_reading_l1();
  bench.follower.l1_entries(0, bytes, true);
  bench.follower.end_reading_l1();
  bench.follower.lose();
  bench.follower.begin_looking_at_everything();
  for (std::uint32_t i = 0; i < many; ++i)
    bench.follower.looked_at_table(i, l1[i]);
  bench.follower.follow_again();
  CHECK(bench.follower.is_table({20 * cluster, 20 * cluster + 8}));
  bench.follower.set_header(image_header(1));
  bench.follower.begin_reading_l1();
  bench.follower.end_reading_l1();
  CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(30));
}

TEST_CASE("without a header there is nothing to do", "[table_follower]") {
  Bench bench;
  bench.follower.wrote(0, table_of({stream(1)}));
  bench.follower.zeroed({0, 100});
  bench.follower.changed({0, 100});
  CHECK_FALSE(bench.follower.has_work());
  CHECK_FALSE(bench.follower.is_table({0, cluster}));
}

TEST_CASE("what an image has when it is opened is not new", "[table_follower]") {
  Bench bench;
  bench.open({copied | 8 * cluster, 0, 9 * cluster});
  CHECK_FALSE(bench.follower.has_work());
  CHECK(bench.follower.is_table({l1_at, l1_at + 1}));
  CHECK(bench.follower.is_table({9 * cluster - 1, 9 * cluster + 1}));
  CHECK_FALSE(bench.follower.is_table({10 * cluster, 11 * cluster}));
}

TEST_CASE("a table is read before it changes, and its old entries are not new",
          "[table_follower]") {
  Bench bench;
  bench.open({8 * cluster});
  REQUIRE(bench.follower.unread_in({8 * cluster + 16, 8 * cluster + 24}) == 0U);
  CHECK_FALSE(bench.follower.unread_in({9 * cluster, 10 * cluster}));
  bench.follower.load_checked(0, table_of({stream(1), stream(2), 0, stream(4)}));
  CHECK_FALSE(bench.follower.unread_in({8 * cluster, 9 * cluster}));
  CHECK_FALSE(bench.follower.has_work());
  bench.follower.wrote(8 * cluster + 8, bytes_of({stream(2), stream(3), copied | 20 * cluster}));
  CHECK(bench.unchecked() == Values{stream(3)});
  bench.check_all();
  CHECK_FALSE(bench.follower.has_work());
  bench.follower.wrote(8 * cluster, table_of({stream(1), stream(2), stream(3)}));
  CHECK_FALSE(bench.follower.has_work());
}

TEST_CASE("without its old content all of a table is new", "[table_follower]") {
  Bench bench;
  bench.open({8 * cluster});
  bench.follower.wrote(8 * cluster + 8, bytes_of({stream(3)}));
  REQUIRE(bench.follower.stale_from(0) == 0U);
  CHECK_FALSE(bench.follower.stale_from(1));
  bench.follower.begin_reading(0);
  CHECK(bench.follower.load(0, table_of({stream(1), stream(3)})));
  CHECK(bench.unchecked() == Values{stream(1), stream(3)});
}

TEST_CASE("a new table that was written with zeros is known without being read",
          "[table_follower]") {
  Bench bench;
  bench.open({});
  bench.follower.wrote(8 * cluster, std::vector<std::byte>(cluster));
  bench.follower.wrote(l1_at + 8, bytes_of({copied | 8 * cluster}));
  CHECK_FALSE(bench.follower.has_work());
  CHECK_FALSE(bench.follower.unread_in({8 * cluster, 9 * cluster}));
  bench.follower.wrote(8 * cluster, table_of({stream(7), stream(8)}));
  CHECK(bench.unchecked() == Values{stream(7), stream(8)});
  CHECK(bench.follower.unchecked_from(0, 0)->l1_index == 1);
}

TEST_CASE("another new table has to be read", "[table_follower]") {
  Bench bench;
  bench.open({});
  bench.follower.wrote(8 * cluster, std::vector<std::byte>(cluster));
  bench.follower.wrote(8 * cluster + 80, bytes_of({stream(1)}));
  bench.follower.wrote(l1_at, bytes_of({8 * cluster}));
  REQUIRE(bench.follower.stale_from(0) == 0U);
  CHECK(bench.follower.table_offset(0) == 8 * cluster);
}

TEST_CASE("a copy of a table, as after a snapshot, brings only what differs", "[table_follower]") {
  Bench bench;
  bench.open({8 * cluster});
  const bool in_memory = GENERATE(true, false);
  if (in_memory)
    bench.follower.load_checked(0, table_of({stream(1), stream(2)}));
  bench.follower.wrote(l1_at, bytes_of({copied | 9 * cluster}));
  REQUIRE(bench.follower.stale_from(0) == 0U);
  if (in_memory) {
    CHECK_FALSE(bench.follower.replaced(0));
  } else {
    REQUIRE(bench.follower.replaced(0) == 8 * cluster);
    bench.follower.load_checked(0, table_of({stream(1), stream(2)}));
  }
  CHECK(bench.follower.stale_from(0) == 0U);
  bench.follower.begin_reading(0);
  CHECK(bench.follower.load(0, table_of({stream(1), stream(2), stream(3)})));
  CHECK(bench.unchecked() == Values{stream(3)});
  CHECK_FALSE(bench.follower.is_table({8 * cluster, 9 * cluster}));
}

TEST_CASE("a replaced table that has changed since says nothing of what is old",
          "[table_follower]") {
  Bench bench;
  bench.open({8 * cluster});
  bench.follower.wrote(l1_at, bytes_of({9 * cluster}));
  const ByteRange entry{8 * cluster + 16, 8 * cluster + 24};
  switch (GENERATE(0, 1, 2)) {
  case 0:
    bench.follower.wrote(entry.begin, bytes_of({stream(1)}));
    break;
  case 1:
    bench.follower.zeroed(entry);
    break;
  default:
    bench.follower.changed(entry);
    break;
  }
  // It may come back, too, as when a snapshot is applied.
  if (GENERATE(true, false))
    bench.follower.wrote(l1_at, bytes_of({8 * cluster}));
  CHECK_FALSE(bench.follower.replaced(0));
  REQUIRE(bench.follower.stale_from(0) == 0U);
  bench.follower.begin_reading(0);
  CHECK(bench.follower.load(0, table_of({0, 0, stream(1)})));
  CHECK(bench.unchecked() == Values{stream(1)});
}

TEST_CASE("what changes elsewhere leaves replaced tables what they were", "[table_follower]") {
  Bench bench;
  bench.open({8 * cluster, 11 * cluster});
  bench.follower.wrote(l1_at, bytes_of({9 * cluster, 12 * cluster}));
  bench.follower.changed({9 * cluster, 11 * cluster});
  CHECK(bench.follower.replaced(0) == 8 * cluster);
  bench.follower.changed({12 * cluster - 1, 12 * cluster});
  CHECK(bench.follower.replaced(0) == 8 * cluster);
  CHECK_FALSE(bench.follower.replaced(1));
}

TEST_CASE("odd writes, and unknown ones, have a table read again", "[table_follower]") {
  Bench bench;
  bench.open({8 * cluster});
  bench.follower.load_checked(0, table_of({stream(1)}));
  switch (GENERATE(0, 1, 2)) {
  case 0:
    bench.follower.wrote(8 * cluster + 3, std::vector<std::byte>(8, std::byte{1}));
    break;
  case 1:
    bench.follower.changed({8 * cluster + 64, 8 * cluster + 65});
    break;
  default:
    bench.follower.zeroed({8 * cluster + 4, 8 * cluster + 5});
    break;
  }
  REQUIRE(bench.follower.stale_from(0) == 0U);
  bench.follower.begin_reading(0);
  CHECK(bench.follower.load(0, table_of({stream(1), stream(5)})));
  CHECK(bench.unchecked() == Values{stream(5)});
}

TEST_CASE("a table that changes while it is read is read once more", "[table_follower]") {
  Bench bench;
  bench.open({8 * cluster});
  bench.follower.changed({8 * cluster, 8 * cluster + 1});
  bench.follower.begin_reading(0);
  bench.follower.wrote(8 * cluster, bytes_of({stream(9)}));
  CHECK(bench.follower.load(0, table_of({})));
  CHECK(bench.follower.stale_from(0) == 0U);
  bench.follower.begin_reading(0);
  CHECK(bench.follower.load(0, table_of({stream(9)})));
  CHECK_FALSE(bench.follower.stale_from(0));
  CHECK(bench.unchecked() == Values{stream(9)});
}

TEST_CASE("zeros over entries, tables and the L1 table take clusters away", "[table_follower]") {
  Bench bench;
  bench.open({8 * cluster, 9 * cluster});
  bench.follower.load_checked(0, table_of({}));
  bench.follower.load_checked(1, table_of({}));
  bench.follower.wrote(8 * cluster, bytes_of({stream(1), stream(2)}));
  bench.follower.wrote(9 * cluster, bytes_of({stream(3)}));
  bench.follower.zeroed({8 * cluster, 8 * cluster + 8});
  CHECK(bench.unchecked() == Values{stream(2), stream(3)});
  bench.follower.zeroed({l1_at + 8, l1_at + 16});
  REQUIRE(bench.follower.l1_is_stale());
  bench.read_l1({8 * cluster, 0});
  CHECK(bench.unchecked() == Values{stream(2)});
}

TEST_CASE("what was checked is checked only as long as it is the same", "[table_follower]") {
  Bench bench;
  bench.open({8 * cluster});
  bench.follower.load_checked(0, table_of({}));
  bench.follower.wrote(8 * cluster, bytes_of({stream(1)}));
  const auto first = bench.follower.unchecked_from(0, 0);
  REQUIRE(first);
  bench.follower.wrote(8 * cluster, bytes_of({stream(2)}));
  bench.follower.checked(*first);
  CHECK(bench.unchecked() == Values{stream(2)});
  bench.check_all();
  bench.follower.wrote(8 * cluster, bytes_of({stream(1)}));
  CHECK(bench.unchecked() == Values{stream(1)});
}

TEST_CASE("a larger L1 table elsewhere has the tables of the old one", "[table_follower]") {
  Bench bench;
  bench.open({8 * cluster});
  bench.follower.set_header(image_header(1024, 20 * cluster));
  REQUIRE(bench.follower.l1_is_stale());
  Values l1(1024);
  l1[0] = 8 * cluster;
  l1[1000] = 9 * cluster;
  bench.read_l1(l1);
  CHECK_FALSE(bench.follower.l1_is_stale());
  CHECK(bench.follower.stale_from(0) == 1000U);
  CHECK(bench.follower.is_table({20 * cluster, 20 * cluster + 1}));
  CHECK_FALSE(bench.follower.is_table({l1_at, l1_at + 1}));
}

TEST_CASE("in another image all is new", "[table_follower]") {
  Bench bench;
  bench.open({8 * cluster});
  Header other = image_header();
  other.compression = Compression::zstd;
  bench.follower.set_header(other);
  REQUIRE(bench.follower.l1_is_stale());
  bench.read_l1({8 * cluster});
  CHECK(bench.follower.stale_from(0) == 0U);
}

TEST_CASE("extended entries are 16 bytes", "[table_follower]") {
  Bench bench;
  Header header = image_header();
  header.cluster_bits = 14;
  header.extended_l2 = true;
  header.l1 = {3U << 14U, 4};
  bench.follower.set_header(header);
  bench.follower.l1_entries(0, bytes_of({8U << 14U}), true);
  bench.follower.begin_reading_l1();
  bench.follower.end_reading_l1();
  bench.follower.load_checked(0, std::vector<std::byte>(1U << 14U));
  bench.follower.wrote((8U << 14U) + 32, bytes_of({stream(1), 0, 0, stream(9)}));
  CHECK(bench.unchecked() == Values{stream(1)}); // a bitmap is no entry
  CHECK(bench.follower.unchecked_from(0, 0)->l2_index == 2);
  bench.follower.wrote((8U << 14U) + 8, bytes_of({stream(9)}));
  CHECK(bench.follower.stale_from(0) == 0U);
}

TEST_CASE("without memory every table has to be looked at", "[table_follower]") {
  Bench bench(std::pmr::null_memory_resource());
  bench.open({8 * cluster});
  CHECK(bench.follower.lost());
  CHECK(bench.follower.has_work());
  bench.follower.begin_looking_at_everything();
  CHECK_FALSE(bench.follower.has_work());
  bench.follower.wrote(100 * cluster, bytes_of({stream(1)}));
  CHECK(bench.follower.has_work());
  bench.follower.clear();
  CHECK_FALSE(bench.follower.lost());
}

TEST_CASE("others are asked for room, and told how much", "[table_follower]") {
  std::vector<std::size_t> asked;
  TableFollower follower(std::pmr::null_memory_resource(), [&](std::size_t bytes) {
    asked.push_back(bytes);
    return asked.size() < 3; // then they have nothing left to give
  });
  follower.set_header(image_header());
  follower.l1_entries(0, bytes_of({8 * cluster}), true);
  CHECK(follower.lost());
  REQUIRE(asked.size() == 3);
  CHECK(asked.front() >= 4 * sizeof(std::uint64_t));
  CHECK(asked.front() <= 4 * 24);
}

TEST_CASE("tables that are checked make room for others", "[table_follower]") {
  // Room for about two copies of a table beside the rest.
  class Counted final : public std::pmr::memory_resource {
  public:
    std::size_t left = 2 * (cluster + 64) + 2000;

  private:
    void* do_allocate(std::size_t bytes, std::size_t alignment) override {
      if (bytes > left)
        throw std::bad_alloc();
      left -= bytes;
      return std::pmr::new_delete_resource()->allocate(bytes, alignment);
    }
    void do_deallocate(void* memory, std::size_t bytes, std::size_t alignment) override {
      left += bytes;
      std::pmr::new_delete_resource()->deallocate(memory, bytes, alignment);
    }
    [[nodiscard]] bool do_is_equal(const memory_resource& other) const noexcept override {
      return this == &other;
    }
  } memory;
  Bench bench(&memory);
  bench.open({8 * cluster, 9 * cluster, 10 * cluster, 11 * cluster});
  for (std::uint32_t index = 0; index < 4; ++index) {
    bench.follower.load_checked(index, table_of({stream(index)}));
    const std::uint64_t at = (8 + index) * cluster;
    bench.follower.wrote(at, bytes_of({stream(index), stream(100 + index)}));
    CHECK(bench.unchecked() == Values{stream(100 + index)});
    bench.check_all();
  }
  CHECK(bench.follower.unread_in({8 * cluster, 12 * cluster}));

  // More that is unchecked than fits: it is looked at entry by entry, without a copy.
  for (std::uint32_t index = 0; index < 4; ++index)
    bench.follower.wrote((8 + index) * cluster, table_of({stream(200 + index)}));
  unsigned without_copy = 0;
  for (auto index = bench.follower.stale_from(0); index;
       index = bench.follower.stale_from(*index + 1)) {
    bench.follower.begin_reading(*index);
    if (!bench.follower.load(*index, table_of({stream(200 + *index)}))) {
      ++without_copy;
      bench.follower.looked_at_all(*index, true);
    }
  }
  CHECK(without_copy > 0);
  bench.check_all();
  CHECK_FALSE(bench.follower.has_work());
}
