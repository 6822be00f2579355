#include "cache/write_cache.hpp"

#include "catch.hpp"
#include "error_of.hpp"
#include "gate.hpp"
#include "image_bytes.hpp"
#include "memory_storage.hpp"
#include "storage/handle.hpp"
#include "watched_thread.hpp"

#include <algorithm>
#include <atomic>
#include <future>
#include <latch>
#include <memory>
#include <optional>
#include <semaphore>
#include <thread>

using namespace qcowcache;
using Kind = MemoryStorage::Kind;

namespace {

constexpr std::uint64_t unit = WriteCache::least_unit_size;
constexpr std::uint64_t disk_size = 64 * unit;
constexpr std::size_t plenty = std::size_t{32} * 1024 * 1024;

/// A cache over a disk in memory that is empty.
struct EmptyBench {
  explicit EmptyBench(Capabilities capabilities = MemoryStorage::everything(disk_size),
                      std::size_t memory = plenty, WriteCache::Settings settings = {})
      : budget(memory), storage(capabilities),
        cache(std::make_shared<WriteCache>(std::move(settings), capabilities, ranges, budget)) {
    budget.add_holder(cache);
  }

  void put_header(unsigned cluster_bits) {
    storage.disk().write(0, qcow2_header(cluster_bits), true);
    cache->learn_layout(storage);
    storage.forget_calls();
  }
  void write(std::uint64_t offset, std::span<const std::byte> data, bool fua = false) {
    cache->write(storage, offset, data, fua);
  }
  [[nodiscard]] std::vector<std::byte> read(std::uint64_t offset, std::size_t size) {
    std::vector<std::byte> data(size);
    cache->read(storage, offset, data);
    return data;
  }
  [[nodiscard]] std::vector<std::byte> on_disk(std::uint64_t offset, std::size_t size) const {
    return storage.disk().read(offset, size);
  }
  void write_all_that_waits() {
    while (cache->write_next(storage)) {
    }
  }

  RangeLock ranges;
  MemoryBudget budget;
  MemoryStorage storage;
  std::shared_ptr<WriteCache> cache;
};

/// The same with a qcow2 header on it.
struct Bench : EmptyBench {
  explicit Bench(Capabilities capabilities, std::size_t memory = plenty,
                 WriteCache::Settings settings = {})
      : EmptyBench(capabilities, memory, std::move(settings)) {
    put_header(16);
  }
  explicit Bench(WriteCache::Settings settings = {}, unsigned cluster_bits = 16)
      : EmptyBench(MemoryStorage::everything(disk_size), plenty, std::move(settings)) {
    put_header(cluster_bits);
  }
};

/// Without background writers, what is full is written in writes of this size.
WriteCache::Settings with_max_write(std::uint64_t bytes) {
  WriteCache::Settings settings;
  settings.max_write = bytes;
  return settings;
}

/// With background writers, whose part the test plays.
WriteCache::Settings with_writers(WriteCache::Settings settings = {}) {
  settings.wake_writer = [](std::size_t /*waiting*/) {};
  return settings;
}

/// Makes storage refuse requests of one kind while it lives.
class Refusal {
public:
  Refusal(MemoryStorage& storage, Kind kind, int error) : storage_(storage) {
    storage_.before = MemoryStorage::refusal(kind, error);
  }
  Refusal(const Refusal&) = delete;
  Refusal& operator=(const Refusal&) = delete;
  ~Refusal() { storage_.before = nullptr; }

private:
  MemoryStorage& storage_;
};

} // namespace

TEST_CASE("without a qcow2 header every write reaches storage unchanged", "[write_cache]") {
  EmptyBench bench;
  bench.cache->learn_layout(bench.storage);
  bench.storage.forget_calls();
  const auto data = pattern(777, 1);
  bench.write(4099, data);
  const auto calls = bench.storage.calls();
  REQUIRE(calls.size() == 1);
  CHECK(calls[0].kind == Kind::write);
  CHECK(calls[0].range == ByteRange{4099, 4876});
  bench.write(4099, data);
  CHECK(bench.storage.calls(Kind::write).size() == 2);
}

TEST_CASE("small writes are held, a full unit is written once and whole", "[write_cache]") {
  Bench bench(with_max_write(unit));
  std::vector<std::byte> image;
  for (unsigned i = 0; image.size() < unit; ++i) {
    auto piece = pattern(std::min<std::size_t>(1000 + i * 7, unit - image.size()), i);
    bench.write(unit + image.size(), piece);
    image.insert(image.end(), piece.begin(), piece.end());
    if (image.size() < unit)
      REQUIRE(bench.storage.calls(Kind::write).empty());
  }
  const auto writes = bench.storage.calls(Kind::write);
  REQUIRE(writes.size() == 1);
  CHECK(writes[0].range == ByteRange{unit, 2 * unit});
  CHECK(bench.storage.calls(Kind::read).empty());
  CHECK(bench.on_disk(unit, unit) == image);
  CHECK(bench.read(unit, unit) == image);
}

TEST_CASE("a flush behind which nothing was changed is answered at once", "[write_cache]") {
  Bench bench;
  const auto flushes = [&] {
    bench.storage.forget_calls();
    bench.cache->flush(bench.storage);
    return bench.storage.calls(Kind::flush).size();
  };
  // The first asks storage: who was there before may have changed something.
  CHECK(flushes() == 1);
  CHECK(flushes() == 0);
  const auto changes = GENERATE(0, 1, 2, 3, 4, 5);
  switch (changes) {
  case 0:
    bench.write(3 * unit, pattern(300, 1));
    break;
  case 1:
    bench.write(3 * unit, pattern(4096, 1), true);
    break;
  case 2:
    bench.cache->zero(bench.storage, {unit, 2 * unit}, {});
    break;
  case 3:
    bench.cache->trim(bench.storage, {unit, 2 * unit}, false);
    break;
  case 4: // through another cache, which this connection may have left meanwhile
    bench.cache->forget({unit, 2 * unit});
    break;
  default: // some of it may be on storage, where others have read it
    const Refusal refusal(bench.storage, Kind::write, EIO);
    CHECK(error_of([&] { bench.write(3 * unit, pattern(4096, 1), true); }) == EIO);
  }
  {
    const Refusal refusal(bench.storage, Kind::flush, EIO);
    CHECK(error_of([&] { bench.cache->flush(bench.storage); }) == EIO);
  }
  CHECK(flushes() == 1);
  CHECK(flushes() == 0);
  // Another connection hears of what storage lost itself.
  MemoryStorage other(bench.storage.capabilities());
  bench.cache->flush(other);
  CHECK(other.calls(Kind::flush).size() == 1);
}

TEST_CASE("a flush is not shared with whoever founds the image anew", "[write_cache]") {
  Bench bench;
  MemoryStorage slow(bench.storage.capabilities());
  MemoryStorage founder(bench.storage.capabilities());
  for (MemoryStorage* const storage : {&bench.storage, &slow}) {
    bench.cache->admit(*storage);
    bench.cache->trust(*storage);
  }
  Gate gate(slow, Kind::flush);
  WatchedThread flushes([&] { bench.cache->flush(slow); });
  gate.wait_until_reached();
  WatchedThread waits([&] { bench.cache->flush(bench.storage); });
  static_cast<void>(waits.waits()); // on a slow machine its patience may have ended
  // The file has been replaced, and all that the others wrote is on the one before.
  bench.cache->admit(founder);
  REQUIRE(bench.cache->found_anew(founder));
  founder.disk().write(0, qcow2_header(16), true);
  bench.cache->learn_layout(founder);
  WatchedThread founds([&] { bench.cache->flush(founder); });
  static_cast<void>(founds.waits());
  gate.let_go();
  REQUIRE(flushes.ends());
  REQUIRE(waits.ends());
  REQUIRE(founds.ends());
  CHECK(bench.storage.calls(Kind::flush).size() == 1);
  CHECK(founder.calls(Kind::flush).size() == 1);
}

TEST_CASE("the end of a connection flushes by itself", "[write_cache]") {
  std::atomic<bool> ends = false;
  WriteCache::Settings settings;
  settings.hold = [] { return true; };
  settings.release = [] {};
  settings.interrupted = [&] { return ends.load(); };
  Bench bench(settings);
  MemoryStorage slow(bench.storage.capabilities());
  for (MemoryStorage* const storage : {&bench.storage, &slow}) {
    bench.cache->admit(*storage);
    bench.cache->trust(*storage);
  }
  bench.write(3 * unit, pattern(300, 1));
  Gate gate(slow, Kind::flush);
  WatchedThread flushes([&] { bench.cache->flush(slow); });
  gate.wait_until_reached();
  ends = true;
  CHECK(bench.cache->drain(bench.storage) == std::error_code());
  CHECK(bench.storage.calls(Kind::flush).size() == 1);
  gate.let_go();
  REQUIRE(flushes.ends());
}

TEST_CASE("a flush writes partial units on whole blocks, reading nothing that is known",
          "[write_cache]") {
  Bench bench;
  const auto first = pattern(1500, 4);
  bench.write(unit + 100, first);
  bench.cache->flush(bench.storage);
  auto writes = bench.storage.calls(Kind::write);
  REQUIRE(writes.size() == 1);
  CHECK(writes[0].range == ByteRange{unit, unit + 4096});
  CHECK(bench.storage.calls(Kind::read).empty()); // storage said that it is zeros
  CHECK(bench.storage.calls().back().kind == Kind::flush);

  SECTION("appending afterwards needs no read either") {
    bench.storage.forget_calls();
    const auto second = pattern(5000, 5);
    bench.write(unit + 1600, second);
    bench.cache->flush(bench.storage);
    writes = bench.storage.calls(Kind::write);
    REQUIRE(writes.size() == 1);
    CHECK(writes[0].range == ByteRange{unit, unit + 8192});
    CHECK(bench.storage.calls(Kind::read).empty());
    CHECK(bench.on_disk(unit + 100, 1500) == first);
    CHECK(bench.on_disk(unit + 1600, 5000) == second);
  }
  SECTION("with nothing new nothing is written") {
    bench.storage.forget_calls();
    bench.cache->flush(bench.storage);
    CHECK(bench.storage.calls(Kind::write).empty());
  }
}

TEST_CASE("storage without extents is read once where a block has to be completed",
          "[write_cache]") {
  Capabilities capabilities = MemoryStorage::everything(disk_size);
  capabilities.can_extents = false;
  Bench bench(capabilities);
  const auto old = pattern(2 * unit, 9);
  bench.storage.disk().write(2 * unit, old, true);
  const auto data = pattern(6000, 10);
  bench.write(2 * unit + 1000, data);
  bench.cache->flush(bench.storage);
  const auto reads = bench.storage.calls(Kind::read);
  REQUIRE(reads.size() == 1);
  CHECK(reads[0].range == ByteRange{2 * unit, 2 * unit + 8192});

  auto expected = std::vector<std::byte>(old.begin(), old.begin() + 8192);
  std::ranges::copy(data, expected.begin() + 1000);
  CHECK(bench.on_disk(2 * unit, 8192) == expected);
  bench.write(2 * unit + 500, pattern(100, 11));
  bench.cache->flush(bench.storage);
  CHECK(bench.storage.calls(Kind::read).size() == 1);
}

TEST_CASE("the last bytes of an odd-sized export", "[write_cache]") {
  const std::uint64_t size = GENERATE(2 * unit + 1, 2 * unit + 511, 3 * unit - 1, unit + 4097);
  Bench bench(MemoryStorage::everything(size), plenty, with_max_write(unit));
  const auto data = pattern(1, 5);
  bench.write(size - 1, data);
  bench.cache->flush(bench.storage);
  CHECK(bench.on_disk(size - 1, 1) == data);
  CHECK(bench.storage.violations().empty());

  // The last unit is full when it is full up to the end of the export.
  const std::uint64_t begin = align_down(size - 1, unit);
  bench.storage.forget_calls();
  const auto all = pattern(size - begin, 6);
  bench.write(begin, all);
  REQUIRE(bench.storage.calls(Kind::write).size() == 1);
  CHECK(bench.storage.calls(Kind::write)[0].range == ByteRange{begin, size});
}

TEST_CASE("a client that writes to a unit that is being written does not wait", "[write_cache]") {
  Bench bench;
  const auto first = pattern(6000, 1);
  const auto second = pattern(3000, 2);
  auto expected = first;
  std::ranges::copy(second, expected.begin() + 1000);

  bench.write(unit, first);
  Gate gate(bench.storage, Kind::write);
  auto flush = std::async(std::launch::async, [&] { bench.cache->flush(bench.storage); });
  gate.wait_until_reached();
  bench.write(unit + 1000, second); // held: storage takes nothing now
  CHECK(bench.read(unit, 6000) == expected);
  gate.let_go();
  flush.get();

  CHECK(bench.on_disk(unit, 6000) == first); // the flush began before the second write
  CHECK(bench.read(unit, 6000) == expected);
  bench.cache->flush(bench.storage);
  CHECK(bench.on_disk(unit, 6000) == expected);
}

TEST_CASE("while a block is read to be completed nobody else changes it", "[write_cache]") {
  Capabilities capabilities = MemoryStorage::everything(disk_size);
  capabilities.can_extents = false;
  Bench bench(capabilities);
  auto expected = pattern(4096, 9);
  bench.storage.disk().write(unit, expected, true);
  const auto held = pattern(100, 1);
  const auto other = pattern(100, 2);
  const bool flush_first = GENERATE(true, false);
  bench.write(unit + 10, held);
  std::ranges::copy(held, expected.begin() + 10);
  const auto flush = [&] { bench.cache->flush(bench.storage); };
  const auto write_through = [&] { bench.write(unit + 200, other, true); };
  std::ranges::copy(other, expected.begin() + 200);

  Gate gate(bench.storage, Kind::read, &MemoryStorage::after);
  WatchedThread first([&] { flush_first ? flush() : write_through(); });
  gate.wait_until_reached();
  WatchedThread second([&] { flush_first ? write_through() : flush(); });
  CHECK(second.waits());
  gate.let_go();
  REQUIRE(first.ends());
  REQUIRE(second.ends());
  flush();
  CHECK(bench.on_disk(unit, 4096) == expected);
}

TEST_CASE("a read looks into the cache before it asks storage", "[write_cache]") {
  Bench bench;
  const auto data = pattern(unit / 2, 1);
  bench.write(unit, data);
  Gate gate(bench.storage, Kind::read, &MemoryStorage::after);
  std::vector<std::byte> found;
  WatchedThread reader([&] { found = bench.read(unit, unit + 4096); });
  gate.wait_until_reached();
  bench.cache->flush(bench.storage); // written, and dropped, while storage answers
  bench.cache->release_clean(SIZE_MAX);
  gate.let_go();
  REQUIRE(reader.ends());
  CHECK(std::equal(data.begin(), data.end(), found.begin()));
}

TEST_CASE("extents are told of the cache before storage is asked", "[write_cache]") {
  Bench bench;
  bench.write(unit, pattern(4096, 1));
  bench.cache->flush(bench.storage); // so that storage has been asked for zeros
  bench.write(2 * unit, pattern(4096, 1));
  Gate gate(bench.storage, Kind::extents, &MemoryStorage::after);
  Storage::Extents found;
  WatchedThread asker([&] {
    found = bench.cache->extents(bench.storage, {2 * unit, 3 * unit}, false);
  });
  gate.wait_until_reached();
  bench.cache->flush(bench.storage);
  bench.cache->release_clean(SIZE_MAX);
  gate.let_go();
  REQUIRE(asker.ends());
  REQUIRE_FALSE(found.empty());
  CHECK(found[0].type == Storage::ExtentType::data);
}

TEST_CASE("bytes that are being written are unsaved, and data", "[write_cache]") {
  Bench bench;
  bench.write(unit, pattern(4096, 1));
  Gate gate(bench.storage, Kind::write);
  WatchedThread flush([&] { bench.cache->flush(bench.storage); });
  gate.wait_until_reached();
  CHECK(bench.cache->unsaved().bytes == 4096);
  CHECK_FALSE(bench.cache->clean());
  const auto extents = bench.cache->extents(bench.storage, {unit, unit + 4096}, false);
  gate.let_go();
  REQUIRE(flush.ends());
  REQUIRE(extents.size() == 1);
  CHECK(extents[0].type == Storage::ExtentType::data);
  CHECK(bench.cache->unsaved().bytes == 0);
}

TEST_CASE("what a client has read is not remembered", "[write_cache]") {
  Bench bench;
  bench.write(unit, pattern(100, 1));
  Gate gate(bench.storage, Kind::read, &MemoryStorage::after);
  WatchedThread reader([&] { (void)bench.read(unit, 8192); });
  gate.wait_until_reached();
  bench.storage.disk().write(unit + 4096, pattern(4096, 2), true); // by somebody else
  bench.cache->forget({unit + 4096, unit + 8192});
  gate.let_go();
  REQUIRE(reader.ends());
  CHECK(bench.read(unit + 4096, 4096) == pattern(4096, 2));
}

TEST_CASE("a flush waits for what others are writing, and takes over what they are refused",
          "[write_cache]") {
  Bench bench(with_writers()); // somebody else is to write
  const bool refused = GENERATE(false, true);
  auto expected = pattern(unit, 1);
  bench.write(unit, expected);
  std::latch reached(1);
  std::latch open(1);
  std::atomic<unsigned> writes = 0;
  bench.storage.before = [&](const MemoryStorage::Call& call) {
    if (call.kind == Kind::write && ++writes == 1) {
      reached.count_down();
      open.wait();
      if (refused)
        throw std::system_error(EIO, std::generic_category(), "refused");
    }
  };
  WatchedThread writer([&] { (void)bench.cache->write_next(bench.storage); });
  reached.wait();
  WatchedThread flush([&] { bench.cache->flush(bench.storage); });
  CHECK(flush.waits());
  const auto newer = pattern(100, 2); // newer than the flush, in the same unit
  bench.write(unit + 50, newer);
  open.count_down();
  REQUIRE(writer.ends());
  REQUIRE(flush.ends());
  const auto durable = bench.storage.disk().durable();
  CHECK(std::equal(expected.begin() + 150, expected.end(), durable.begin() + unit + 150));
  CHECK(std::equal(expected.begin(), expected.begin() + 50, durable.begin() + unit));
  bench.storage.before = nullptr;
  bench.cache->flush(bench.storage);
  std::ranges::copy(newer, expected.begin() + 50);
  CHECK(bench.on_disk(unit, unit) == expected);
}

TEST_CASE("partial units of one flush are stored at the same time", "[write_cache]") {
  std::counting_semaphore<> woken(0);
  WriteCache::Settings settings;
  settings.wake_writer = [&](std::size_t /*waiting*/) { woken.release(); };
  Bench bench(std::move(settings));
  constexpr unsigned units = 4;
  for (unsigned i = 0; i < units; ++i)
    bench.write(2 * i * unit + unit, pattern(100, i));
  // Nobody gets out of storage before two are in it.
  std::latch two(2);
  std::atomic<unsigned> arrived = 0;
  bench.storage.before = [&](const MemoryStorage::Call& call) {
    if (call.kind == Kind::write && arrived.fetch_add(1) < 2)
      two.arrive_and_wait();
  };
  const auto write = [&] {
    woken.acquire();
    bench.write_all_that_waits();
  };
  WatchedThread first_writer(write);
  WatchedThread second_writer(write);
  WatchedThread flush([&] { bench.cache->flush(bench.storage); });
  const bool together = flush.ends();
  CHECK(together);
  if (!together && arrived.fetch_add(2) == 1)
    two.count_down();
  woken.release(2); // for a writer that nobody has called
  REQUIRE(first_writer.ends());
  REQUIRE(second_writer.ends());
  REQUIRE(flush.ends());
  for (unsigned i = 0; i < units; ++i)
    CHECK(bench.on_disk(2 * i * unit + unit, 100) == pattern(100, i));
}

TEST_CASE("a flush does not wait for newer bytes that others are writing", "[write_cache]") {
  Bench bench(with_writers()); // the test decides when one writes
  constexpr std::uint64_t first = unit;
  constexpr std::uint64_t second = 3 * unit;
  // A unit of its own, or the one that the flush comes to last.
  const std::uint64_t newer = GENERATE(3 * unit, 5 * unit);
  std::latch flushing(1);
  std::latch writing(1);
  std::latch go_on_flushing(1);
  std::latch go_on_writing(1);
  std::atomic<bool> held = false;
  bench.storage.before = [&](const MemoryStorage::Call& call) {
    if (call.kind != Kind::write)
      return;
    if (call.range.begin < second) {
      flushing.count_down();
      go_on_flushing.wait();
    } else if (held) {
      writing.count_down();
      go_on_writing.wait();
    }
  };
  bench.write(first, pattern(100, 1));
  bench.write(second, pattern(100, 2));
  WatchedThread flush([&] { bench.cache->flush(bench.storage); });
  flushing.wait();
  CHECK(bench.cache->write_next(bench.storage)); // the second, in its place
  held = true;
  bench.write(newer, pattern(unit, 3));
  WatchedThread writer([&] { (void)bench.cache->write_next(bench.storage); });
  writing.wait();
  go_on_flushing.count_down();
  CHECK(flush.ends());
  CHECK(bench.storage.calls(Kind::flush).size() == 1);
  go_on_writing.count_down();
  REQUIRE(writer.ends());
  REQUIRE(flush.ends());
}

TEST_CASE("a flush ends although a client begins a new unit whenever one is stored",
          "[write_cache]") {
  Bench bench(with_writers()); // nobody but the flush writes
  const std::size_t size = GENERATE(std::size_t{100}, std::size_t{unit});
  std::uint64_t next = 5;
  bench.storage.before = [&](const MemoryStorage::Call& call) {
    if (call.kind == Kind::write && next < disk_size / unit)
      bench.write(next++ * unit, pattern(size, 2));
  };
  bench.write(unit, pattern(100, 1));
  bench.write(3 * unit, pattern(100, 1));
  bench.cache->flush(bench.storage);
  CHECK(bench.storage.calls(Kind::write).size() == 2);
  CHECK(bench.cache->unsaved().bytes == 2 * size);
}

TEST_CASE("a unit that is refused while it is written to anew keeps both", "[write_cache]") {
  Bench bench;
  const auto first = pattern(6000, 1);
  const auto second = pattern(3000, 2);
  auto expected = first;
  std::ranges::copy(second, expected.begin() + 1000);

  bench.write(unit, first);
  std::latch reached(1);
  std::latch open(1);
  bench.storage.before = [&](const MemoryStorage::Call& call) {
    if (call.kind == Kind::write) {
      reached.count_down();
      open.wait();
      throw std::system_error(ENOSPC, std::generic_category(), "refused");
    }
  };
  auto flush = std::async(std::launch::async,
                          [&] { return error_of([&] { bench.cache->flush(bench.storage); }); });
  reached.wait();
  bench.storage.before = nullptr;
  bench.write(unit + 1000, second); // held: storage takes nothing now
  open.count_down();
  CHECK(flush.get() == ENOSPC);
  CHECK(bench.read(unit, 6000) == expected);
  CHECK(bench.cache->unsaved().bytes == 6000);
  bench.cache->flush(bench.storage);
  CHECK(bench.on_disk(unit, 6000) == expected);
  CHECK(bench.cache->unsaved().bytes == 0);
}

TEST_CASE("when there is no memory for a second buffer the unit is busy", "[write_cache]") {
  Bench bench;
  bench.cache->release_clean(SIZE_MAX);
  std::vector<std::shared_ptr<MemoryBudget::Buffer>> hoard;
  bench.write(unit, pattern(6000, 1));
  while (auto buffer = bench.budget.try_take(unit, 0))
    hoard.push_back(std::move(buffer));

  Gate gate(bench.storage, Kind::write);
  auto flush = std::async(std::launch::async, [&] { bench.cache->flush(bench.storage); });
  gate.wait_until_reached();
  const auto data = pattern(100, 2);
  WatchedThread write([&] { bench.write(unit, data); });
  CHECK(write.waits());
  gate.let_go();
  flush.get();
  REQUIRE(write.ends());
  CHECK(bench.read(unit, 100) == data);
}

TEST_CASE("refused bytes stay, are read, and the next flush tries again", "[write_cache]") {
  Bench bench;
  const int error = GENERATE(ENOSPC, EIO, EPERM);
  const auto full = pattern(unit, 1);
  const auto part = pattern(999, 2);
  {
    const Refusal refusal(bench.storage, Kind::write, error);
    bench.write(2 * unit, full); // acknowledged: it is in memory
    bench.write(4 * unit + 5, part);
    CHECK(error_of([&] { bench.cache->flush(bench.storage); }) == error);
    CHECK(error_of([&] { bench.cache->flush(bench.storage); }) == error);
    CHECK(bench.storage.calls(Kind::flush).empty());
    CHECK(bench.read(2 * unit, unit) == full);
    CHECK(bench.read(4 * unit + 5, 999) == part);
    CHECK(bench.cache->unsaved().bytes == unit + 999);
  }
  bench.cache->flush(bench.storage);
  CHECK(bench.on_disk(2 * unit, unit) == full);
  CHECK(bench.on_disk(4 * unit + 5, 999) == part);
}

TEST_CASE("a fill-up read that fails is a refused write", "[write_cache]") {
  Capabilities capabilities = MemoryStorage::everything(disk_size);
  capabilities.can_extents = false;
  Bench bench(capabilities);
  const auto data = pattern(100, 1);
  {
    const Refusal refusal(bench.storage, Kind::read, EIO);
    bench.write(unit + 7, data);
    CHECK(error_of([&] { bench.cache->flush(bench.storage); }) == EIO);
  }
  CHECK(bench.storage.calls(Kind::write).empty());
  CHECK(bench.cache->unsaved().bytes == 100);
  bench.cache->flush(bench.storage);
  CHECK(bench.on_disk(unit + 7, 100) == data);
}

TEST_CASE("that something is held is written down first, and crossed out when nothing is",
          "[write_cache]") {
  std::string notes;
  bool writable = true;
  WriteCache::Settings settings;
  settings.hold = [&] {
    notes += writable ? "hold " : "no ";
    return writable;
  };
  settings.release = [&] { notes += "release "; };
  Bench bench(std::move(settings));
  const auto noted = [&] { return std::exchange(notes, {}); };
  CHECK(noted().empty());

  bench.write(2 * unit, pattern(100, 1));
  bench.write(3 * unit, pattern(100, 1));
  CHECK(noted() == "hold ");
  SECTION("a flush that leaves nothing") {
    bench.cache->flush(bench.storage);
    CHECK(noted() == "release ");
    bench.cache->flush(bench.storage);
    CHECK(noted().empty());
    bench.write(2 * unit, pattern(100, 1));
    CHECK(noted() == "hold ");
  }
  SECTION("the flush of a guest, whose disk may be another") {
    bench.cache->queue_oldest();
    bench.cache->queue_oldest();
    bench.write_all_that_waits();
    REQUIRE(bench.cache->clean());
    MemoryStorage guest(MemoryStorage::everything(disk_size));
    bench.cache->admit(guest);
    bench.cache->flush(guest);
    CHECK(noted().empty());
    bench.cache->flush(bench.storage);
    CHECK(noted() == "release ");
  }
  SECTION("a flush during which more is held") {
    bench.storage.before = [&](const MemoryStorage::Call& call) {
      if (call.kind == Kind::flush) {
        bench.write(5 * unit, pattern(unit, 1));
        bench.cache->write_next(bench.storage);
      }
    };
    bench.cache->flush(bench.storage);
    CHECK(bench.cache->clean()); // but what came last was not flushed
    CHECK(noted().empty());
  }
  SECTION("storage that refuses, units or a flush") {
    {
      const Refusal refusal(bench.storage, GENERATE(Kind::write, Kind::flush), EIO);
      CHECK(error_of([&] { bench.cache->flush(bench.storage); }) == EIO);
      CHECK(bench.cache->drain(bench.storage) == std::error_code(EIO, std::generic_category()));
      CHECK(noted().empty());
    }
    CHECK_FALSE(bench.cache->drain(bench.storage));
    CHECK(noted() == "release ");
  }
  SECTION("the end of a connection, for which storage is flushed") {
    bench.storage.forget_calls();
    CHECK_FALSE(bench.cache->drain(bench.storage));
    CHECK(bench.storage.calls(Kind::flush).size() == 1);
    CHECK(noted() == "release ");
    CHECK_FALSE(bench.cache->drain(bench.storage));
    CHECK(bench.storage.calls(Kind::flush).size() == 1);
  }
  SECTION("what is given up") {
    bench.cache->abandon();
    bench.cache->abandon();
    CHECK(noted() == "release ");
  }
  SECTION("what cannot be written down goes through") {
    bench.cache->flush(bench.storage);
    writable = false;
    noted();
    bench.write(7 * unit, pattern(100, 2));
    CHECK(noted() == "no ");
    CHECK(bench.on_disk(7 * unit, 100) == pattern(100, 2));
    CHECK(bench.cache->clean());
  }
}

TEST_CASE("the ragged ends of a zero have its place among others", "[write_cache]") {
  Capabilities capabilities = MemoryStorage::everything(disk_size);
  capabilities.minimum = 512;
  std::atomic<bool> gone = false;
  WriteCache::Settings settings;
  settings.interrupted = [&] { return gone.load(); };
  Bench bench(capabilities, plenty, std::move(settings));
  const auto earlier = pattern(4096, 1);
  const auto newer = pattern(100, 2);
  bench.write(unit, earlier);
  Gate gate(bench.storage, Kind::zero, &MemoryStorage::after);
  const bool dies = GENERATE(true, false);
  int error = 0;
  WatchedThread zero([&] {
    error = error_of([&] { bench.cache->zero(bench.storage, {unit + 5, unit + 4000}, {}); });
  });
  gate.wait_until_reached();
  WatchedThread writer([&] { error_of([&] { bench.write(unit + 5, newer); }); });
  CHECK(writer.waits());
  gone = dies;
  gate.let_go();
  REQUIRE(zero.ends());
  REQUIRE(writer.ends());
  gone = false;
  CHECK((error == ESHUTDOWN) == dies);
  if (dies)
    CHECK(bench.read(unit + 5, 507) ==
          std::vector<std::byte>(earlier.begin() + 5, earlier.begin() + 512));
  else
    CHECK(bench.read(unit + 5, 100) == newer);
}

TEST_CASE("a header that cannot be read is read again, and not for ever", "[write_cache]") {
  EmptyBench bench;
  bench.storage.disk().write(0, qcow2_header(16), true);
  std::string told;
  unsigned reads = 0;
  unsigned failures = GENERATE(1U, 2U, 100U);
  bench.storage.before = [&](const MemoryStorage::Call& call) {
    if (call.kind == Kind::read && reads++ < failures)
      throw std::system_error(EIO, std::generic_category(), "refused");
  };
  for (unsigned i = 0; i < 10; ++i)
    bench.write(unit + i * 100, pattern(100, i));
  CHECK(reads == std::min(failures + 1, 3U));
  CHECK(bench.cache->caching() == (failures < 3));
  if (failures < 3)
    return;
  CHECK(bench.on_disk(unit, 100) == pattern(100, 0)); // and until then nothing is held
  // What a client tried and failed to write there does not change that.
  {
    const Refusal refusal(bench.storage, Kind::write, EIO);
    for (unsigned i = 0; i < 10; ++i)
      CHECK(error_of([&] { bench.write(0, pattern(100, i)); }) == EIO);
  }
  CHECK(reads == 3);
  // A client who can read it finds out.
  bench.storage.disk().write(0, qcow2_header(16), true);
  CHECK(bench.read(0, 512).size() == 512);
  bench.write(unit, pattern(100, 1));
  CHECK(bench.cache->caching());
}

TEST_CASE("what storage did before it failed is seen", "[write_cache]") {
  Bench bench;
  const ByteRange first{unit, unit + 4096};
  const ByteRange second{unit + 8192, unit + 12288}; // storage said that it is zeros
  bench.write(first.begin, pattern(first.size(), 1));
  bench.cache->flush(bench.storage);
  const unsigned kind = GENERATE(range(0U, 3U));
  bench.storage.after = [](const MemoryStorage::Call& call) {
    if (call.kind != Kind::read)
      throw std::system_error(EIO, std::generic_category(), "refused");
  };
  for (const ByteRange& range : {first, second}) {
    CHECK(error_of([&] {
            if (kind == 0)
              bench.write(range.begin, pattern(range.size(), 2), true);
            else if (kind == 1)
              bench.cache->zero(bench.storage, range, {});
            else
              bench.cache->trim(bench.storage, range, false);
          }) == EIO);
  }
  bench.storage.after = nullptr;
  for (const ByteRange& range : {first, second})
    CHECK(bench.read(range.begin, range.size()) == bench.on_disk(range.begin, range.size()));
  auto expected = bench.on_disk(second.begin, second.size());
  const auto little = pattern(10, 3);
  bench.write(second.begin + 500, little);
  bench.cache->flush(bench.storage);
  std::ranges::copy(little, expected.begin() + 500);
  CHECK(bench.on_disk(second.begin, second.size()) == expected);
}

TEST_CASE("every flush that waited for a flush of storage that fails is told", "[write_cache]") {
  Bench bench;
  for (unsigned i = 1; i < 9; ++i)
    bench.write(i * unit, pattern(10, i));
  const Refusal refusal(bench.storage, Kind::flush, EIO);
  std::vector<std::future<int>> flushes;
  flushes.reserve(4);
  for (unsigned i = 0; i < 4; ++i)
    flushes.push_back(std::async(
        std::launch::async, [&] { return error_of([&] { bench.cache->flush(bench.storage); }); }));
  for (std::future<int>& flush : flushes)
    CHECK(flush.get() == EIO);
}

TEST_CASE("storage that says it is full is asked once by each flush, and once by a connection that "
          "ends",
          "[write_cache]") {
  Bench bench;
  const int error = GENERATE(ENOSPC, EDQUOT, EIO);
  const bool full = error != EIO;
  const auto write_requests = [&] { return bench.storage.calls(Kind::write).size(); };
  for (unsigned i = 1; i <= 8; ++i)
    bench.write(2 * i * unit + 5, pattern(100, i));
  {
    const Refusal refusal(bench.storage, Kind::write, error);
    CHECK(error_of([&] { bench.cache->flush(bench.storage); }) == error);
    CHECK(write_requests() == (full ? 1 : 8));

    std::vector<std::uint64_t> tried;
    for (unsigned i = 0; i < 3; ++i) {
      bench.storage.forget_calls();
      CHECK(error_of([&] { bench.cache->flush(bench.storage); }) == error);
      CHECK(write_requests() == (full ? 1 : 8));
      tried.push_back(bench.storage.calls(Kind::write).at(0).range.begin);
    }
    if (full) // each has its turn
      CHECK(tried == std::vector<std::uint64_t>{4 * unit, 6 * unit, 8 * unit});

    bench.storage.forget_calls();
    CHECK(bench.cache->drain(bench.storage).value() == error);
    CHECK(bench.cache->unsaved().bytes == 800);
    CHECK(write_requests() == (full ? 1 : 8));
  }
  bench.cache->flush(bench.storage); // the first that succeeds: all is stored
  CHECK(bench.cache->clean());
  for (unsigned i = 1; i <= 8; ++i)
    CHECK(bench.on_disk(2 * i * unit + 5, 100) == pattern(100, i));
}

TEST_CASE("once storage has refused something writes get its own answer, until it has that",
          "[write_cache]") {
  Bench bench(with_writers()); // the test is the writer
  const int error = GENERATE(ENOSPC, EIO);
  bench.write(2 * unit, pattern(unit, 1));
  bench.write(4 * unit, pattern(100, 1));
  bench.storage.before = [&](const MemoryStorage::Call& call) {
    if (call.kind == Kind::write && call.range.begin < 10 * unit)
      throw std::system_error(error, std::generic_category(), "refused");
  };
  bench.cache->write_next(bench.storage);
  // Whether there is a unit already, is none, or is the one that was refused.
  for (const std::uint64_t offset : {4 * unit + 100, 6 * unit, 2 * unit + 7})
    CHECK(error_of([&] { bench.write(offset, pattern(100, 2)); }) == error);
  CHECK(error_of([&] { bench.cache->zero(bench.storage, {6 * unit, 6 * unit + 100}, {}); }) == 0);
  CHECK(bench.read(2 * unit, unit) == pattern(unit, 1));
  CHECK(bench.cache->unsaved().bytes == unit + 100);
  // What storage takes it has when it is acknowledged.
  bench.write(20 * unit + 5, pattern(100, 3));
  CHECK(bench.on_disk(20 * unit + 5, 100) == pattern(100, 3));
  bench.storage.before = nullptr;
  SECTION("a flush that succeeds") {
    bench.cache->flush(bench.storage);
  }
  SECTION("what was refused is zeroed") {
    bench.cache->zero(bench.storage, {2 * unit, 3 * unit}, {});
  }
  SECTION("what was refused is written through") {
    bench.write(2 * unit, pattern(unit, 4), true);
  }
  bench.storage.forget_calls();
  bench.write(22 * unit, pattern(100, 5));
  CHECK(bench.storage.calls(Kind::write).empty());
  bench.cache->flush(bench.storage);
  CHECK(bench.cache->clean());
}

TEST_CASE("one region for which storage has no room does not keep others from being stored",
          "[write_cache]") {
  Bench bench;
  for (unsigned i = 1; i <= 8; ++i)
    bench.write(2 * i * unit, pattern(100, i));
  {
    const Refusal refusal(bench.storage, Kind::write, ENOSPC);
    CHECK(error_of([&] { bench.cache->flush(bench.storage); }) == ENOSPC);
  }
  bench.storage.before = [](const MemoryStorage::Call& call) {
    if (call.kind == Kind::write && call.range.begin == 2 * unit)
      throw std::system_error(ENOSPC, std::generic_category(), "refused");
  };
  CHECK(error_of([&] { bench.cache->flush(bench.storage); }) == ENOSPC);
  CHECK(error_of([&] { bench.cache->flush(bench.storage); }) == ENOSPC);
  CHECK(bench.cache->unsaved().bytes == 100);
  for (unsigned i = 2; i <= 8; ++i)
    CHECK(bench.on_disk(2 * i * unit, 100) == pattern(100, i));
}

TEST_CASE("of what storage refused one unit is tried again, and when it is taken the others follow",
          "[write_cache]") {
  WriteCache::Settings settings = with_writers();
  settings.expire = std::chrono::milliseconds(0);
  const bool soon = GENERATE(true, false);
  settings.retry = std::chrono::hours(soon ? 0 : 1);
  Bench bench(std::move(settings));
  for (unsigned i = 1; i <= 6; ++i)
    bench.write(2 * i * unit, pattern(100, i));
  {
    const Refusal refusal(bench.storage, Kind::write, EIO);
    CHECK(error_of([&] { bench.cache->flush(bench.storage); }) == EIO);
    CHECK(bench.cache->waiting() == 0);
    bench.cache->tick();
    CHECK(bench.cache->waiting() == (soon ? 1 : 0));
    CHECK(bench.cache->write_next(bench.storage) == soon);
    CHECK(bench.cache->waiting() == 0);

    SECTION("a budget that shrinks does not have them tried faster") {
      bench.budget.set_limit(2 * unit);
      bench.cache->tick();
      CHECK(bench.cache->waiting() <= 1);
    }
    SECTION("nor does a header that goes") {
      bench.cache->zero(bench.storage, {0, 512}, {});
      CHECK(bench.cache->waiting() <= 1);
      bench.cache->tick();
      CHECK(bench.cache->waiting() <= 1);
    }
    bench.write_all_that_waits();
    CHECK(bench.cache->unsaved().bytes == 600);
  }
  bench.cache->tick();
  CHECK(bench.cache->waiting() == (soon ? 1 : 0));
  bench.write_all_that_waits();
  CHECK(bench.cache->clean() == soon);
}

TEST_CASE("what storage refused is tried again by a request where nobody writes in the background",
          "[write_cache]") {
  WriteCache::Settings settings;
  settings.retry = std::chrono::milliseconds(0);
  Bench bench(std::move(settings));
  {
    const Refusal refusal(bench.storage, Kind::write, ENOSPC);
    for (unsigned i = 1; i <= 6; ++i)
      bench.write(2 * i * unit, pattern(100, i));
    CHECK(bench.cache->drain(bench.storage).value() == ENOSPC);
    CHECK(bench.cache->unsaved().bytes == 600);
    bench.storage.forget_calls();
    CHECK(error_of([&] { bench.write(30 * unit, pattern(100, 9)); }) == ENOSPC);
    CHECK(bench.storage.calls(Kind::write).size() == 1);
  }
  // Each request stores its own and some of it, and none pays for all.
  for (unsigned i = 1; i <= 3; ++i) {
    bench.storage.forget_calls();
    bench.write(30 * unit + 100 * i, pattern(100, 9));
    CHECK(bench.storage.calls(Kind::write).size() == 3);
  }
  CHECK(bench.cache->clean());
}

TEST_CASE("a fast zero that storage does not have leaves the cache as it was", "[write_cache]") {
  Bench bench;
  bench.write(unit, pattern(8192, 1));
  bench.cache->flush(bench.storage);
  bench.write(unit + 8192, pattern(4096, 2));
  Storage::ZeroOptions fast;
  fast.fast = true;
  {
    const Refusal refusal(bench.storage, Kind::zero, ENOTSUP);
    bench.storage.forget_calls();
    CHECK(error_of([&] { bench.cache->zero(bench.storage, {unit, 2 * unit}, fast); }) == ENOTSUP);
    CHECK(error_of([&] { bench.cache->zero(bench.storage, {0, unit}, fast); }) == ENOTSUP);
  }
  CHECK(bench.cache->caching());
  CHECK(bench.read(unit, 8192) == pattern(8192, 1));
  CHECK(bench.read(unit + 8192, 4096) == pattern(4096, 2));
  CHECK(bench.storage.calls(Kind::read).empty()); // what was known still is
  CHECK(bench.storage.calls(Kind::write).empty());
  CHECK(bench.cache->unsaved().bytes == 4096);
}

TEST_CASE("zeroing or trimming refused bytes ends the refusal, in however many pieces they are",
          "[write_cache]") {
  Bench bench;
  const Refusal refusal(bench.storage, Kind::write, EIO);
  const std::uint64_t end = unit + GENERATE(2U, 200U);
  for (std::uint64_t offset = unit; offset < end; offset += 2)
    error_of([&] { bench.write(offset, pattern(1, 1)); });
  CHECK(error_of([&] { bench.cache->flush(bench.storage); }) == EIO);
  if (GENERATE(true, false))
    bench.cache->zero(bench.storage, {unit, unit + 4096}, {});
  else
    bench.cache->trim(bench.storage, {unit, unit + 4096}, false);
  CHECK(error_of([&] { bench.cache->flush(bench.storage); }) == 0);
  CHECK(bench.read(unit, 4096) == std::vector<std::byte>(4096));
}

TEST_CASE("full memory writes the oldest units, and refused memory lets writes through",
          "[write_cache]") {
  Bench bench(MemoryStorage::everything(disk_size), 4 * (unit + 8192));
  for (unsigned i = 1; i <= 8; ++i)
    bench.write(i * unit + 3, pattern(100, i));
  CHECK_FALSE(bench.storage.calls(Kind::write).empty());
  CHECK(bench.storage.calls(Kind::write)[0].range.begin == unit);
  CHECK(bench.budget.used() <= bench.budget.limit());

  const Refusal refusal(bench.storage, Kind::write, ENOSPC);
  unsigned refused = 0;
  for (unsigned i = 20; i <= 28; ++i)
    refused += error_of([&] { bench.write(i * unit + 3, pattern(100, i)); }) == ENOSPC ? 1 : 0;
  CHECK(refused > 0);
  for (unsigned i = 1; i <= 8; ++i)
    CHECK(bench.read(i * unit + 3, 100) == pattern(100, i));
}

TEST_CASE("FUA is durable when it is acknowledged", "[write_cache]") {
  Capabilities capabilities = MemoryStorage::everything(disk_size);
  capabilities.fua = GENERATE(Fua::none, Fua::emulate, Fua::native);
  Bench bench(capabilities);
  bench.write(unit + 50, pattern(100, 1)); // dirty in the block that FUA will write
  const auto data = pattern(3000, 2);
  bench.write(unit + 200, data, true);
  const auto durable = bench.storage.disk().durable();
  CHECK(std::equal(data.begin(), data.end(), durable.begin() + unit + 200));
  CHECK(bench.read(unit + 50, 100) == pattern(100, 1));
  for (const auto& call : bench.storage.calls(Kind::write)) {
    CHECK(call.range.begin % 4096 == 0);
    CHECK(call.range.end % 4096 == 0);
  }
  bench.cache->flush(bench.storage);
  CHECK(bench.on_disk(unit + 50, 100) == pattern(100, 1));
  CHECK(bench.on_disk(unit + 200, 3000) == data);
}

TEST_CASE("zero drops what is cached only after storage has said yes", "[write_cache]") {
  Bench bench;
  const auto data = pattern(9000, 1);
  bench.write(unit, data);
  {
    const Refusal refusal(bench.storage, Kind::zero, EIO);
    CHECK(error_of([&] { bench.cache->zero(bench.storage, {unit, unit + 4096}, {}); }) == EIO);
    CHECK(bench.read(unit, 9000) == data);
  }
  bench.cache->zero(bench.storage, {unit + 1000, unit + 5000}, {});
  auto expected = data;
  std::fill_n(expected.begin() + 1000, 4000, std::byte{0});
  CHECK(bench.read(unit, 9000) == expected);
  bench.cache->flush(bench.storage);
  CHECK(bench.on_disk(unit, 9000) == expected);
}

TEST_CASE("a fast zero that cannot be one request changes nothing", "[write_cache]") {
  Capabilities capabilities = MemoryStorage::everything(disk_size);
  capabilities.minimum = 512;
  Bench bench(capabilities);
  const auto data = pattern(3000, 1);
  bench.write(unit, data);
  bench.storage.forget_calls();
  Storage::ZeroOptions fast;
  fast.fast = true;
  CHECK(error_of([&] {
          bench.cache->zero(bench.storage, {unit + 1, unit + 1024}, fast);
        }) == ENOTSUP);
  CHECK(bench.storage.calls().empty());
  CHECK(bench.read(unit, 3000) == data);
  bench.cache->zero(bench.storage, {unit, unit + 1024}, fast);
  CHECK(bench.storage.calls(Kind::zero).size() == 1);
}

TEST_CASE("extents show what only the cache has as data", "[write_cache]") {
  Bench bench;
  bench.write(unit + 100, pattern(50, 1));
  const auto extents = bench.cache->extents(bench.storage, {unit, 2 * unit}, false);
  REQUIRE(extents.size() == 3);
  CHECK(extents[0].range == ByteRange{unit, unit + 100});
  CHECK(extents[0].type == Storage::ExtentType::hole_and_zero);
  CHECK(extents[1].range == ByteRange{unit + 100, unit + 150});
  CHECK(extents[1].type == Storage::ExtentType::data);
  CHECK(extents[2].range == ByteRange{unit + 150, 2 * unit});
}

TEST_CASE("the header is seen when it is written in pieces, changed, and removed",
          "[write_cache]") {
  EmptyBench bench;
  bench.cache->learn_layout(bench.storage);
  CHECK_FALSE(bench.cache->caching());
  const auto header = qcow2_header(21);
  bench.write(0, std::span(header).first(30));
  CHECK_FALSE(bench.cache->caching());
  bench.write(30, std::span(header).subspan(30));
  REQUIRE(bench.cache->caching());
  CHECK(bench.cache->unit_size() == 2 * 1024 * 1024);

  const auto dirty = pattern(1000, 1);
  bench.write(5 * unit, dirty);
  bench.write(0, qcow2_header(12));
  CHECK(bench.cache->caching());
  bench.cache->flush(bench.storage);
  CHECK(bench.cache->unit_size() == unit);
  CHECK(bench.on_disk(5 * unit, 1000) == dirty);

  bench.write(6 * unit, dirty);
  bench.cache->zero(bench.storage, {0, 512}, {});
  CHECK_FALSE(bench.cache->caching());
  CHECK(bench.read(6 * unit, 1000) == dirty);
  bench.write(6 * unit + 10, pattern(5, 2));
  CHECK(bench.read(6 * unit + 10, 5) == pattern(5, 2));
  bench.cache->flush(bench.storage);
  CHECK(bench.on_disk(6 * unit + 10, 5) == pattern(5, 2));
}

TEST_CASE("what was learned goes when the last connection ends", "[write_cache]") {
  Bench bench;
  const auto kept = pattern(100, 1);
  bench.write(unit, pattern(100, 2));
  bench.cache->flush(bench.storage);
  const Refusal refusal(bench.storage, Kind::write, EIO);
  bench.write(2 * unit, kept);
  CHECK(bench.cache->drain(bench.storage).value() == EIO);
  bench.cache->forget_all();
  CHECK_FALSE(bench.cache->caching());
  bench.storage.disk().write(unit, pattern(100, 3), true);
  CHECK(bench.read(unit, 100) == pattern(100, 3));
  CHECK(bench.read(2 * unit, 100) == kept);
  CHECK(bench.cache->unsaved().bytes == 100);
}

TEST_CASE("units that are left behind follow those that are completed", "[write_cache]") {
  Bench bench;
  bench.write(2 * unit, pattern(100, 2));
  for (std::uint64_t i = 3; i < 3 + WriteCache::left_behind_after - 1; ++i)
    bench.write(i * unit, pattern(unit, 3));
  CHECK(bench.on_disk(2 * unit, 100) == std::vector<std::byte>(100));
  bench.write(50 * unit, pattern(unit, 3));
  bench.write(60 * unit, pattern(1, 4)); // no request pays for all that waits
  CHECK(bench.on_disk(2 * unit, 100) == pattern(100, 2));
}

TEST_CASE("full units that wait side by side are merged", "[write_cache]") {
  Bench bench(with_writers(with_max_write(4 * unit)));
  const auto data = pattern(10 * unit, 1);
  for (std::uint64_t i = 0; i < 10; ++i)
    bench.write((1 + i) * unit, std::span(data).subspan(i * unit, unit));
  CHECK(bench.storage.calls(Kind::write).empty());
  bench.write_all_that_waits();
  const auto writes = bench.storage.calls(Kind::write);
  REQUIRE(writes.size() == 3);
  CHECK(writes[0].range == ByteRange{unit, 5 * unit});
  CHECK(bench.on_disk(unit, data.size()) == data);
}

TEST_CASE("a write as large as any that units are merged into goes as it came", "[write_cache]") {
  const auto writers = GENERATE(false, true);
  const WriteCache::Settings settings = with_max_write(4 * unit);
  Bench bench(writers ? with_writers(settings) : settings);
  const auto before = pattern(100, 2);
  bench.write(3 * unit + 5, before);
  bench.write(20 * unit + 5, before);
  const auto data = pattern(10 * unit, 1);

  SECTION("when it has nothing to be completed") {
    bench.write(unit + 4096, data);
    const auto writes = bench.storage.calls(Kind::write);
    REQUIRE(writes.size() == 1);
    CHECK(writes[0].range == ByteRange{unit + 4096, 11 * unit + 4096});
    CHECK(bench.storage.calls(Kind::read).empty());
    CHECK(bench.read(unit + 4096, data.size()) == data);
    CHECK(bench.read(20 * unit + 5, 100) == before);
    CHECK(bench.cache->clean({0, 12 * unit}));
  }
  SECTION("and not when a block would have to be read") {
    bench.write(unit + 100, data);
    CHECK(bench.storage.calls(Kind::read).empty());
  }
  SECTION("nor when it is no larger than a unit") {
    Bench holding(with_writers(with_max_write(unit)), 18);
    REQUIRE(holding.cache->unit_size() == 4 * unit);
    holding.write(8 * unit, std::span(data).first(4 * unit));
    CHECK(holding.storage.calls(Kind::write).empty());
  }
}

TEST_CASE("a large write may end where an odd export ends", "[write_cache]") {
  const std::uint64_t size = disk_size - 100;
  Bench bench(MemoryStorage::everything(size), plenty, with_max_write(4 * unit));
  bench.write(size - 4 * unit - 3996, pattern(4 * unit + 3996, 1));
  CHECK(bench.storage.calls(Kind::write).size() == 1);
  CHECK(bench.storage.calls(Kind::read).empty());
}

TEST_CASE("a writer is called once for all units that a write completes", "[write_cache]") {
  WriteCache::Settings settings = with_max_write(16 * unit);
  std::vector<std::size_t> woken;
  settings.wake_writer = [&](std::size_t waiting) { woken.push_back(waiting); };
  Bench bench(std::move(settings));
  bench.write(unit, pattern(7 * unit, 1));
  CHECK(woken == std::vector<std::size_t>{7});
}

namespace {

/// A cache whose units all have gone out with one write each, and which holds as much as keeps
/// writers busy.
struct InVain : Bench {
  InVain() : Bench(MemoryStorage::everything(disk_size), memory, with_writers()) {
    for (std::uint64_t i = 1; i <= 16; ++i)
      write(i * unit, block);
    cache->flush(storage);
    for (; storage.calls(Kind::write).size() == 16; ++held)
      write((20 + held) * unit, block);
    storage.forget_calls();
  }

  // Three eighths of it are 24 units.
  static constexpr std::size_t memory = 68 * std::size_t{unit};
  const std::vector<std::byte> block = pattern(4096, 1);
  std::uint64_t held = 0;
};

} // namespace

TEST_CASE("where holding spares storage nothing writes go through, as soon as writers have work",
          "[write_cache]") {
  InVain bench;
  CHECK(bench.held < 28);            // long before memory was full,
  CHECK(bench.cache->waiting() > 0); // and writers have been given work
  bench.write(60 * unit + 8192, bench.block);
  const auto writes = bench.storage.calls(Kind::write);
  REQUIRE(writes.size() == 1);
  CHECK(writes[0].range == ByteRange{60 * unit + 8192, 60 * unit + 8192 + 4096});

  SECTION("but not what lies in a unit that is held") {
    bench.write(20 * unit + 8192, bench.block);
    CHECK(bench.storage.calls(Kind::write).size() == 1);
    CHECK(bench.read(20 * unit + 8192, 4096) == bench.block);
  }
  SECTION("all of them in one piece") {
    bench.write(61 * unit - 4096, pattern(8192, 3));
    CHECK(bench.storage.calls(Kind::write).size() == 2);
  }
  SECTION("until it pays again") {
    for (std::uint64_t i = 1; i < 16; ++i)
      bench.write(20 * unit + i * 4096, bench.block);
    for (std::uint64_t i = 1; i < 16; ++i)
      bench.write(21 * unit + i * 4096, bench.block);
    bench.cache->flush(bench.storage);
    for (std::uint64_t i = 20; i < 50; ++i)
      bench.write(i * unit + 100, pattern(10, 1));
    bench.storage.forget_calls();
    bench.write(61 * unit, bench.block);
    CHECK(bench.storage.calls(Kind::write).empty());
  }
}

TEST_CASE("no more is held than storage writes in the time that a flush may take",
          "[write_cache]") {
  WriteCache::Settings settings = with_writers(with_max_write(unit));
  settings.max_delay = std::chrono::milliseconds(1);
  Bench bench(std::move(settings));
  // One that takes as long as a measurement: storage that slow may have but little to write.
  bench.storage.before = [](const MemoryStorage::Call& call) {
    if (call.kind == Kind::write)
      std::this_thread::sleep_for(std::chrono::milliseconds(300));
  };
  bench.write(unit, pattern(unit, 1));
  bench.cache->flush(bench.storage);
  bench.storage.before = nullptr;
  bench.storage.forget_calls();
  std::uint64_t written = 0;
  while (bench.storage.calls(Kind::write).empty() && written < 60)
    bench.write((4 + written++) * unit, pattern(100, 1));
  CHECK(written == 5); // four are held, and one of them had to go
  bench.cache->flush(bench.storage);
  bench.storage.forget_calls();
  bench.write(4 * unit, pattern(100, 1));
  CHECK(bench.storage.calls(Kind::write).empty());
}

TEST_CASE("a write whose turn comes when who knew the layout has left is aligned",
          "[write_cache]") {
  Bench bench;
  MemoryStorage guest(MemoryStorage::everything(disk_size));
  guest.disk().write(0, qcow2_header(16), true);
  bench.cache->admit(guest);
  Gate gate(bench.storage, Kind::write);
  WatchedThread first([&] { bench.write(3 * unit, pattern(100, 1), true); });
  gate.wait_until_reached();
  WatchedThread second([&] { bench.cache->write(guest, 3 * unit + 50, pattern(100, 2), false); });
  CHECK(second.waits());
  CHECK(bench.cache->found_anew(guest));
  gate.let_go();
  REQUIRE(first.ends());
  REQUIRE(second.ends());
  bench.cache->flush(guest);
  const auto writes = guest.calls(Kind::write);
  REQUIRE(writes.size() == 1);
  CHECK(writes[0].range == ByteRange{3 * unit, 3 * unit + 4096});
}

TEST_CASE("who came first is answered first, where they ask for the same bytes", "[write_cache]") {
  const bool gone = GENERATE(false, true);
  const bool fua = GENERATE(false, true);
  std::latch second_waits{1};
  std::atomic<bool> told = false;
  std::atomic<bool> first_is_gone = false;
  std::atomic<std::thread::id> first_thread;
  const auto tell = [&] {
    if (!told.exchange(true))
      second_waits.count_down();
  };
  WriteCache::Settings settings;
  settings.interrupted = [&] {
    if (std::this_thread::get_id() == first_thread.load())
      return first_is_gone.load();
    tell();
    return false;
  };
  // Memory for two units, and one that a connection alone may have.
  Bench bench(MemoryStorage::everything(disk_size), 2 * (unit + 16384), std::move(settings));
  bench.cache->forget_all();
  bench.cache->learn_layout(bench.storage);
  bench.write(unit, pattern(100, 1));

  const auto older = pattern(5000, 2);
  const auto newer = pattern(5000, 3);
  Gate gate(bench.storage, Kind::write);
  int first_error = -1;
  WatchedThread first([&] {
    first_thread = std::this_thread::get_id();
    first_error = error_of([&] { bench.write(9 * unit + 300, older); });
  });
  gate.wait_until_reached(); // it writes the unit that holds the memory
  first_is_gone = gone;
  WatchedThread second([&] {
    bench.write(9 * unit + 300, newer, fua);
    tell();
  });
  second_waits.wait();
  gate.let_go();
  REQUIRE(first.ends());
  REQUIRE(second.ends());
  CHECK(first_error == (gone ? ESHUTDOWN : 0));
  CHECK(bench.read(9 * unit + 300, newer.size()) == newer);
  bench.cache->flush(bench.storage);
  CHECK(bench.on_disk(9 * unit + 300, newer.size()) == newer);
  CHECK(bench.storage.violations().empty());
}

TEST_CASE("without background writers full units wait for a large write", "[write_cache]") {
  Bench bench(with_max_write(4 * unit));
  const auto data = pattern(7 * unit, 1);
  bench.write(unit, std::span(data).first(3 * unit));
  CHECK(bench.storage.calls(Kind::write).empty());
  bench.write(4 * unit, std::span(data).subspan(3 * unit, unit));
  REQUIRE(bench.storage.calls(Kind::write).size() == 1);
  CHECK(bench.storage.calls(Kind::write)[0].range == ByteRange{unit, 5 * unit});

  SECTION("a flush does not") {
    bench.write(5 * unit, std::span(data).subspan(4 * unit));
    CHECK(bench.storage.calls(Kind::write).size() == 1);
    bench.cache->flush(bench.storage);
    REQUIRE(bench.storage.calls(Kind::write).size() == 2);
    CHECK(bench.storage.calls(Kind::write)[1].range == ByteRange{5 * unit, 8 * unit});
    CHECK(bench.on_disk(unit, data.size()) == data);
  }
  SECTION("nor does what is left behind") {
    bench.write(5 * unit, std::span(data).subspan(4 * unit, unit + 1));
    bench.cache->queue_oldest();
    bench.write(20 * unit, std::span(data).first(1));
    CHECK(bench.on_disk(5 * unit, unit + 1) ==
          std::vector(data.begin() + 4 * unit, data.begin() + 5 * unit + 1));
  }
  SECTION("nor what waits when memory becomes scarce") {
    bench.write(5 * unit, std::span(data).subspan(4 * unit));
    bench.budget.set_limit(2 * unit);
    bench.write(20 * unit, std::span(data).first(1));
    CHECK(bench.on_disk(unit, data.size()) == data);
  }
}

TEST_CASE("the header that a client writes first is kept in memory", "[write_cache]") {
  EmptyBench bench;
  const auto header = qcow2_header(16);
  bench.cache->learn_layout(bench.storage);
  bench.write(0, header);
  bench.storage.forget_calls();
  CHECK(bench.read(0, header.size()) == header);
  CHECK(bench.storage.calls(Kind::read).empty());
  CHECK(bench.on_disk(0, header.size()) == header);
}

TEST_CASE("another cache's change is seen, and what is dirty survives it", "[write_cache]") {
  Bench bench;
  bench.write(unit, pattern(100, 1));
  bench.cache->flush(bench.storage);
  bench.write(unit + 200, pattern(100, 2));
  bench.storage.disk().write(unit, pattern(4096, 9), true);
  bench.cache->forget({unit, unit + 4096});
  CHECK(bench.read(unit, 200) == [&] {
    auto expected = pattern(4096, 9);
    expected.resize(200);
    return expected;
  }());
  bench.cache->flush(bench.storage);
  auto expected = pattern(4096, 9);
  std::ranges::copy(pattern(100, 2), expected.begin() + 200);
  CHECK(bench.on_disk(unit, 4096) == expected);
}

TEST_CASE("a unit in very many pieces keeps its bookkeeping small", "[write_cache]") {
  Bench bench;
  std::vector<std::byte> model(2 * unit);
  for (std::uint64_t offset = 0; offset < unit; offset += 3) {
    const auto data = pattern(1, static_cast<unsigned>(offset));
    bench.write(unit + offset, data, offset % 33 == 0);
    model[offset] = data[0];
    if (offset % 30 == 0) {
      bench.cache->zero(bench.storage, {unit + offset, unit + offset + 1}, {});
      model[offset] = std::byte{0};
    }
  }
  model.resize(unit);
  CHECK(bench.read(unit, unit) == model);
  bench.cache->flush(bench.storage);
  CHECK(bench.on_disk(unit, unit) == model);
}

namespace {

/// A cache of a disk of which two connections see different sizes.
struct TwoSizes {
  explicit TwoSizes(std::uint64_t smaller, WriteCache::Settings settings = {})
      : small(MemoryStorage::everything(smaller), disk) {
    settings.cluster_size = unit;
    cache = std::make_shared<WriteCache>(std::move(settings), large.capabilities(), ranges, budget);
  }

  const std::shared_ptr<MemoryDisk> disk = std::make_shared<MemoryDisk>(disk_size);
  RangeLock ranges;
  MemoryBudget budget{plenty};
  MemoryStorage large{MemoryStorage::everything(disk_size), disk};
  MemoryStorage small;
  std::shared_ptr<WriteCache> cache;
};

} // namespace

TEST_CASE("a connection that sees a smaller export cannot write what lies behind",
          "[write_cache]") {
  TwoSizes seen(2 * unit + 100);
  const auto data = pattern(200, 1);
  seen.cache->write(seen.large, 2 * unit + 50, data, false);
  CHECK(error_of([&] { seen.cache->flush(seen.small); }) == EIO);
  seen.cache->write(seen.small, unit, data, false);
  {
    const Refusal refusal(seen.small, Kind::write, ENOSPC);
    // Storage's own answer comes first.
    CHECK(error_of([&] { seen.cache->flush(seen.small); }) == ENOSPC);
  }
  CHECK(seen.small.violations().empty());
  seen.cache->flush(seen.large);
  CHECK(seen.disk->read(2 * unit + 50, 200) == data);
}

TEST_CASE("what a guest changes is on its own storage, and takes nothing from others",
          "[write_cache]") {
  Bench bench;
  MemoryStorage guest(MemoryStorage::everything(disk_size)); // another disk, as may turn out
  guest.disk().write(0, pattern(10 * unit, 9), true);
  bench.cache->admit(guest);
  REQUIRE(guest.is_guest());
  const auto data = pattern(3 * unit + 5000, 1);
  bench.write(unit + 100, std::span(data).first(5000));
  bench.cache->flush(bench.storage);
  bench.write(5 * unit + 100, data);
  bench.write_all_that_waits();
  bench.write(5 * unit + 100, data); // some of it clean, all of it dirty again
  const std::uint64_t unsaved = bench.cache->unsaved().bytes;
  bench.storage.forget_calls();

  auto expected = pattern(10 * unit, 9);
  const auto at = [&](std::uint64_t offset) {
    return expected.begin() + static_cast<std::ptrdiff_t>(offset);
  };
  const ByteRange range{5 * unit + 300, 7 * unit + 1000};
  SECTION("by a write") {
    const auto written = pattern(range.size(), 2);
    bench.cache->write(guest, range.begin, written, GENERATE(false, true));
    std::ranges::copy(written, at(range.begin));
    const auto elsewhere = pattern(100, 3);
    bench.cache->write(guest, unit + 200, elsewhere, false);
    std::ranges::copy(elsewhere, at(unit + 200));
  }
  SECTION("by a zero") {
    bench.cache->zero(guest, range, {});
    std::fill(at(range.begin), at(range.end), std::byte{0});
  }
  SECTION("by a trim") {
    bench.cache->trim(guest, range, false);
    std::fill(at(range.begin), at(range.end), std::byte{0});
  }
  std::vector<std::byte> seen(10 * unit);
  guest.disk().read(0, seen);
  CHECK(seen == expected);
  bench.cache->read(guest, 0, seen);
  CHECK(seen == expected);
  CHECK(bench.storage.calls().empty());
  CHECK(bench.cache->unsaved().bytes == unsaved);
  CHECK(bench.read(5 * unit + 100, data.size()) == data);
  bench.cache->flush(bench.storage);
  CHECK(bench.on_disk(5 * unit + 100, data.size()) == data);
  guest.disk().read(0, seen);
  CHECK(seen == expected);
  CHECK(guest.violations().empty());
}

TEST_CASE("who founds a cache anew is the only one who is trusted, and nothing else is known",
          "[write_cache]") {
  Bench bench;
  bench.cache->admit(bench.storage);
  bench.cache->trust(bench.storage);
  MemoryStorage founder(MemoryStorage::everything(disk_size));
  bench.cache->admit(founder);
  bench.write(5 * unit, pattern(5000, 1));
  CHECK_FALSE(bench.cache->found_anew(founder)); // somebody's bytes are not stored yet
  CHECK(founder.is_guest());
  CHECK_FALSE(bench.storage.is_guest());
  bench.cache->flush(bench.storage);
  CHECK(bench.budget.used() > 0);
  REQUIRE(bench.cache->found_anew(founder));
  CHECK_FALSE(founder.is_guest());
  CHECK(bench.storage.is_guest());
  CHECK(bench.budget.used() == 0);
  CHECK_FALSE(bench.cache->caching());
  CHECK(bench.cache->compare(founder, Unit::Clock::now()) == WriteCache::Likeness::unknown);
  std::vector<std::byte> seen(5000);
  bench.cache->read(founder, 5 * unit, seen);
  CHECK(seen == std::vector<std::byte>(5000));
}

TEST_CASE("what is unsaved goes with what storage last said of it", "[write_cache]") {
  Bench bench;
  for (unsigned i = 1; i <= 8; ++i)
    bench.write(2 * i * unit, pattern(100, i));
  CHECK_FALSE(bench.cache->unsaved().error);
  {
    const Refusal refusal(bench.storage, Kind::write, EDQUOT);
    CHECK(bench.cache->drain(bench.storage).value() == EDQUOT);
  }
  CHECK(bench.cache->unsaved().error.value() == EDQUOT);
  CHECK(bench.cache->unsaved().ranges.count() == 8);
}

TEST_CASE("trimmed bytes are not written back, however fragmented their unit is", "[write_cache]") {
  Bench bench;
  {
    const Refusal refusal(bench.storage, Kind::write, EIO);
    for (std::uint64_t offset = 0; offset < 200; offset += 2)
      error_of([&] { bench.write(unit + offset, pattern(1, 1)); });
    bench.cache->trim(bench.storage, {unit + 20, unit + 150}, false);
  }
  bench.cache->flush(bench.storage);
  CHECK(bench.on_disk(unit + 20, 130) == std::vector<std::byte>(130));
}

TEST_CASE("full neighbours that a connection cannot reach stay queued for another",
          "[write_cache]") {
  TwoSizes seen(2 * unit, with_writers());
  seen.cache->write(seen.large, 0, pattern(5 * unit, 1), false);
  CHECK(seen.cache->waiting() == 5);
  while (seen.cache->write_next(seen.small)) {
  }
  CHECK(seen.cache->waiting() == 3);
  while (seen.cache->write_next(seen.large)) {
  }
  CHECK(seen.cache->clean());
  CHECK(seen.small.violations().empty());
}

TEST_CASE("what others wrote does not go through a guest's storage", "[write_cache]") {
  Bench bench; // nobody is lent: all units go through whoever comes by
  MemoryStorage guest(MemoryStorage::everything(disk_size));
  bench.cache->admit(guest);
  const auto data = pattern(disk_size / 2, 1);
  bench.write(unit, pattern(500, 1));
  SECTION("with its flush") {
    bench.cache->flush(guest);
  }
  SECTION("with its write") {
    bench.cache->tick();
    bench.cache->queue_oldest();
    bench.cache->write(guest, 9 * unit, pattern(512, 2), false);
    CHECK(guest.calls(Kind::write).size() == 1);
    guest.forget_calls();
  }
  SECTION("with its trim") {
    bench.cache->trim(guest, {unit, 2 * unit}, false);
  }
  SECTION("at its end") {
    std::ignore = bench.cache->drain(guest);
  }
  CHECK(guest.calls(Kind::write).empty());
  CHECK(bench.read(unit, 500) == pattern(500, 1));
  bench.cache->flush(bench.storage);
  CHECK(bench.on_disk(unit, 500) == pattern(500, 1));
}

TEST_CASE("a connection that becomes a guest teaches the cache nothing any more", "[write_cache]") {
  Capabilities capabilities = MemoryStorage::everything(disk_size);
  capabilities.maximum = 64 * 1024;
  EmptyBench bench(capabilities);
  MemoryStorage founder(capabilities);
  const auto mine = pattern(disk_size, 1);
  founder.disk().write(0, mine, true);
  founder.disk().write(0, qcow2_header(16), true);
  bench.cache->admit(bench.storage);
  bench.cache->trust(bench.storage);
  bench.cache->admit(founder);
  SECTION("of zeros") {
    bench.storage.disk().write(0, qcow2_header(16), true);
    // Storage answers for 64 KiB at a time.
    bench.storage.before = [&](const MemoryStorage::Call& call) {
      if (call.kind == Kind::extents && !bench.storage.is_guest())
        CHECK(bench.cache->found_anew(founder));
    };
    bench.write(10, pattern(100 * 1024, 2), true);
    bench.cache->write(founder, 120 * 1024 + 10, pattern(10, 3), true);
    const auto stored = founder.disk().read(120 * 1024, 4096);
    CHECK(std::equal(stored.begin() + 20, stored.end(), mine.begin() + 120 * 1024 + 20));
  }
  SECTION("of the header") {
    bench.storage.disk().write(0, qcow2_header(16), true);
    std::optional<RangeLock::Owned> owned(bench.ranges.own({0, 4096}));
    WatchedThread asks([&] { bench.cache->learn_layout(bench.storage); });
    CHECK(asks.waits());
    CHECK(bench.cache->found_anew(founder));
    owned.reset();
    CHECK(asks.ends());
    CHECK_FALSE(bench.cache->header().known);
    CHECK(bench.cache->compare(founder, WriteCache::Clock::now()) == WriteCache::Likeness::unknown);
  }
  SECTION("of how its disk begins") {
    std::optional<RangeLock::Owned> owned(bench.ranges.own({0, 4096}));
    WatchedThread looks([&] { bench.cache->look_at_disk(bench.storage); });
    CHECK(looks.waits());
    CHECK(bench.cache->found_anew(founder));
    owned.reset();
    CHECK(looks.ends());
    CHECK(bench.cache->compare(founder, WriteCache::Clock::now()) == WriteCache::Likeness::unknown);
  }
}

TEST_CASE("a unit that is dropped and begun anew while a connection is looked for is another one",
          "[write_cache]") {
  WriteCache* cache = nullptr;
  MemoryStorage* another = nullptr;
  WriteCache::Settings settings = with_max_write(unit);
  bool looked_for = false;
  settings.lend = [&](const WriteCache::Next&) -> std::optional<Handle::Use> {
    if (!std::exchange(looked_for, true)) {
      cache->discard({unit, 2 * unit});
      cache->write(*another, unit, pattern(100, 2), false);
      cache->queue_oldest();
    }
    return std::nullopt;
  };
  Bench bench(settings);
  MemoryStorage other(MemoryStorage::everything(disk_size));
  cache = bench.cache.get();
  another = &other;
  cache->write(other, unit, pattern(100, 1), false);
  cache->queue_oldest();
  CHECK_FALSE(cache->write_next(bench.storage));
  CHECK(looked_for);
  CHECK(bench.read(unit, 100) == pattern(100, 2));
  CHECK(cache->waiting() == 0); // nobody can write it now
}

TEST_CASE("units that wait because another was refused are tried again, whatever becomes of that",
          "[write_cache]") {
  WriteCache::Settings settings = with_writers();
  settings.retry = std::chrono::milliseconds(0);
  Bench bench(settings);
  bench.write(2 * unit, pattern(unit, 1));
  bench.write(4 * unit, pattern(100, 2));
  {
    const Refusal refusal(bench.storage, Kind::write, ENOSPC);
    bench.cache->write_next(bench.storage);
  }
  bench.cache->tick();         // the one that was refused is queued again,
  bench.cache->tick();         // and still waits;
  bench.cache->queue_oldest(); // the other: storage is full, as far as is known
  bench.cache->trim(bench.storage, {2 * unit, 3 * unit}, false); // now nobody wants the first
  bench.cache->tick();
  CHECK(bench.cache->write_next(bench.storage));
  CHECK(bench.on_disk(4 * unit, 100) == pattern(100, 2));
  CHECK(bench.cache->clean());
}

TEST_CASE("who has storage read the header is not overtaken meanwhile", "[write_cache]") {
  EmptyBench bench;
  bench.storage.disk().write(0, qcow2_header(16), true);
  Gate gate(bench.storage, Kind::read);
  WatchedThread older([&] { bench.write(2 * unit, pattern(100, 1)); });
  gate.wait_until_reached();
  WatchedThread newer([&] { bench.write(2 * unit, pattern(100, 2)); });
  CHECK(newer.waits());
  gate.let_go();
  REQUIRE(older.ends());
  REQUIRE(newer.ends());
  CHECK(bench.read(2 * unit, 100) == pattern(100, 2));
}

TEST_CASE("a header that changes while others write leaves every byte right", "[write_cache]") {
  Bench bench(WriteCache::Settings{}, 21);
  std::atomic<bool> done = false;
  std::jthread header([&] {
    for (unsigned i = 0; !done; ++i) {
      bench.write(0, qcow2_header(i % 2 == 0 ? 16 : 21));
      bench.cache->flush(bench.storage);
    }
  });
  const auto data = pattern(3 * unit, 1);
  for (unsigned i = 0; i < 300; ++i) {
    const std::uint64_t offset = 32 * unit + i % 28 * unit + i * 37 % 999;
    bench.write(offset, data);
    REQUIRE(bench.read(offset, data.size()) == data);
  }
  done = true;
}

TEST_CASE("with a cluster size that was asked for, a write that is held asks for nothing",
          "[write_cache]") {
  unsigned asked = 0;
  WriteCache::Settings settings;
  settings.cluster_size = unit;
  settings.interrupted = [&] {
    ++asked;
    return false;
  };
  EmptyBench bench(MemoryStorage::everything(disk_size), plenty, std::move(settings));
  for (std::uint64_t i = 0; i < 10; ++i)
    bench.write(i * 64, pattern(64, 1));
  bench.cache->forget_all();
  bench.write(unit, pattern(64, 1));
  CHECK(asked == 0);
  CHECK(bench.storage.calls(Kind::read).empty());
}

TEST_CASE("who waits for storage that hangs keeps memory from nobody", "[write_cache]") {
  // Whose storage hangs: of who is ahead in the same unit, or of who has dirty bytes when memory is
  // used up.
  const bool ahead = GENERATE(true, false);
  std::unique_ptr<Handle> lent;
  WriteCache::Settings settings = with_writers(); // they are all busy elsewhere
  settings.cluster_size = unit;
  settings.lend = [&](const WriteCache::Next& /*next*/) { return lent->use(); };
  EmptyBench bench(MemoryStorage::everything(disk_size), plenty, std::move(settings));
  auto owned = std::make_unique<MemoryStorage>(bench.storage.capabilities());
  MemoryStorage& hangs = *owned;
  if (ahead)
    lent = std::make_unique<Handle>(std::make_unique<MemoryStorage>(bench.storage.capabilities()));
  else
    lent = std::make_unique<Handle>(std::move(owned));
  std::vector<std::shared_ptr<MemoryBudget::Buffer>> others;
  const auto others_take_all = [&] {
    for (const std::size_t size : {unit, std::uint64_t{4096}}) {
      while (auto buffer = bench.budget.try_take(size, 0))
        others.push_back(std::move(buffer));
    }
  };
  // Something is saved by holding, so that memory is worth waiting for.
  for (std::uint64_t i = 0; i < 120; ++i)
    bench.cache->write(hangs, 20 * unit + i % 3 * unit + i / 3 * 100, pattern(100, 1), false);
  others_take_all();

  Gate gate(hangs, Kind::write);
  std::optional<WatchedThread> first;
  if (ahead) {
    first.emplace([&] { bench.cache->write(hangs, 11 * unit, pattern(4096, 2), true); });
    gate.wait_until_reached();
  }
  WatchedThread waiting([&] { bench.write(10 * unit, pattern(unit + 4096, 3)); });
  if (ahead)
    CHECK(waiting.waits());
  else
    gate.wait_until_reached();
  others.clear();
  bench.budget.note_change();
  MemoryStorage healthy(bench.storage.capabilities());
  WatchedThread another([&] { bench.cache->write(healthy, 40 * unit, pattern(100, 4), false); });
  CHECK(another.ends());
  gate.let_go();
}
