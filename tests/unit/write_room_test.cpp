// The part of WriteCache in write_room.cpp.

#include "cache/write_cache.hpp"
#include "catch.hpp"
#include "error_of.hpp"
#include "gate.hpp"
#include "image_bytes.hpp"
#include "memory_storage.hpp"
#include "serving.hpp"
#include "watched_thread.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <latch>
#include <memory>
#include <optional>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

using namespace qcowcache;
using Kind = MemoryStorage::Kind;

namespace {

constexpr std::uint64_t unit = WriteCache::least_unit_size;
constexpr std::uint64_t window = 16 * unit;
constexpr std::uint64_t disk_size = 4 * window;

/// A cache that reserves, without background writers.
struct Bench {
  explicit Bench(const Capabilities& capabilities = MemoryStorage::everything(disk_size),
                 std::uint64_t reserve = window,
                 std::chrono::milliseconds retry = WriteCache::Settings().retry,
                 std::chrono::milliseconds patience = WriteCache::Settings().patience)
      : budget(std::size_t{64} * 1024 * 1024), storage(capabilities) {
    WriteCache::Settings settings;
    settings.cluster_size = unit;
    settings.reserve = reserve;
    settings.retry = retry;
    settings.patience = patience;
    cache = std::make_shared<WriteCache>(std::move(settings), capabilities, ranges, budget);
    budget.add_holder(cache);
  }

  /// Storage's or the cache's answer.
  int write(std::uint64_t offset, std::span<const std::byte> data, bool fua = false) {
    return error_of([&] { cache->write(storage, offset, data, fua); });
  }
  [[nodiscard]] std::vector<std::byte> on_disk(std::uint64_t offset, std::size_t size) const {
    return storage.disk().read(offset, size);
  }
  /// Bytes that storage has allocated.
  [[nodiscard]] std::uint64_t allocated() const { return storage.disk().allocated().bytes(); }
  [[nodiscard]] std::uint64_t counted(Count what) const {
    return cache->counters()->totals()[what];
  }

  RangeLock ranges;
  MemoryBudget budget;
  MemoryStorage storage;
  std::shared_ptr<WriteCache> cache;
};

} // namespace

TEST_CASE("a window has room before the first write to it is acknowledged", "[write_room]") {
  Bench bench;
  CHECK(bench.write(3 * unit + 100, pattern(100, 1)) == 0);
  CHECK(bench.storage.disk().allocated() == ByteRanges({0, window}));
  CHECK(bench.storage.calls(Kind::write).empty());
  const std::size_t calls = bench.storage.calls().size();
  for (std::uint64_t i = 0; i < 16; ++i)
    CHECK(bench.write(i * unit + 300, pattern(100, 2)) == 0);
  CHECK(bench.storage.calls().size() == calls);
  CHECK(bench.write(2 * window - 5, pattern(1000, 3)) == 0); // this one, and that behind it
  CHECK(bench.storage.disk().allocated() == ByteRanges({0, 3 * window}));
  CHECK(bench.counted(Count::reservations) == 3);
  CHECK(bench.counted(Count::reserved_bytes) == 3 * window);
  bench.cache->flush(bench.storage);
  CHECK(bench.storage.calls(Kind::read).empty()); // it is all zeros
  CHECK(bench.on_disk(2 * window - 5, 1000) == pattern(1000, 3));
  CHECK(bench.storage.violations().empty());
}

TEST_CASE("only holes are reserved, and what is there stays", "[write_room]") {
  Bench bench;
  const auto old = pattern(3 * unit, 1);
  bench.storage.write(unit, old, false);
  bench.storage.forget_calls();
  SECTION("some") {
    CHECK(bench.write(2 * unit, pattern(100, 2)) == 0);
    CHECK(bench.storage.disk().allocated() == ByteRanges({0, window}));
    CHECK(bench.counted(Count::reserved_bytes) == window - 3 * unit);
  }
  SECTION("very many") {
    for (std::uint64_t block = 0; block < 200; block += 2)
      bench.storage.write(5 * unit + block * 4096, pattern(4096, 3), false);
    CHECK(bench.write(4 * unit, pattern(100, 2)) == 0);
    CHECK(bench.counted(Count::reserved_bytes) == unit);
  }
  SECTION("none") {
    bench.storage.write(0, pattern(window, 4), false);
    bench.storage.forget_calls();
    CHECK(bench.write(4 * unit, pattern(100, 2)) == 0);
    CHECK(bench.storage.calls(Kind::zero).empty());
    CHECK(bench.counted(Count::reservations) == 0);
    return;
  }
  CHECK(bench.on_disk(unit, 3 * unit) == old);
}

TEST_CASE("on storage that is nearly full each write that fits is taken, and no other",
          "[write_room]") {
  // From nothing to a window and more, in steps that are no multiples of a unit.
  const std::uint64_t room = GENERATE(range(std::uint64_t{0}, window + 3 * unit, 13 * unit / 8));
  Bench bench;
  bench.storage.disk().room = align_down(room, 4096);
  const bool in_order = GENERATE(true, false);
  std::vector<std::uint64_t> taken;
  bool refused = false;
  for (std::uint64_t i = 0; i < 20; ++i) {
    const std::uint64_t offset = (in_order ? i : i * 7 % 20) * unit;
    const int answer = bench.write(offset, pattern(unit, static_cast<unsigned>(i)));
    if (answer == 0)
      taken.push_back(i);
    else
      CHECK(answer == ENOSPC);
    refused = refused || answer != 0;
  }
  CHECK(refused);
  CHECK(taken.size() == room / unit);
  bench.cache->flush(bench.storage); // for which there is room
  for (const std::uint64_t i : taken)
    CHECK(bench.on_disk((in_order ? i : i * 7 % 20) * unit, unit) ==
          pattern(unit, static_cast<unsigned>(i)));
  CHECK(bench.cache->clean());
}

TEST_CASE("small writes fill what room there is", "[write_room]") {
  Bench bench;
  bench.storage.disk().room = unit + 3 * 4096;
  int answer = 0;
  std::uint64_t end = 0;
  for (; answer == 0; end += 1000)
    answer = bench.write(end, pattern(1000, static_cast<unsigned>(end)));
  CHECK(answer == ENOSPC);
  CHECK(end - 1000 > unit + 2 * 4096);
  bench.cache->flush(bench.storage);
  for (std::uint64_t at = 0; at + 1000 < end; at += 1000)
    CHECK(bench.on_disk(at, 1000) == pattern(1000, static_cast<unsigned>(at)));
  // As soon as there is more, it is used again.
  bench.storage.disk().room = UINT64_MAX;
  CHECK(bench.write(end, pattern(1000, 1)) == 0);
  CHECK_FALSE(bench.cache->clean());
}

TEST_CASE("storage that cannot reserve is not asked again", "[write_room]") {
  Capabilities capabilities = MemoryStorage::everything(disk_size);
  const unsigned reason = GENERATE(range(0U, 7U));
  capabilities.can_zero = reason != 0;
  capabilities.can_extents = reason != 1;
  capabilities.maximum = reason == 2 ? 65536 : UINT32_MAX;
  capabilities.can_fast_zero = reason % 2 == 0;
  Bench bench(capabilities);
  bench.storage.zeros_are_data = reason == 3;
  const std::vector<int> errors{ENOTSUP, EIO, EPERM};
  if (reason > 3)
    bench.storage.before = MemoryStorage::refusal(Kind::zero, errors.at(reason - 4));
  for (std::uint64_t i = 0; i < 20; ++i)
    CHECK(bench.write(i * 3 * unit, pattern(100, 1)) == 0);
  CHECK(bench.storage.calls(Kind::zero).size() == (reason < 3 ? 0 : 1));
  CHECK(bench.allocated() == (reason == 3 ? Room::beginning : 0)); // no more than a try
  CHECK(bench.storage.calls(Kind::write).empty());
  CHECK(bench.counted(Count::reservations) == 0);
  CHECK(bench.storage.violations().empty());
}

TEST_CASE("storage that could not be asked is asked again", "[write_room]") {
  Bench bench(MemoryStorage::everything(disk_size), window, std::chrono::milliseconds(0));
  const Kind kind = GENERATE(Kind::zero, Kind::extents);
  bench.storage.before = [&, refuses = true](const MemoryStorage::Call& call) mutable {
    if (call.kind == kind && std::exchange(refuses, false))
      throw std::system_error(EIO, std::generic_category(), "refused");
  };
  CHECK(bench.write(unit, pattern(100, 1)) == 0);
  CHECK(bench.write(5 * unit, pattern(100, 2)) == 0);
  CHECK(bench.allocated() == window);
  CHECK(bench.storage.calls(Kind::write).empty());
}

TEST_CASE("storage has room only where it has spoken of", "[write_room]") {
  // It takes, and speaks of, no more than so much at a time.
  Capabilities capabilities = MemoryStorage::everything(96 * Room::beginning);
  capabilities.maximum = Room::beginning;
  Bench bench(capabilities, 128 * Room::beginning);
  CHECK(bench.write(2 * Room::beginning, pattern(100, 1)) == 0);
  const std::uint64_t first = bench.allocated();
  CHECK(first >= 32 * Room::beginning);
  CHECK(first < 96 * Room::beginning);
  CHECK(bench.write(95 * Room::beginning, pattern(100, 1)) == 0);
  CHECK(bench.storage.disk().allocated().contains(
      {95 * Room::beginning, 95 * Room::beginning + unit}));
  CHECK(bench.storage.violations().empty());
}

TEST_CASE("an image's beginning has room before its header is written", "[write_room]") {
  constexpr std::uint64_t large = 4 * Room::beginning;
  Serving serving(std::size_t{64} * 1024 * 1024, 0, WriteCache::Settings().retry, nullptr, large);
  const auto disk = std::make_shared<MemoryDisk>(2 * large);
  std::optional<std::uint64_t> before_header;
  Client client(serving, "a", disk, [&](const MemoryStorage::Call& call) {
    if (call.kind == Kind::write && call.range.begin == 0 && !before_header)
      before_header = disk->allocated().bytes();
  });
  client.write(0, qcow2_header(16));
  CHECK(before_header == Room::beginning);
  client.write(3 * unit, pattern(100, 1));
  CHECK(disk->allocated().bytes() == Room::beginning);
  client.write(Room::beginning, pattern(100, 2));
  CHECK(disk->allocated().bytes() == large);
  // In one request, so that it is in one piece.
  CHECK(client.storage().calls(Kind::zero).back().range == ByteRange{Room::beginning, large});
}

TEST_CASE("where storage has no room what is in memory keeps its own", "[write_room]") {
  Bench bench;
  CHECK(bench.write(unit, pattern(unit / 2, 1)) == 0);
  bench.cache->trim(bench.storage, {8 * unit, 16 * unit}, false);
  bench.storage.disk().room = 10 * unit;
  // Others may have trimmed it, for all the cache knows.
  bench.cache->forget({unit, 2 * unit});
  for (std::uint64_t i = 8; i < 16; ++i)
    std::ignore = bench.write(i * unit, pattern(100, 2));
  CHECK(bench.storage.disk().allocated().contains({unit, 2 * unit}));
}

TEST_CASE("what others write where room was reserved is no hole any more", "[write_room]") {
  Bench bench;
  CHECK(bench.write(unit, pattern(100, 1)) == 0);
  const bool gives_up = GENERATE(false, true);
  if (gives_up) {
    bench.storage.before = [&](const MemoryStorage::Call& call) {
      if (call.kind == Kind::zero && !call.may_trim)
        throw std::system_error(ENOTSUP, std::generic_category(), "refused");
    };
    CHECK(bench.write(window, pattern(100, 2)) == 0);
  }
  const ByteRange others{8 * unit, 9 * unit};
  bench.storage.disk().write(others.begin, pattern(unit, 3), true);
  bench.cache->forget(others);
  for (const Storage::Extent& extent : bench.cache->extents(bench.storage, others, false))
    CHECK(extent.type == Storage::ExtentType::data);
  // Storage may not show it.
  bench.storage.disk().write(others.begin, std::vector<std::byte>(unit), true);
  bench.cache->flush(bench.storage);
  bench.cache->give_back_room(bench.storage);
  CHECK(bench.storage.disk().allocated().contains(others));
  CHECK_FALSE(bench.storage.disk().allocated().contains({9 * unit, 10 * unit}));
}

TEST_CASE("what a client zeros while room is given back keeps it", "[write_room]") {
  Bench bench;
  CHECK(bench.write(6 * unit, pattern(unit, 1)) == 0);
  bench.cache->flush(bench.storage); // two pieces are reserved now
  bench.storage.before = [&, first = true](const MemoryStorage::Call& call) mutable {
    if (call.kind == Kind::extents && std::exchange(first, false))
      bench.cache->zero(bench.storage, {8 * unit, 9 * unit}, {});
  };
  bench.cache->give_back_room(bench.storage);
  CHECK(bench.allocated() == 2 * unit);
}

TEST_CASE("an export that grows has room only where that was reserved", "[write_room]") {
  Bench bench;
  bench.cache->set_size(20 * unit + 4096);
  MemoryStorage shorter(MemoryStorage::everything(20 * unit + 4096));
  bench.cache->write(shorter, 20 * unit, pattern(100, 1), false);
  bench.cache->set_size(disk_size);
  CHECK(bench.write(20 * unit + 8192, pattern(100, 2)) == 0);
  CHECK(bench.storage.disk().allocated().contains({20 * unit + 8192, 21 * unit}));
}

TEST_CASE("room that was not needed is given back", "[write_room]") {
  Bench bench;
  bench.storage.write(0, pattern(5000, 1), false);
  CHECK(bench.write(unit + 100, pattern(9000, 2)) == 0);
  CHECK(bench.write(6 * unit, pattern(unit, 3)) == 0);
  CHECK(bench.allocated() == window);
  bench.cache->flush(bench.storage);
  CHECK(bench.cache->may_have_reserved());
  bench.cache->give_back_room(bench.storage);
  CHECK_FALSE(bench.cache->may_have_reserved());
  CHECK(bench.allocated() == 2 * 4096 + 3 * 4096 + unit);
  CHECK(bench.on_disk(unit + 100, 9000) == pattern(9000, 2));
  CHECK(bench.on_disk(0, 5000) == pattern(5000, 1));
  // So that a filesystem may use it for what follows; but nobody else's error is swallowed.
  CHECK(bench.storage.calls().back().kind == Kind::flush);
  // Who comes after that asks again; what is still in memory keeps its room.
  CHECK(bench.write(9 * unit, pattern(100, 4)) == 0);
  CHECK(bench.allocated() == window);
  bench.cache->give_back_room(bench.storage);
  CHECK(bench.storage.calls().back().kind == Kind::zero);
  CHECK(bench.allocated() == 2 * 4096 + 3 * 4096 + 2 * unit);
  bench.cache->flush(bench.storage);
}

TEST_CASE("where a client trims, or zeros, room is looked for again", "[write_room]") {
  Bench bench;
  CHECK(bench.write(unit, pattern(9000, 1)) == 0);
  const ByteRange range{0, 8 * unit};
  const auto asks_again = [&] {
    CHECK(bench.allocated() == 8 * unit);
    CHECK(bench.write(2 * unit, pattern(100, 1)) == 0);
    CHECK(bench.allocated() == window);
  };
  SECTION("a trim") {
    bench.cache->trim(bench.storage, range, false);
    asks_again();
  }
  SECTION("a trim, and zeros that may be a hole, that fail when they are done") {
    bench.storage.after = [](const MemoryStorage::Call& call) {
      if (call.kind == Kind::trim || (call.kind == Kind::zero && call.may_trim))
        throw std::system_error(EIO, std::generic_category(), "late");
    };
    if (GENERATE(true, false))
      CHECK_THROWS_AS(bench.cache->trim(bench.storage, range, false), std::system_error);
    else
      CHECK_THROWS_AS(bench.cache->zero(bench.storage, range, {true}), std::system_error);
    asks_again();
  }
  SECTION("zeros that may be a hole") {
    bench.cache->zero(bench.storage, range, {true});
    asks_again();
  }
  SECTION("zeros that are to have room, which is the client's") {
    bench.cache->zero(bench.storage, range, {});
    bench.cache->give_back_room(bench.storage);
    CHECK(bench.allocated() == 8 * unit);
  }
}

TEST_CASE("what is reserved clients take for a hole", "[write_room]") {
  Bench bench;
  CHECK(bench.write(unit, pattern(4096, 1)) == 0);
  bench.cache->flush(bench.storage);
  bench.storage.zeros_are_data = true; // as where somebody has read it
  const auto extents = bench.cache->extents(bench.storage, {0, window}, false);
  REQUIRE(extents.size() == 3);
  CHECK(extents[0].type == Storage::ExtentType::hole_and_zero);
  CHECK(extents[0].range == ByteRange{0, unit});
  CHECK(extents[1].type == Storage::ExtentType::data);
  CHECK(extents[1].range == ByteRange{unit, unit + 4096});
  CHECK(extents[2].type == Storage::ExtentType::hole_and_zero);
  CHECK(extents[2].range.end == window);
}

TEST_CASE("one asks, and others wait for the answer if they need it", "[write_room]") {
  Bench bench;
  Gate gate(bench.storage, Kind::zero);
  int answer = -1;
  WatchedThread one([&] { answer = bench.write(unit, pattern(100, 1)); });
  gate.wait_until_reached();
  int other_answer = -1;
  WatchedThread other([&] { other_answer = bench.write(5 * unit, pattern(100, 2)); });
  CHECK(other.waits());
  std::vector<std::byte> data(100);
  bench.cache->read(bench.storage, 0, data); // who reads does not
  gate.let_go();
  REQUIRE(one.ends());
  REQUIRE(other.ends());
  CHECK(answer == 0);
  CHECK(other_answer == 0);
  CHECK(bench.counted(Count::reservations) == 1);
}

namespace {

/// A client that hangs in its first request of a kind until the test lets it go.
class Hanging {
public:
  Hanging(Bench& bench, Kind kind, std::uint64_t offset, bool fua)
      : storage_(bench.storage.capabilities()), gate_(storage_, kind),
        thread_([this, &bench, offset, fua] {
          bench.cache->write(storage_, offset, pattern(4096, 1), fua);
        }) {
    gate_.wait_until_reached();
  }
  Hanging(const Hanging&) = delete;
  Hanging& operator=(const Hanging&) = delete;
  ~Hanging() { gate_.let_go(); }

private:
  MemoryStorage storage_;
  Gate gate_;
  WatchedThread thread_;
};

} // namespace

TEST_CASE("who hangs while he asks for room keeps others waiting once, not with each write",
          "[write_room]") {
  Bench bench(MemoryStorage::everything(disk_size), window, WriteCache::Settings().retry,
              std::chrono::seconds(1));
  const Hanging hanging(bench, Kind::zero, 2 * window, false);
  WatchedThread other([&] {
    for (std::uint64_t begin = 0; begin < 2 * window; begin += unit)
      bench.write(begin, pattern(100, 2));
  });
  CHECK(other.ends()); // after a second, and not after one for each of 32 units
}

TEST_CASE("who hangs while he writes keeps nobody from room beside it", "[write_room]") {
  Bench bench;
  const Hanging hanging(bench, Kind::write, 2 * window + 2 * unit, true);
  WatchedThread other([&] {
    bench.write(2 * window + 9 * unit, pattern(100, 2));
    bench.write(2 * window + 10 * unit, pattern(4096, 3), true);
  });
  CHECK(other.ends());
  CHECK(bench.counted(Count::reservations) > 0);
}

TEST_CASE("what clients zeroed says nothing of what storage does", "[write_room]") {
  Bench bench;
  bench.cache->zero(bench.storage, {2 * unit, 3 * unit}, {}); // allocated, and a hole to look at
  CHECK(bench.write(4 * unit, pattern(100, 1)) == 0);
  CHECK(bench.counted(Count::reservations) == 1);
  CHECK(bench.allocated() == window);
}

TEST_CASE("what was reserved on a disk says nothing of the one that takes its place",
          "[write_room]") {
  Bench bench;
  MemoryStorage founder(MemoryStorage::everything(disk_size));
  const auto there = pattern(unit, 1);
  founder.write(3 * unit, there, false);
  bench.cache->admit(bench.storage);
  bench.cache->trust(bench.storage);
  bench.cache->admit(founder);
  const bool full = GENERATE(false, true); // and so asked for less
  bench.storage.before = [&](const MemoryStorage::Call& call) {
    if (call.kind != Kind::zero || !bench.cache->found_anew(founder))
      return;
    if (full)
      throw std::system_error(ENOSPC, std::generic_category(), "full");
  };
  CHECK(bench.write(unit, pattern(100, 2)) == 0);
  const auto data = pattern(100, 3);
  bench.cache->write(founder, 3 * unit + 50, data, false);
  bench.cache->flush(founder);
  auto expected = there;
  std::ranges::copy(data, expected.begin() + 50);
  CHECK(founder.disk().read(3 * unit, unit) == expected);
}

TEST_CASE("beside others whose writes it may not see nobody reserves", "[write_room]") {
  Serving serving(std::size_t{64} * 1024 * 1024, 0, WriteCache::Settings().retry, nullptr, window);
  const auto disk = std::make_shared<MemoryDisk>(disk_size);
  disk->write(0, qcow2_header(16), true);
  Capabilities capabilities = MemoryStorage::everything(disk_size);
  capabilities.can_multi_conn = false;
  Client first(serving, "a", disk, capabilities);
  first.write(unit, pattern(100, 1));
  const std::uint64_t allocated = disk->allocated().bytes();
  CHECK(allocated >= window - unit); // but for the header's block, maybe
  Client second(serving, "a", disk, capabilities);
  second.write(2 * window, pattern(100, 1));
  first.write(window, pattern(100, 1));
  CHECK(disk->allocated().bytes() == allocated);
}

TEST_CASE("who writes in order has room waiting for him, and nothing is left reserved",
          "[write_room]") {
  Serving serving(std::size_t{64} * 1024 * 1024, 4, WriteCache::Settings().retry, nullptr, window);
  const auto disk = std::make_shared<MemoryDisk>(disk_size);
  disk->write(0, qcow2_header(16), true);
  disk->allocate({0, 4096});
  std::latch reached{1};
  std::latch open{1};
  std::atomic<unsigned> windows = 0;
  {
    Client client(serving, "a", disk, [&](const MemoryStorage::Call& call) {
      if (call.kind == Kind::zero && call.range.begin == window && ++windows == 1) {
        reached.count_down();
        open.wait();
      }
    });
    // Storage is asked for the second window while the client is still in the first.
    for (std::uint64_t i = 1; i < 16; ++i)
      client.write(i * unit, pattern(100, static_cast<unsigned>(i)));
    reached.wait();
    open.count_down();
    for (std::uint64_t i = 16; i < 32; ++i)
      client.write(i * unit, pattern(100, static_cast<unsigned>(i)));
    CHECK(disk->allocated().bytes() >= 2 * window);
    Client reader(serving, "a", disk);
    CHECK(reader.read(16 * unit, 100) == pattern(100, 16));
    client.leave();
    CHECK(disk->allocated().bytes() == 32 * 4096);
  }
  CHECK(windows == 1);
}
