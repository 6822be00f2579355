#include "storage/readback_storage.hpp"

#include "cache/write_cache.hpp"

#include "catch.hpp"
#include "error_of.hpp"
#include "image_bytes.hpp"
#include "memory_storage.hpp"
#include "watched_thread.hpp"

#include <cerrno>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

using namespace qcowcache;
using Kind = MemoryStorage::Kind;

namespace {

constexpr std::uint64_t unit = WriteCache::least_unit_size;
constexpr std::uint64_t disk_size = 16 * unit;

/// Passes everything on, and damages one byte of what has just been written when told to.
class DamagingStorage final : public Storage {
public:
  explicit DamagingStorage(MemoryStorage& below) : below_(below) {}

  /// The next write that covers this byte stores another one there, and so on for as many writes.
  void damage(std::uint64_t offset, unsigned writes = 1) {
    damaged_ = offset;
    writes_ = writes;
  }

  [[nodiscard]] const Capabilities& capabilities() const noexcept override {
    return below_.capabilities();
  }

protected:
  void do_read(std::uint64_t offset, std::span<std::byte> data) override {
    below_.read(offset, data);
  }
  void do_write(std::uint64_t offset, std::span<const std::byte> data, bool fua) override {
    below_.write(offset, data, fua);
    if (writes_ == 0 || !ByteRange{offset, offset + data.size()}.contains({damaged_, damaged_ + 1}))
      return;
    --writes_;
    const std::byte other = data[damaged_ - offset] ^ std::byte{0x40};
    below_.disk().write(damaged_, std::span(&other, 1), fua);
  }
  void do_flush() override { below_.flush(); }
  void do_zero(const ByteRange& range, const ZeroOptions& options) override {
    below_.zero(range, options);
  }
  void do_trim(const ByteRange& range, bool fua) override { below_.trim(range, fua); }
  void do_cache(const ByteRange& range) override { below_.cache(range); }
  Extents do_extents(const ByteRange& range, bool only_first) override {
    return below_.extents(range, only_first);
  }

private:
  MemoryStorage& below_;
  std::uint64_t damaged_ = 0;
  unsigned writes_ = 0;
};

struct Difference {
  ByteRange range;
  std::uint64_t first = 0;
};

/// Readback over storage that damages, over a disk in memory.
struct Bench {
  explicit Bench(const Capabilities& capabilities = MemoryStorage::everything(disk_size))
      : disk(capabilities) {
    auto damages = std::make_unique<DamagingStorage>(disk);
    damaging = damages.get();
    storage = std::make_unique<ReadbackStorage>(
        std::move(damages), [this](const ByteRange& range, std::uint64_t first) {
          reported.push_back({range, first});
        });
  }

  [[nodiscard]] std::vector<std::byte> stored(std::uint64_t offset, std::size_t size) const {
    return disk.disk().read(offset, size);
  }

  MemoryStorage disk;
  DamagingStorage* damaging = nullptr;
  std::unique_ptr<ReadbackStorage> storage;
  std::vector<Difference> reported;
};

/// A cache over that.
struct CacheBench : Bench {
  explicit CacheBench(const Capabilities& capabilities = MemoryStorage::everything(disk_size),
                      std::size_t memory = std::size_t{32} * 1024 * 1024)
      : Bench(capabilities), budget(memory),
        cache(std::make_shared<WriteCache>(settings(), capabilities, ranges, budget)) {
    budget.add_holder(cache);
  }
  static WriteCache::Settings settings() {
    WriteCache::Settings result;
    result.cluster_size = unit;
    return result;
  }

  /// A client writes these bytes during storage's next call of that kind.
  void write_during(Kind kind, std::uint64_t offset, const std::vector<std::byte>& data) {
    disk.before = [this, kind, offset, data](const MemoryStorage::Call& call) {
      if (call.kind == kind && !std::exchange(written, true))
        cache->write(*storage, offset, data, false);
    };
  }

  bool written = false;
  RangeLock ranges;
  MemoryBudget budget;
  std::shared_ptr<WriteCache> cache;
};

} // namespace

TEST_CASE("a write is read back once", "[readback_storage]") {
  Bench bench;
  const auto data = pattern(5000, 1);
  bench.storage->write(77, data, true);
  const auto calls = bench.disk.calls();
  REQUIRE(calls.size() == 2);
  CHECK(calls[0].kind == Kind::write);
  CHECK(calls[0].range == ByteRange{77, 5077});
  CHECK(calls[0].fua);
  CHECK(calls[1].kind == Kind::read);
  CHECK(calls[1].range == ByteRange{77, 5077});
  CHECK(bench.reported.empty());
}

TEST_CASE("a write in pieces is read back in the same pieces", "[readback_storage]") {
  Capabilities capabilities = MemoryStorage::everything(disk_size);
  capabilities.minimum = 512;
  capabilities.maximum = 8192;
  Bench bench(capabilities);
  bench.storage->write(512, pattern(20480, 1), false);
  CHECK(bench.disk.calls(Kind::write).size() == bench.disk.calls(Kind::read).size());
  CHECK(bench.disk.violations().empty());
}

TEST_CASE("nothing else is read back", "[readback_storage]") {
  Bench bench;
  bench.storage->zero({0, 4096}, {});
  bench.storage->trim({0, 4096}, false);
  bench.storage->cache({0, 4096});
  bench.storage->flush();
  CHECK(bench.disk.calls(Kind::read).empty());
  std::vector<std::byte> data(10);
  bench.storage->read(5, data);
  CHECK(bench.disk.calls(Kind::read).size() == 1);
}

TEST_CASE("other bytes are an error, which names the first of them", "[readback_storage]") {
  Bench bench;
  bench.damaging->damage(1234);
  CHECK_THROWS_AS(bench.storage->write(1000, pattern(500, 1), false), NotAsWritten);
  REQUIRE(bench.reported.size() == 1);
  CHECK(bench.reported[0].range == ByteRange{1000, 1500});
  CHECK(bench.reported[0].first == 1234);
  bench.storage->write(1000, pattern(500, 1), false);
  CHECK(bench.reported.size() == 1);
}

TEST_CASE("a write that cannot be read back has storage's own error", "[readback_storage]") {
  Bench bench;
  bench.disk.before = MemoryStorage::refusal(Kind::read, ENOMEDIUM);
  std::optional<int> error;
  try {
    bench.storage->write(1000, pattern(500, 1), false);
  } catch (const NotAsWritten& refusal) {
    error = refusal.code().value();
  }
  CHECK(error == ENOMEDIUM);
  CHECK(bench.reported.empty());
}

TEST_CASE("a damaged unit stays dirty until it is stored as it was", "[readback_storage]") {
  CacheBench bench;
  const auto data = pattern(unit, 1);
  bench.damaging->damage(unit + 300, 2);
  bench.cache->write(*bench.storage, unit, data, false);
  for (unsigned i = 0; i < 2; ++i) {
    CHECK(error_of([&] { bench.cache->flush(*bench.storage); }) == EIO);
    CHECK(bench.cache->unsaved().bytes == unit);
  }
  bench.cache->flush(*bench.storage);
  CHECK(bench.cache->clean());
  CHECK(bench.stored(unit, unit) == data);
  CHECK(bench.reported.size() == 2);
}

TEST_CASE("damage beside what was dirty is healed, too", "[readback_storage]") {
  CacheBench bench;
  const auto earlier = pattern(unit, 1);
  SECTION("bytes that the unit still knows") {
    bench.cache->write(*bench.storage, unit + 1, std::span(earlier).subspan(1, 8000), false);
    bench.cache->flush(*bench.storage);
  }
  SECTION("bytes that are read to complete a block") {
    bench.disk.disk().write(unit + 1, std::span(earlier).subspan(1, 8000), true);
  }
  // Damaged is a neighbour in the same block, which no client has written again.
  bench.damaging->damage(unit + 4200);
  bench.cache->write(*bench.storage, unit + 5000, pattern(10, 2), false);
  CHECK(error_of([&] { bench.cache->flush(*bench.storage); }) == EIO);
  bench.cache->flush(*bench.storage);
  auto expected = earlier;
  std::ranges::copy(pattern(10, 2), expected.begin() + 5000);
  CHECK(bench.stored(unit + 1, 8000) ==
        std::vector<std::byte>(expected.begin() + 1, expected.begin() + 8001));
  CHECK(bench.disk.violations().empty());
}

TEST_CASE("a damaged write-through is the client's error; its neighbours are healed",
          "[readback_storage]") {
  CacheBench bench;
  const auto earlier = pattern(unit, 1);
  bench.disk.disk().write(unit, earlier, true);
  bench.damaging->damage(unit + 50);
  const auto fua = pattern(100, 3);
  CHECK(error_of([&] { bench.cache->write(*bench.storage, unit + 1000, fua, true); }) == EIO);
  bench.cache->flush(*bench.storage);
  CHECK(bench.stored(unit, 1000) ==
        std::vector<std::byte>(earlier.begin(), earlier.begin() + 1000));
  CHECK(bench.stored(unit + 1100, 2000) ==
        std::vector<std::byte>(earlier.begin() + 1100, earlier.begin() + 3100));
}

TEST_CASE("what a client writes while a damaged unit is being written wins", "[readback_storage]") {
  CacheBench bench;
  const auto data = pattern(unit, 1);
  const auto newer = pattern(100, 2);
  bench.write_during(Kind::read, unit + 7, newer);
  bench.damaging->damage(unit + 300);
  bench.cache->write(*bench.storage, unit, data, false);
  CHECK(error_of([&] { bench.cache->flush(*bench.storage); }) == EIO);
  CHECK(bench.written);
  bench.cache->flush(*bench.storage);
  auto expected = data;
  std::ranges::copy(newer, expected.begin() + 7);
  CHECK(bench.stored(unit, unit) == expected);
}

TEST_CASE("what a client writes while a damaged write-through is going on wins",
          "[readback_storage]") {
  CacheBench bench;
  const auto earlier = pattern(unit, 1);
  bench.disk.disk().write(unit, earlier, true);
  const auto newer = pattern(100, 2);
  bench.write_during(Kind::write, unit + 500, newer);
  bench.damaging->damage(unit + 50);
  CHECK(error_of([&] { bench.cache->write(*bench.storage, unit + 1000, pattern(100, 3), true); }) ==
        EIO);
  CHECK(bench.written);
  bench.cache->flush(*bench.storage);
  auto expected = earlier;
  std::ranges::copy(newer, expected.begin() + 500);
  CHECK(bench.stored(unit, 1000) ==
        std::vector<std::byte>(expected.begin(), expected.begin() + 1000));
}

TEST_CASE("neighbours of a damaged write-through are healed though others wait for their block",
          "[readback_storage]") {
  CacheBench bench;
  WriteCache::Settings settings = CacheBench::settings();
  bool noted = false;
  settings.hold = [&] { return noted = true; };
  settings.release = [&] { noted = false; };
  bench.cache = std::make_shared<WriteCache>(std::move(settings), bench.disk.capabilities(),
                                             bench.ranges, bench.budget);
  const auto earlier = pattern(unit, 1);
  bench.disk.disk().write(unit, earlier, true);
  bench.damaging->damage(unit + 50);
  const auto newer = pattern(100, 2);
  std::optional<WatchedThread> other;
  bench.disk.before = [&](const MemoryStorage::Call& call) {
    if (call.kind == Kind::write && !other) {
      other.emplace([&] { bench.cache->write(*bench.storage, unit + 20, newer, true); });
      CHECK(other->waits());
    }
  };
  CHECK(error_of([&] { bench.cache->write(*bench.storage, unit + 1000, pattern(100, 3), true); }) ==
        EIO);
  REQUIRE(other->ends());
  CHECK(noted);
  bench.cache->flush(*bench.storage);
  CHECK_FALSE(noted);
  auto expected = earlier;
  std::ranges::copy(newer, expected.begin() + 20);
  CHECK(bench.stored(unit, 1000) ==
        std::vector<std::byte>(expected.begin(), expected.begin() + 1000));
}

TEST_CASE("neighbours that cannot be kept in memory are written once more", "[readback_storage]") {
  CacheBench bench(MemoryStorage::everything(disk_size), 4 * unit);
  const auto earlier = pattern(unit, 1);
  bench.disk.disk().write(unit, earlier, true);
  std::vector<std::shared_ptr<MemoryBudget::Buffer>> hoard;
  while (auto buffer = bench.budget.try_take(unit, 0))
    hoard.push_back(std::move(buffer));
  bench.damaging->damage(unit + 50);
  const auto fua = pattern(100, 3);
  bench.cache->write(*bench.storage, unit + 1000, fua, true);
  CHECK(bench.reported.size() == 1);
  auto expected = earlier;
  std::ranges::copy(fua, expected.begin() + 1000);
  CHECK(bench.stored(unit, unit) == expected);
}
