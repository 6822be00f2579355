#include "verify/verifier.hpp"

#include "catch.hpp"
#include "compressed_bytes.hpp"
#include "image_bytes.hpp"
#include "watched_thread.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

using namespace qcowcache;
using qcow2::Compression;
using Outcome = Verifier::Outcome;

namespace {

constexpr std::uint32_t bits = 12;
constexpr std::uint64_t cluster = 1U << bits;
constexpr std::uint64_t image_size = 1024 * cluster;
constexpr std::uint64_t l1_at = 3 * cluster;
constexpr std::uint64_t l2_at = 4 * cluster;
constexpr std::uint64_t data_at = 10 * cluster;

std::vector<std::byte> number(std::uint64_t value, unsigned width = 8) {
  std::vector<std::byte> bytes;
  for (unsigned shift = width * 8; shift > 0; shift -= 8)
    bytes.push_back(static_cast<std::byte>(value >> (shift - 8) & 0xffU));
  return bytes;
}

/// The same number so many times.
std::vector<std::byte> numbers(std::uint64_t value, std::size_t count) {
  std::vector<std::byte> bytes;
  for (const auto one = number(value); count > 0; --count)
    bytes.insert(bytes.end(), one.begin(), one.end());
  return bytes;
}

/// The L2 entry of a compressed cluster.
std::uint64_t entry_of(std::uint64_t offset, std::uint64_t size) {
  const std::uint64_t sectors = (offset + size - 1) / 512 - offset / 512;
  return std::uint64_t{1} << 62U | sectors << (62 - (bits - 8)) | offset;
}

/// A file in memory.
class MemoryImage final : public Verifier::Image {
public:
  std::optional<qcow2::Header> header() override {
    if (before_header)
      std::exchange(before_header, nullptr)();
    const std::lock_guard lock(mutex_);
    return qcow2::parse_header(std::span(bytes).first(qcow2::header_bytes));
  }
  const char* header_fault() override {
    const std::lock_guard lock(mutex_);
    return qcow2::header_fault(std::span(bytes).first(qcow2::header_bytes));
  }
  [[nodiscard]] const void* client() const override { return this; }
  [[nodiscard]] std::uint64_t size() const override { return seen.value_or(bytes.size()); }
  [[nodiscard]] std::uint64_t largest_size() const override { return bytes.size(); }
  void read(std::uint64_t offset, std::span<std::byte> data) override {
    ++reads;
    if (refuses || unreadable.overlaps({offset, offset + data.size()}))
      throw std::system_error(ENOMEDIUM, std::generic_category(), "refused");
    Meeting now;
    if (meeting.at.overlaps({offset, offset + data.size()}))
      now = std::exchange(meeting, {});
    if (now.before)
      now.before();
    {
      const std::lock_guard lock(mutex_);
      std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(offset), data.size(), data.begin());
    }
    if (now.after)
      now.after();
  }
  void store(std::uint64_t offset, std::span<const std::byte> data) {
    const std::lock_guard lock(mutex_);
    std::ranges::copy(data, bytes.begin() + static_cast<std::ptrdiff_t>(offset));
  }

  std::vector<std::byte> bytes = std::vector<std::byte>(image_size);
  std::atomic<unsigned> reads = 0;
  bool refuses = false;
  ByteRange unreadable;
  /// Of the bytes, where that is not all of them.
  std::optional<std::uint64_t> seen;
  /// What happens, once, while something there is read: before its bytes are taken, and after.
  struct Meeting {
    ByteRange at;
    std::function<void()> before;
    std::function<void()> after;
  };
  Meeting meeting;
  /// What happens, once, while the header is read.
  std::function<void()> before_header;

private:
  std::mutex mutex_;
};

/// A client of the verifier writes this.
void client_writes(Verifier& verifier, MemoryImage& image, std::uint64_t offset,
                   std::span<const std::byte> data) {
  Verifier::Change change(&verifier, image, {offset, offset + data.size()});
  image.store(offset, data);
  change.wrote(data);
}

constexpr std::size_t plenty = 64U << 20U;

/// Before there is an image.
struct EmptyBench {
  explicit EmptyBench(std::chrono::milliseconds patience = {}, std::size_t memory = plenty)
      : budget(memory), verifier(settings(patience), budget) {}

  Verifier::Settings settings(std::chrono::milliseconds patience) {
    Verifier::Settings result;
    result.patience = patience;
    result.report = [this](const std::string& line) { reported.push_back(line); };
    result.counters = counters;
    result.decompressors = decompressors;
    result.interrupted = [this] {
      std::ignore = verifier.failing(); // no mutex is held, or this would not return
      ++asked;
      return asked >= interrupted_from;
    };
    return result;
  }
  [[nodiscard]] unsigned decodings() const { return times / 2; }
  [[nodiscard]] std::uint64_t operator[](Count what) const { return counters->totals()[what]; }

  void write(std::uint64_t offset, std::span<const std::byte> data) {
    client_writes(verifier, image, offset, data);
  }
  void zero(const ByteRange& range) {
    Verifier::Change change(&verifier, image, range);
    image.store(range.begin, std::vector<std::byte>(range.size()));
    change.zeroed();
  }
  Outcome check() { return verifier.check(image); }
  void take_memory() {
    budget.set_limit(0);
    verifier.shrink();
  }
  /// None is in memory afterwards.
  void drop_tables() {
    take_memory();
    budget.set_limit(plenty);
  }

  /// An image as QEMU creates it, with one empty L2 table.
  void create(Compression compression) {
    write_header(compression);
    write(l1_at, std::vector<std::byte>(64));
    CHECK(check() == Outcome::clean);
    write(l2_at, std::vector<std::byte>(cluster));
    CHECK(check() == Outcome::clean);
    write(l1_at, number(std::uint64_t{1} << 63U | l2_at));
    CHECK(check() == Outcome::clean);
    image.reads = 0;
  }
  void write_header(Compression compression) {
    auto header = qcow2_header(bits);
    const auto put = [&](std::size_t at, std::uint64_t value, unsigned width) {
      std::ranges::copy(number(value, width), header.begin() + static_cast<std::ptrdiff_t>(at));
    };
    put(24, std::uint64_t{8} * 512 * cluster, 8);
    put(36, 8, 4);
    put(40, l1_at, 8);
    if (compression == Compression::zstd) {
      put(72, 8, 8);
      put(104, 1, 1);
    }
    write(0, header);
  }
  void publish(std::uint32_t index, std::uint64_t entry) {
    write(l2_at + index * 8, number(entry));
  }

  MemoryBudget budget;
  MemoryImage image;
  std::vector<std::string> reported;
  std::shared_ptr<Counters> counters = std::make_shared<Counters>();
  /// How often the clock was looked at: before each decoding, and after.
  std::atomic<unsigned> times = 0;
  std::shared_ptr<DecompressorPool> decompressors =
      std::make_shared<DecompressorPool>(std::size_t{1}, [this] {
        ++times;
        return std::chrono::nanoseconds(0);
      });
  /// How often it was asked whether a check is needed, and since when it is not.
  std::atomic<unsigned> asked = 0;
  std::atomic<unsigned> interrupted_from = ~0U;
  Verifier verifier;
};

/// With an image as QEMU creates it.
struct Bench : EmptyBench {
  explicit Bench(std::chrono::milliseconds patience = {}, std::size_t memory = plenty,
                 Compression compression = Compression::deflate)
      : EmptyBench(patience, memory) {
    create(compression);
  }
};

/// A piece of work that takes so long.
void work_for(std::chrono::milliseconds time) {
  const auto end = std::chrono::steady_clock::now() + time;
  while (std::chrono::steady_clock::now() < end)
    std::this_thread::yield();
}

/// For the next verifier of a file, which tells nobody.
Verifier::Settings after(const Verifier& earlier) {
  Verifier::Settings settings;
  settings.left = earlier.left();
  settings.report = [](const std::string& /*line*/) {};
  return settings;
}

constexpr std::uint64_t other_at = 6 * cluster;

/// An image that was there before, with one L2 table, which is not in memory.
struct Opened : EmptyBench {
  Opened() {
    image.bytes = Bench().image.bytes;
    write(image_size - 10, pattern(10, 1));
    CHECK(check() == Outcome::clean);
  }
  /// Another cache of the file does this.
  void others_write(std::uint64_t offset, std::span<const std::byte> data) {
    image.store(offset, data);
    verifier.forget({offset, offset + data.size()});
  }
  /// There is no memory to note the next change, which has to overlap the table at `table`.
  void fail_to_note(std::uint64_t table) {
    image.meeting = {{table, table + cluster}, [] { throw std::bad_alloc(); }, {}};
  }
  /// The second table of the image, which is not in memory either.
  void add_table(std::uint64_t offset) {
    image.store(offset, std::vector<std::byte>(cluster));
    write(l1_at + 8, number(offset));
    CHECK(check() == Outcome::clean);
    drop_tables();
  }
};

/// A cluster that is good, and its entry.
const std::vector<std::byte> good_stream = deflated(compressible(cluster, 1));
const std::uint64_t good_entry = entry_of(data_at, good_stream.size());
/// Of a cluster that nobody has written.
const std::uint64_t bad_entry = entry_of(data_at, 300);

bool says(const std::vector<std::string>& lines, const std::string& text) {
  return std::ranges::any_of(
      lines, [&](const std::string& line) { return line.find(text) != std::string::npos; });
}

} // namespace

TEST_CASE("clusters that are written before their entries are good, without a read", "[verifier]") {
  const auto compression = GENERATE(Compression::deflate, Compression::zstd);
  Bench bench({}, plenty, compression);
  std::uint64_t at = data_at;
  std::vector<std::uint64_t> entries;
  for (unsigned i = 0; i < 50; ++i) {
    const auto stream = compressed(compression, compressible(cluster, i));
    bench.write(at, stream);
    entries.push_back(entry_of(at, stream.size()));
    at += stream.size();
  }
  for (std::uint32_t i = 0; i < entries.size(); ++i)
    bench.publish(i, entries[i]);
  CHECK(bench.check() == Outcome::clean);
  CHECK(bench.image.reads == 0);
  const bool zstd = compression == Compression::zstd;
  CHECK(bench[zstd ? Count::verified_zstd_clusters : Count::verified_deflate_clusters] == 50);
  CHECK(bench[zstd ? Count::verified_zstd_bytes : Count::verified_deflate_bytes] == at - data_at);
  CHECK(bench[zstd ? Count::verified_deflate_clusters : Count::verified_zstd_clusters] == 0);
  CHECK_FALSE(bench.verifier.has_work());
}

TEST_CASE("an entry without its data is damage, until the data is there", "[verifier]") {
  Bench bench;
  bench.publish(5, entry_of(data_at + 77, good_stream.size()));
  CHECK(bench.check() == Outcome::damaged);
  REQUIRE(bench.reported.size() == 1);
  CHECK(says(bench.reported, "host offset " + std::to_string(data_at + 77)));
  CHECK(says(bench.reported, "guest offset " + std::to_string(5 * cluster)));
  CHECK(says(bench.reported, "never written"));
  const unsigned reads = bench.image.reads;
  CHECK(bench.check() == Outcome::damaged);
  CHECK(bench.image.reads == reads); // nothing changed there, so nothing is decoded again
  CHECK(bench.reported.size() == 1);
  bench.write(data_at + 77, good_stream);
  CHECK(bench.check() == Outcome::clean);
  CHECK(bench.verifier.failing() == 0);
}

TEST_CASE("an entry that is taken back is no damage any more", "[verifier]") {
  Bench bench;
  bench.publish(5, entry_of(data_at, 1000));
  CHECK(bench.check() == Outcome::damaged);
  switch (GENERATE(0, 1, 2, 3, 4)) {
  case 0:
    bench.publish(5, 0);
    break;
  case 1:
    bench.zero({l2_at, l2_at + cluster});
    break;
  case 2:
    bench.write(l1_at, number(0));
    break;
  case 3: { // by a write that failed, and has come nevertheless
    const Verifier::Change failing(&bench.verifier, bench.image, {l2_at, l2_at + cluster});
    bench.image.store(l2_at, std::vector<std::byte>(cluster));
    break;
  }
  default:
    bench.zero({0, 512}); // no image, no clusters
    break;
  }
  CHECK(bench.check() == Outcome::clean);
  CHECK(bench.verifier.failing() == 0);
}

TEST_CASE("each kind of damage is found, with its reason", "[verifier]") {
  Bench bench;
  auto stream = deflated(compressible(cluster, 1));
  REQUIRE(stream.size() > 1200);
  std::uint64_t entry = entry_of(data_at, stream.size());
  std::string reason;
  switch (GENERATE(0, 1, 2, 3, 4, 5)) {
  case 0: // its end is overwritten
    bench.write(data_at, stream);
    bench.write(data_at + stream.size() / 2, std::vector<std::byte>(cluster, std::byte{0xff}));
    break;
  case 1: // a sector too little in the entry
    bench.write(data_at, stream);
    entry = entry_of(data_at, stream.size() - 512);
    reason = "too short";
    break;
  case 2: // one byte off
    bench.write(data_at, stream);
    entry = entry_of(data_at + 1, stream.size());
    break;
  case 3: // the other codec's
    bench.write(data_at, zstd_frame(compressible(cluster, 1)));
    break;
  case 4:
    entry = entry_of(image_size + 512, stream.size());
    reason = "past the end of the file";
    break;
  default: // the last sectors are missing from the file
    bench.write(image_size - 1024, std::span(stream).first(1024));
    entry = entry_of(image_size - 1024, stream.size());
    reason = "past the end of the file";
    break;
  }
  bench.publish(0, entry);
  CHECK(bench.check() == Outcome::damaged);
  REQUIRE(bench.reported.size() == 1);
  CHECK(says(bench.reported, reason));
}

TEST_CASE("an entry is new again when bytes that it names are changed", "[verifier]") {
  const auto compression = GENERATE(Compression::deflate, Compression::zstd);
  Bench bench({}, plenty, compression);
  const auto stream = compressed(compression, compressible(cluster, 1));
  REQUIRE(stream.size() > 700);
  const auto change = [&](const ByteRange& range, unsigned how) {
    Verifier::Change begun(&bench.verifier, bench.image, range);
    const std::vector<std::byte> zeros(range.size());
    bench.image.store(range.begin, how == 1 ? zeros : pattern(range.size(), 1));
    if (how == 0)
      begun.wrote(pattern(range.size(), 1));
    else if (how == 1)
      begun.zeroed();
    // Else trimmed, or a write that failed: nobody knows.
  };
  const unsigned how = GENERATE(0U, 1U, 2U);
  bench.write(data_at, stream);
  bench.publish(3, entry_of(data_at, stream.size()));
  CHECK(bench.check() == Outcome::clean);
  SECTION("in a table that is in memory") {}
  SECTION("in one that is not") {
    bench.drop_tables();
  }
  SECTION("in one of which nothing but its place has ever been known") {
    Opened opened;
    opened.image.bytes = bench.image.bytes;
    Verifier another(opened.settings({}), opened.budget);
    client_writes(another, opened.image, data_at, pattern(50, 1));
    CHECK(another.has_work());
    CHECK(another.check(opened.image) == Outcome::damaged);
    CHECK(another.failing() == 1);
  }
  SECTION("where there is no memory for tables") {
    bench.take_memory();
  }
  // What lies beside it is none of its business.
  change({data_at - 100, data_at}, how);
  change({data_at + 8 * cluster, data_at + 9 * cluster}, how);
  CHECK(bench.check() == Outcome::clean);
  CHECK(bench.reported.empty());
  change({data_at, data_at + 100}, how);
  CHECK(bench.verifier.has_work());
  CHECK(bench.check() == Outcome::damaged);
  CHECK(bench.verifier.failing() == 1);
  CHECK(says(bench.reported, "guest offset " + std::to_string(3 * cluster)));
  bench.write(data_at, stream);
  CHECK(bench.check() == Outcome::clean);
}

TEST_CASE("what a check had no time for is new again for the next one, too", "[verifier]") {
  Opened bench;
  bench.image.store(data_at, good_stream);
  bench.publish(3, good_entry);
  CHECK(bench.check() == Outcome::clean);
  bench.add_table(other_at); // none is in memory
  bench.write(data_at, pattern(100, 1));
  SECTION("when its table cannot be read") {
    bench.image.unreadable = {l2_at, l2_at + cluster};
    CHECK_THROWS_AS(bench.check(), std::system_error);
    CHECK(bench.verifier.has_work());
    CHECK(bench.verifier.left().more);
    bench.image.unreadable = {};
  }
  SECTION("when its table cannot be seen") {
    bench.image.seen = l2_at;
    CHECK(bench.check() == Outcome::clean);
    CHECK(bench.verifier.has_work());
    CHECK(bench.verifier.left().more);
    bench.image.seen.reset();
  }
  SECTION("when it changes while its table is read") {
    bench.image.meeting = {{l2_at, l2_at + cluster}, {}, [&] { bench.publish(9, 0); }};
  }
  CHECK(bench.check() == Outcome::damaged);
}

TEST_CASE("what an upload has not come to yet fails no flush, and is no alarm", "[verifier]") {
  const auto compression = GENERATE(Compression::deflate, Compression::zstd);
  Bench made({}, plenty, compression);
  std::uint64_t at = data_at;
  for (std::uint32_t i = 0; i < 100; ++i) {
    const auto stream = compressed(compression, compressible(cluster, i));
    made.image.store(at, stream);
    made.image.store(l2_at + i * 8, number(entry_of(at, stream.size())));
    at += stream.size();
  }
  const std::uint64_t end = at;
  const std::uint64_t size = align_up(end, cluster);
  // One that waits would wait for minutes.
  EmptyBench upload(std::chrono::minutes(5), GENERATE(plenty, std::size_t{0}));
  const auto write = [&](std::uint64_t from, std::uint64_t to) {
    upload.write(from, std::span(made.image.bytes).subspan(from, to - from));
  };
  // Old data lies where nothing has been written yet.
  const bool is_old = GENERATE(true, false);
  if (is_old)
    upload.image.store(0, pattern(image_size, 3));
  const std::uint64_t broken = data_at + 30 * 1024;
  const bool is_broken = GENERATE(true, false);
  if (is_broken)
    made.image.store(broken, std::vector(4096, std::byte{0xff}));
  for (std::uint64_t from = 0; from < size; from += cluster) {
    write(from, from + cluster);
    if (from + cluster <= broken) {
      CHECK(upload.check() == Outcome::clean);
      CHECK(upload.verifier.failing() == 0);
    }
  }
  CHECK(upload.reported.empty());
  CHECK(upload[Count::unreadable_alarms] == 0);
  if (is_broken) {
    upload.verifier.ends(&upload.image);
    Verifier next(after(upload.verifier), upload.budget);
    CHECK(next.check(upload.image) == Outcome::damaged);
  } else {
    CHECK(upload.check() == Outcome::clean);
    CHECK_FALSE(upload.verifier.has_work());
    CHECK_FALSE(upload.verifier.left().more);
  }
}

TEST_CASE("an upload that ends too early has failed", "[verifier]") {
  Bench made;
  made.image.store(data_at, good_stream);
  made.publish(3, good_entry);
  made.publish(4, entry_of(data_at + cluster, good_stream.size()));
  EmptyBench upload;
  upload.write(0, std::span(made.image.bytes).first(data_at + 100));
  CHECK(upload.check() == Outcome::clean);
  CHECK(upload.verifier.has_work());
  CHECK(upload.verifier.left().more);
  CHECK(upload[Count::unreadable_clusters] == 0);
  const int onlooker = 0;
  upload.verifier.ends(&onlooker);
  CHECK(upload.check() == Outcome::clean);
  upload.verifier.ends(&upload.image);
  CHECK(upload.check() == Outcome::damaged);
  CHECK(upload.verifier.failing() == 2);
  CHECK(upload[Count::unreadable_clusters] == 2);
  CHECK(upload[Count::unreadable_alarms] == 2);
}

TEST_CASE("what is behind the front of an upload, and bad, fails it", "[verifier]") {
  Bench made;
  made.publish(3, entry_of(data_at, 300));
  made.publish(4, entry_of(image_size + 512, 300)); // where no upload ever comes
  EmptyBench upload;
  upload.write(0, std::span(made.image.bytes).first(data_at));
  CHECK(upload.check() == Outcome::damaged);
  CHECK(upload.verifier.failing() == 1);
  CHECK(says(upload.reported, "past the end of the file"));
  upload.write(data_at, std::span(made.image.bytes).subspan(data_at, 300));
  CHECK(upload.check() == Outcome::damaged);
  CHECK(upload.verifier.failing() == 2);
}

TEST_CASE("unreadable clusters are counted as long as they are", "[verifier]") {
  Bench bench;
  bench.publish(3, bad_entry);
  bench.publish(4, bad_entry + cluster);
  CHECK(bench.check() == Outcome::damaged);
  CHECK(bench[Count::unreadable_clusters] == 2);
  bench.publish(3, 0);
  CHECK(bench.check() == Outcome::damaged);
  CHECK(bench[Count::unreadable_clusters] == 1);
  // The next verifier goes on from there.
  Verifier::Settings settings = after(bench.verifier);
  settings.counters = bench.counters;
  Verifier next(std::move(settings), bench.budget);
  CHECK(next.check(bench.image) == Outcome::damaged);
  CHECK(bench[Count::unreadable_clusters] == 1);
  client_writes(next, bench.image, l2_at + 32, number(0));
  CHECK(next.check(bench.image) == Outcome::clean);
  CHECK(bench[Count::unreadable_clusters] == 0);
  CHECK(bench[Count::unreadable_alarms] == 3);
}

TEST_CASE("a header that nobody can open does not pass in silence", "[verifier]") {
  Bench bench;
  const bool zstd_alone = GENERATE(true, false);
  if (zstd_alone)
    bench.write(104, std::vector{std::byte{1}}); // without its feature bit
  else
    bench.write(72, number(8)); // the bit alone
  for (unsigned i = 0; i < 2; ++i) {
    CHECK(bench.check() == Outcome::damaged);
    CHECK(bench.verifier.failing() == 1);
    REQUIRE(bench.reported.size() == 1);
    CHECK(says(bench.reported, "nobody can open the image"));
  }
  Verifier next(after(bench.verifier), bench.budget);
  CHECK(next.check(bench.image) == Outcome::damaged);
  // Before it was there it is nobody's news, but for who asks for everything.
  Verifier::Settings settings;
  settings.report = [](const std::string& /*line*/) {};
  CHECK(Verifier(settings, bench.budget).check(bench.image) == Outcome::clean);
  settings.everything = true;
  CHECK(Verifier(settings, bench.budget).check(bench.image) == Outcome::damaged);
  bench.write_header(Compression::deflate);
  CHECK(bench.check() == Outcome::clean);
  CHECK(bench.verifier.failing() == 0);
}

TEST_CASE("many scattered changes are noted about where they are", "[verifier]") {
  Bench bench;
  bench.image.bytes.resize(2 * image_size);
  const std::uint64_t far = 2 * image_size - 2 * cluster;
  bench.write(far, good_stream);
  bench.publish(3, entry_of(far, good_stream.size()));
  CHECK(bench.check() == Outcome::clean);
  const auto scatter = [&] {
    for (std::uint64_t i = 0; i < 9000; ++i)
      bench.write(data_at + i * 512, pattern(10, 1));
  };
  scatter();
  CHECK(bench.check() == Outcome::clean);
  CHECK(bench[Count::verified_deflate_clusters] == 1);
  bench.write(far, pattern(100, 1));
  scatter();
  CHECK(bench.check() == Outcome::damaged);
}

TEST_CASE("all entries are checked on demand, also those that were there before", "[verifier]") {
  Bench made;
  made.image.store(data_at, good_stream);
  made.publish(3, good_entry);
  const bool damaged = GENERATE(true, false);
  if (damaged)
    made.publish(4, bad_entry + cluster);
  Verifier::Settings settings = made.settings({});
  settings.everything = true;
  Verifier verifier(settings, made.budget);
  CHECK(verifier.has_work());
  const Outcome expected = damaged ? Outcome::damaged : Outcome::clean;
  CHECK(verifier.check(made.image) == expected); // without a change
  CHECK(made[Count::verified_deflate_clusters] == 1);
  made.image.reads = 0;
  CHECK(verifier.check(made.image) == expected);
  CHECK(made.image.reads == 0);
  CHECK(verifier.has_work() == damaged);
  // Nor is it left to somebody else to look at everything once more.
  CHECK_FALSE(verifier.left().more);
}

TEST_CASE("a cluster whose last sector reaches past the end of the file is good", "[verifier]") {
  Bench bench;
  bench.image.bytes.resize(image_size - 100);
  bench.write(bench.image.size() - good_stream.size(), good_stream);
  bench.publish(0, entry_of(bench.image.size() - good_stream.size(), good_stream.size()));
  CHECK(bench.check() == Outcome::clean);
}

TEST_CASE("a raw copy is read at its end, and good", "[verifier]") {
  Bench bench;
  std::uint64_t at = data_at;
  for (std::uint32_t i = 0; i < 100; ++i) {
    const auto stream = deflated(compressible(cluster, i));
    bench.image.store(at, stream);
    bench.image.store(l2_at + i * 8, number(entry_of(at, stream.size())));
    at += stream.size();
  }
  EmptyBench copy;
  const bool front_to_back = GENERATE(true, false);
  for (std::uint64_t i = 0; i < image_size; i += 32 * cluster) {
    const std::uint64_t from = front_to_back ? i : image_size - i - 32 * cluster;
    copy.write(from, std::span(bench.image.bytes).subspan(from, 32 * cluster));
  }
  CHECK(copy.check() == Outcome::clean);
  CHECK(copy[Count::verified_deflate_clusters] == 100);
  CHECK(copy.reported.empty());
  // What was verified is not looked at again.
  const unsigned reads = copy.image.reads;
  copy.write(image_size - 10, pattern(10, 1));
  CHECK(copy.check() == Outcome::clean);
  CHECK(copy.image.reads == reads);
}

TEST_CASE("damage that the image had before is nobody's news", "[verifier]") {
  Bench first;
  first.publish(0, entry_of(data_at, 1000));
  EmptyBench bench;
  bench.image.bytes = first.image.bytes;
  bench.write(data_at + 8 * cluster, pattern(100, 1));
  CHECK(bench.check() == Outcome::clean);
  bench.write(data_at + cluster, good_stream);
  bench.publish(1, entry_of(data_at + cluster, good_stream.size()));
  CHECK(bench.check() == Outcome::clean);
  // Copied elsewhere, as a write after a snapshot does.
  bench.write(5 * cluster, std::span(bench.image.bytes).subspan(l2_at, cluster));
  bench.write(l1_at, number(5 * cluster));
  CHECK(bench.check() == Outcome::clean);
  CHECK(bench.reported.empty());
}

TEST_CASE("an L1 table that a client has read is not read once more", "[verifier]") {
  // Made by an earlier connection, with damage that is nobody's news.
  Bench made;
  made.publish(7, entry_of(data_at, 300));
  EmptyBench bench;
  bench.image.bytes = made.image.bytes;
  const auto header = [&] { return bench.image.header(); };
  const auto read = [&](std::uint64_t offset, std::size_t size) {
    const auto begin = bench.image.bytes.begin() + static_cast<std::ptrdiff_t>(offset);
    bench.verifier.client_read(header, offset, std::vector(begin, begin + std::ptrdiff_t(size)));
  };
  unsigned reads = 0;
  SECTION("alone") {
    read(l1_at, 64);
  }
  SECTION("within more") {
    read(l1_at - 100, 4000);
  }
  SECTION("not all of it") {
    read(l1_at, 56);
    reads = 1;
  }
  SECTION("and others have written meanwhile") {
    bench.verifier.forget({l1_at, l1_at + 8});
    read(l1_at, 64);
    reads = 1;
  }
  SECTION("and others have written since") {
    read(l1_at, 64);
    bench.verifier.forget({l1_at, l1_at + 8});
    reads = 1;
  }
  SECTION("for another image") {
    read(l1_at, 64);
    bench.image.store(40, number(6 * cluster));
    bench.image.store(6 * cluster, number(std::uint64_t{1} << 63U | l2_at));
    reads = 1;
  }
  const auto data = pattern(1000, 1);
  bench.write(data_at + cluster, data);
  CHECK(bench.image.reads == reads);
  CHECK(bench.check() == Outcome::clean);
  // What is new is found where the table says, and what was there before is not new.
  bench.publish(8, entry_of(data_at + cluster, 1000));
  CHECK(bench.check() == Outcome::damaged);
  CHECK(bench.verifier.failing() == 1);

  // From the first change on the file is followed, and what clients read is of no interest.
  bench.image.store(l1_at, number(0));
  read(l1_at, 64);
  CHECK(bench.check() == Outcome::damaged);
}

TEST_CASE("many failures make a few lines and a count", "[verifier]") {
  Bench bench;
  for (std::uint32_t i = 0; i < 30; ++i)
    bench.publish(i, entry_of(data_at + i * cluster, 1000));
  CHECK(bench.check() == Outcome::damaged);
  CHECK(bench.reported.size() == 5);
  CHECK(says(bench.reported, "26 more"));
  CHECK(bench.verifier.failing() == 30);
  CHECK(bench[Count::unreadable_clusters] == 30);
}

TEST_CASE("clusters that cannot be read now are no damage when they can", "[verifier]") {
  Bench bench;
  for (std::uint32_t i = 0; i < 3; ++i) {
    bench.image.store(data_at + i * cluster, good_stream);
    bench.publish(i, entry_of(data_at + i * cluster, good_stream.size()));
  }
  bench.image.refuses = true;
  CHECK_THROWS_AS(bench.check(), std::system_error);
  CHECK_THROWS_AS(bench.check(), std::system_error);
  CHECK(bench.verifier.left().more);
  bench.image.refuses = false;
  CHECK(bench.check() == Outcome::clean);
  CHECK(bench.verifier.left().empty());
  CHECK(bench.reported.empty());
}

TEST_CASE("clusters that cannot be read hide no damage elsewhere", "[verifier]") {
  Bench bench;
  const std::uint64_t far = data_at + 200 * cluster;
  bench.image.store(data_at, good_stream);
  bench.publish(0, good_entry);
  bench.publish(1, entry_of(far, 1000));
  bench.image.unreadable = {data_at, data_at + cluster};
  for (unsigned i = 0; i < 2; ++i) {
    CHECK_THROWS_AS(bench.check(), std::system_error);
    CHECK(bench.verifier.left().more);
    CHECK(bench.reported.size() == 1);
    CHECK(says(bench.reported, "never written"));
    CHECK(bench[Count::unreadable_clusters] == 1);
  }
  bench.image.unreadable = {};
  CHECK(bench.check() == Outcome::damaged);
  CHECK(bench.verifier.failing() == 1);
  bench.write(far, pattern(1000, 1));
  bench.publish(1, 0);
  CHECK(bench.check() == Outcome::clean);
  CHECK(bench.reported.size() == 1);
}

TEST_CASE("a table that is dropped while somebody changes it is not taken for old", "[verifier]") {
  Bench made;
  EmptyBench bench;
  bench.image.bytes = made.image.bytes;
  const std::uint64_t entry = entry_of(data_at, 1000);
  {
    Verifier::Change change(&bench.verifier, bench.image, {l2_at, l2_at + 8});
    bench.image.store(l2_at, number(entry));
    bench.drop_tables();
    bench.publish(1, 0);
    change.wrote(number(entry));
  }
  CHECK(bench.check() == Outcome::damaged);
  CHECK(bench.verifier.failing() == 1);
}

TEST_CASE("a replaced table that is being changed is not taken for old", "[verifier]") {
  Bench first;
  EmptyBench bench;
  bench.image.bytes = first.image.bytes;
  const std::uint64_t old_at = l2_at;
  const std::uint64_t new_at = l2_at + cluster;
  const auto entry = number(entry_of(data_at, 300)); // never written
  const auto change_old = [&](bool end) {
    Verifier::Change change(&bench.verifier, bench.image, {old_at, old_at + 8});
    bench.image.store(old_at, entry);
    if (end)
      change.wrote(entry);
    else
      CHECK(bench.check() == Outcome::damaged);
  };
  bench.write(new_at, entry);
  bench.write(l1_at, number(new_at));
  SECTION("before a check") {
    change_old(true);
  }
  SECTION("during a check") {
    change_old(false);
  }
  SECTION("and takes its place again") {
    change_old(true);
    bench.write(l1_at, number(old_at));
  }
  SECTION("not at all") {
    bench.image.store(old_at, entry); // as if it had been so all the time
    CHECK(bench.check() == Outcome::clean);
    return;
  }
  CHECK(bench.check() == Outcome::damaged);
}

TEST_CASE("a table that changes while its old content is read is not taken for old", "[verifier]") {
  Opened bench;
  bench.add_table(other_at);
  MemoryImage::Meeting meeting{{l2_at, l2_at + cluster}, {}, {}};
  Outcome expected = Outcome::damaged;
  SECTION("not at all") {
    expected = Outcome::clean;
  }
  SECTION("by others") {
    meeting.before = [&] { bench.others_write(l2_at, number(bad_entry)); };
  }
  SECTION("having lost its place, which it takes again") {
    meeting.before = [&] {
      bench.write(l1_at, number(7 * cluster));
      bench.publish(0, bad_entry);
      bench.write(l1_at, number(l2_at));
    };
  }
  SECTION("while all tables are lost, and found again") {
    meeting.before = [&] {
      bench.fail_to_note(other_at);
      bench.write(other_at, number(0));
      bench.publish(0, bad_entry);
    };
    meeting.after = [&] {
      bench.publish(0, 0);
      CHECK(bench.check() == Outcome::clean);
    };
  }
  SECTION("into one of larger clusters") {
    expected = Outcome::clean;
    meeting.before = [&] {
      const std::uint64_t large = 65536;
      bench.write(20, number(16, 4));
      bench.write(40, number(large));
      bench.write(large, number(2 * large));
      bench.image.unreadable = {2 * large, 3 * large};
      CHECK_THROWS_AS(bench.check(), std::system_error); // it knows the L1 table, but no other
      bench.image.unreadable = {};
    };
  }
  bench.image.meeting = meeting;
  bench.publish(9, 0);
  CHECK(bench.image.meeting.at.empty());
  if (meeting.after)
    bench.publish(0, bad_entry);
  CHECK(bench.check() == expected);
}

TEST_CASE("an L1 table that others change while it is first read is read once more", "[verifier]") {
  Opened bench;
  Verifier verifier(after(bench.verifier), bench.budget);
  bench.image.meeting.at = {l1_at, l1_at + 8};
  bench.image.meeting.after = [&] {
    bench.image.store(l1_at, number(other_at));
    verifier.forget({l1_at, l1_at + 8});
  };
  client_writes(verifier, bench.image, image_size - 10, pattern(10, 1));
  CHECK(bench.image.meeting.at.empty());
  CHECK(verifier.check(bench.image) == Outcome::clean);
  client_writes(verifier, bench.image, other_at, number(bad_entry));
  CHECK(verifier.check(bench.image) == Outcome::damaged);
}

TEST_CASE("where others write during a write nobody knows what is there", "[verifier]") {
  Opened bench;
  SECTION("a stream") {
    const auto stream = deflated(compressible(cluster, 1));
    {
      Verifier::Change change(&bench.verifier, bench.image, {data_at, data_at + stream.size()});
      bench.image.store(data_at, stream);
      bench.others_write(data_at, std::vector<std::byte>(stream.size(), std::byte{0xff}));
      CHECK(bench.check() == Outcome::clean);
      change.wrote(stream);
    }
    bench.publish(0, entry_of(data_at, stream.size()));
  }
  SECTION("a table") {
    Verifier::Change change(&bench.verifier, bench.image, {l2_at, l2_at + 8});
    bench.image.store(l2_at, number(0));
    bench.others_write(l2_at, number(bad_entry));
    CHECK(bench.check() == Outcome::damaged);
    change.wrote(number(0));
  }
  CHECK(bench.check() == Outcome::damaged);
}

TEST_CASE("a change that could not be noted may be anywhere, until it ends", "[verifier]") {
  Opened bench;
  SECTION("in a table that another one zeroes") {
    const std::uint64_t behind = l2_at + cluster;
    bench.add_table(behind);
    Verifier::Change zeroing(&bench.verifier, bench.image, {l2_at, behind});
    bench.image.store(l2_at, std::vector<std::byte>(cluster));
    {
      bench.fail_to_note(behind);
      const Verifier::Change change(&bench.verifier, bench.image, {behind - 8, behind + 8});
      CHECK(bench.image.meeting.at.empty());
      bench.image.store(behind - 8, number(bad_entry));
    }
    zeroing.zeroed();
  }
  SECTION("in a stream that another one writes") {
    bench.add_table(data_at + cluster);
    {
      Verifier::Change writing(&bench.verifier, bench.image,
                               {data_at, data_at + good_stream.size()});
      bench.image.store(data_at, good_stream);
      {
        bench.fail_to_note(data_at + cluster);
        const Verifier::Change change(&bench.verifier, bench.image,
                                      {data_at, data_at + cluster + 8});
        CHECK(bench.image.meeting.at.empty());
        bench.image.store(data_at, std::vector<std::byte>(good_stream.size(), std::byte{0xff}));
      }
      CHECK(bench.check() == Outcome::clean);
      writing.wrote(good_stream);
    }
    bench.publish(0, good_entry);
  }
  SECTION("in a table that loses its place meanwhile") {
    bench.fail_to_note(l2_at);
    const Verifier::Change change(&bench.verifier, bench.image, {l2_at, l2_at + 8});
    CHECK(bench.image.meeting.at.empty());
    CHECK(bench.check() == Outcome::clean);
    bench.image.store(l2_at, number(bad_entry));
    bench.write(other_at, number(bad_entry));
    bench.write(l1_at, number(other_at));
    CHECK(bench.check() == Outcome::damaged);
  }
  CHECK(bench.check() == Outcome::damaged);
}

TEST_CASE("a header that there was no memory to read is read by the next check", "[verifier]") {
  Opened bench;
  bench.write(8 * cluster, number(other_at));
  bench.write(other_at, number(bad_entry));
  bench.write(40, number(8 * cluster)); // the L1 table moves
  bench.image.before_header = [] { throw std::bad_alloc(); };
  CHECK_THROWS_AS(bench.check(), std::bad_alloc);
  CHECK(bench.check() == Outcome::damaged);
}

TEST_CASE("tables that are lost while failures are taken over are looked at", "[verifier]") {
  Bench made;
  const auto entries = GENERATE(range(1000U, 1019U)); // in one of these the memory ends
  const std::uint64_t large_l1 = 16 * cluster;
  made.image.store(36, number(entries, 4));
  made.image.store(40, number(large_l1));
  made.image.store(24, number(entries * 512 * cluster));
  made.image.store(large_l1, number(l2_at));
  made.image.store(l2_at, number(bad_entry));
  Verifier::Settings settings;
  settings.report = [](const std::string& /*line*/) {};
  settings.left.failing.push_back({0, 0, bad_entry});
  MemoryBudget budget(std::size_t{8} * 16384 + 100);
  Verifier verifier(std::move(settings), budget);
  made.image.meeting = {{l2_at, l2_at + cluster}, [&] { verifier.forget({l2_at, l2_at + 8}); }, {}};
  CHECK(verifier.check(made.image) == Outcome::damaged);
  CHECK(made.image.meeting.at.empty());
}

TEST_CASE("streams may be decoded by others, or by the check itself", "[verifier]") {
  MemoryBudget budget(64U << 20U);
  MemoryImage image;
  std::size_t woken = 0;
  Verifier::Settings settings;
  settings.report = [](const std::string& /*line*/) {};
  settings.wake = [&](std::size_t waiting) { woken = std::max(woken, waiting); };
  Verifier verifier(settings, budget);
  Bench source;
  client_writes(verifier, image, 0, source.image.bytes);
  CHECK(verifier.check(image) == Outcome::clean);
  std::uint64_t at = data_at;
  for (std::uint32_t i = 0; i < 200; ++i) {
    const auto stream = deflated(compressible(cluster, i));
    client_writes(verifier, image, at, stream);
    client_writes(verifier, image, l2_at + i * 8, number(entry_of(at, stream.size())));
    at += stream.size();
  }
  CHECK(woken > 1);
  CHECK(verifier.waiting() == woken);
  CHECK(verifier.decode_one());
  CHECK(verifier.waiting() == woken - 1);
  // Written to while it waits: what it was counts no more.
  client_writes(verifier, image, at - 50, std::vector<std::byte>(50, std::byte{0xff}));
  image.reads = 0;
  CHECK(verifier.check(image) == Outcome::damaged);
  CHECK(verifier.failing() == 1);
  CHECK(image.reads == 1);
  CHECK_FALSE(verifier.decode_one());
}

TEST_CASE("a check waits for data that is late", "[verifier]") {
  Bench bench(std::chrono::seconds(20));
  bench.publish(0, good_entry);
  auto checking = std::async(std::launch::async, [&] { return bench.check(); });
  while (bench.image.reads == 0)
    std::this_thread::yield();
  bench.write(data_at, good_stream);
  CHECK(checking.get() == Outcome::clean);
  CHECK(bench.reported.empty());
}

TEST_CASE("a check waits for a write in progress, however long", "[verifier]") {
  Bench bench(std::chrono::milliseconds(1));
  std::atomic<bool> clean = false;
  Verifier::Change change(&bench.verifier, bench.image, {data_at, data_at + good_stream.size()});
  bench.publish(0, good_entry);
  WatchedThread checking([&] { clean = bench.check() == Outcome::clean; });
  CHECK(checking.waits());
  bench.image.store(data_at, good_stream);
  change.wrote(good_stream);
  CHECK(checking.ends());
  CHECK(clean);
}

TEST_CASE("a stream that many entries name is decoded once", "[verifier]") {
  // With no memory one table is looked at after the other.
  Bench bench({}, GENERATE(plenty, std::size_t{0}));
  const bool is_good = GENERATE(true, false);
  if (is_good)
    bench.image.store(data_at, good_stream);
  std::vector<std::byte> table;
  for (std::uint64_t i = 0; i < 512; ++i) {
    // Where it is good it is, too, with more sectors in the entry.
    const auto entry = number(entry_of(data_at, good_stream.size() + (is_good ? i % 3 * 512 : 0)));
    table.insert(table.end(), entry.begin(), entry.end());
  }
  bench.write(l2_at, table);
  const Outcome expected = is_good ? Outcome::clean : Outcome::damaged;
  CHECK(bench.check() == expected);
  CHECK(bench.decodings() == 1);
  CHECK(bench.verifier.failing() == (is_good ? 0 : 512));
  CHECK(bench[Count::verified_deflate_clusters] == (is_good ? 512 : 0));
  // In other tables it is the same stream.
  for (std::uint64_t i = 1; i < 4; ++i)
    bench.write(l1_at + i * 8, number(other_at + i * cluster));
  bench.write(other_at + cluster, table);
  bench.write(other_at + 2 * cluster, table);
  CHECK(bench.check() == expected);
  CHECK(bench.decodings() == 2);
  CHECK(bench.verifier.failing() == (is_good ? 0 : 3 * 512));
  if (!is_good) {
    bench.write(data_at, good_stream);
    CHECK(bench.check() == Outcome::clean);
    CHECK(bench.decodings() <= 4); // when it arrived, and, with no memory for that, once more
    CHECK(bench.verifier.failing() == 0);
  }
}

TEST_CASE("a stream that changes while it is checked is no longer the one it was", "[verifier]") {
  Bench bench({}, 0); // so that tables are looked at one after the other
  const std::uint64_t far = data_at + 500 * cluster; // read by itself
  bench.image.store(data_at, good_stream);
  bench.image.store(far, good_stream);
  bench.publish(0, good_entry);
  bench.publish(1, entry_of(far, good_stream.size()));
  bench.write(other_at, number(good_entry));
  bench.write(l1_at + 8, number(other_at));
  bench.image.meeting = {{far, far + 1}, {}, [&] {
                           bench.write(data_at, std::vector(good_stream.size(), std::byte{0xff}));
                         }};
  CHECK(bench.check() == Outcome::damaged);
  CHECK(bench.verifier.failing() == 1);
  CHECK(bench.check() == Outcome::damaged);
  CHECK(bench.verifier.failing() == 2);
}

TEST_CASE("a table that changes while it is checked is no longer the one it was", "[verifier]") {
  Bench bench({}, 0);
  const std::uint64_t far = data_at + 500 * cluster;
  bench.image.store(data_at, good_stream);
  bench.image.store(far, good_stream);
  bench.publish(0, good_entry);
  bench.write(other_at, number(entry_of(far, good_stream.size())));
  bench.write(l1_at + 8, number(other_at));
  bench.write(l1_at + 16, number(l2_at)); // once more
  bench.image.meeting = {{far, far + 1}, {}, [&] { bench.publish(7, bad_entry); }};
  CHECK(bench.check() == Outcome::damaged);
  CHECK(bench.verifier.failing() == 1);
  CHECK(bench.check() == Outcome::damaged);
  CHECK(bench.verifier.failing() == 2);
}

TEST_CASE("a table that many entries name is looked at once", "[verifier]") {
  const std::size_t memory = GENERATE(plenty, std::size_t{0});
  Bench bench({}, memory);
  bench.image.store(data_at, good_stream);
  const auto all_name = [&](std::uint64_t table) { bench.write(l1_at, numbers(table, 8)); };
  bench.image.store(other_at, number(good_entry));
  all_name(other_at);
  bench.image.reads = 0;
  CHECK(bench.check() == Outcome::clean);
  CHECK(bench[Count::verified_deflate_clusters] == 8);
  CHECK(bench.image.reads <= 4); // the L1 table, the table, twice at most, the stream
  CHECK(bench.decodings() == 1);

  // Bad ones are found in all their places.
  bench.image.store(other_at + cluster, number(entry_of(data_at + 5 * cluster, 300)));
  bench.image.store(other_at + cluster + 8, number(good_entry));
  all_name(0);
  CHECK(bench.check() == Outcome::clean);
  all_name(other_at + cluster);
  bench.image.reads = 0;
  CHECK(bench.check() == Outcome::damaged);
  CHECK(bench.verifier.failing() == 8);
  CHECK(bench.image.reads <= 5);
  CHECK(bench[Count::unreadable_clusters] == 8);
  CHECK(bench.check() == Outcome::damaged);
  CHECK(bench.verifier.failing() == 8);
  CHECK(bench[Count::unreadable_clusters] == 8);
  CHECK(bench.verifier.left().failing.size() == 8);
  bench.write(l1_at + 3 * 8, number(0));
  CHECK(bench.check() == Outcome::damaged);
  CHECK(bench.verifier.failing() == 7);
  bench.write(data_at + 5 * cluster, pattern(100, 1));
  bench.image.store(data_at + 5 * cluster, good_stream);
  bench.verifier.forget({data_at + 5 * cluster, data_at + 6 * cluster});
  bench.write(other_at + cluster, number(entry_of(data_at + 5 * cluster, good_stream.size())));
  CHECK(bench.check() == Outcome::clean);
  CHECK(bench.verifier.failing() == 0);
}

TEST_CASE("more failures than can be remembered are counted in twins of a table, too",
          "[verifier]") {
  Bench bench;
  std::vector<std::byte> table;
  for (std::uint64_t i = 0; i < 300; ++i) {
    const auto entry = number(entry_of(data_at + i, 300));
    table.insert(table.end(), entry.begin(), entry.end());
  }
  bench.image.store(other_at, table);
  bench.write(l1_at, numbers(other_at, 8));
  for (unsigned round = 0; round < 2; ++round) {
    CHECK(bench.check() == Outcome::damaged);
    CHECK(bench.verifier.failing() == 8 * 300);
    CHECK(bench[Count::unreadable_clusters] == 8 * 300);
  }
  CHECK(bench.verifier.left().more);
  bench.write(other_at, std::vector<std::byte>(table.size()));
  CHECK(bench.check() == Outcome::clean);
}

TEST_CASE("a check ends when nobody needs it, and the next one does what is left", "[verifier]") {
  const std::size_t memory = GENERATE(plenty, std::size_t{0});
  Bench bench({}, memory);
  constexpr std::uint32_t many = 6;
  const std::uint64_t apart = 100 * cluster;
  for (std::uint32_t i = 0; i < many; ++i) {
    bench.image.store(data_at + i * apart, std::vector(300, std::byte{0xff}));
    bench.publish(i, entry_of(data_at + i * apart, 300));
  }
  unsigned reads = 0;
  const auto meet = [&](auto& self) -> void {
    bench.image.meeting = {{data_at, image_size}, {}, [&] {
                             ++reads;
                             work_for(std::chrono::milliseconds(11));
                             self(self);
                           }};
  };
  meet(meet);
  bench.asked = 0;
  bench.interrupted_from = 3;
  try {
    std::ignore = bench.check();
    FAIL("not interrupted");
  } catch (const Verifier::Interrupted& end) {
    CHECK(end.code().value() == ESHUTDOWN);
  }
  CHECK(reads == 3);
  CHECK(bench.reported.empty());
  CHECK(bench.verifier.has_work());
  CHECK(bench.verifier.left().more);
  bench.interrupted_from = ~0U;
  CHECK(bench.check() == Outcome::damaged);
  CHECK(bench.verifier.failing() == many);
}

TEST_CASE("streams that wait to be decoded do not hold up the end", "[verifier]") {
  Bench bench;
  Verifier::Settings settings = bench.settings({});
  settings.wake = [](std::size_t /*waiting*/) {};
  Verifier verifier(settings, bench.budget);
  for (std::uint32_t i = 0; i < 30; ++i) {
    const auto stream = deflated(compressible(cluster, i));
    client_writes(verifier, bench.image, data_at + i * cluster, stream);
    client_writes(verifier, bench.image, l2_at + i * 8,
                  number(entry_of(data_at + i * cluster, stream.size())));
  }
  CHECK(verifier.waiting() == 30);
  // Somebody else is decoding something slow, until the check waits for him.
  DecompressorPool::Account account;
  auto loan = std::make_unique<DecompressorPool::Loan>(bench.decompressors->borrow(account));
  bench.interrupted_from = 0;
  bool interrupted = false;
  {
    WatchedThread checking([&] {
      try {
        std::ignore = verifier.check(bench.image);
      } catch (const Verifier::Interrupted&) {
        interrupted = true;
      }
    });
    CHECK(checking.waits());
    work_for(std::chrono::milliseconds(11));
    loan.reset();
    CHECK(checking.ends());
  }
  CHECK(interrupted);
  CHECK(bench.decodings() == 0);
  bench.interrupted_from = ~0U;
  CHECK(verifier.check(bench.image) == Outcome::clean);
}

TEST_CASE("a check that waits ends when nobody needs it", "[verifier]") {
  Bench bench(std::chrono::seconds(60));
  std::atomic<unsigned> interrupted = 0;
  const auto check = [&] {
    try {
      std::ignore = bench.check();
    } catch (const Verifier::Interrupted&) {
      ++interrupted;
    }
  };
  SECTION("for late data, and another one for its turn") {
    bench.publish(0, good_entry);
    WatchedThread first(check);
    CHECK(first.waits());
    WatchedThread second(check);
    CHECK(second.waits());
    bench.interrupted_from = 0;
    CHECK(first.ends());
    CHECK(second.ends());
    CHECK(interrupted == 2);
  }
  SECTION("for a write in progress") {
    bench.publish(0, good_entry);
    const Verifier::Change change(&bench.verifier, bench.image, {data_at, data_at + 10});
    WatchedThread first(check);
    CHECK(first.waits());
    bench.interrupted_from = 0;
    CHECK(first.ends());
    CHECK(interrupted == 1);
  }
}

TEST_CASE("others who go on writing delay a check no longer than its patience", "[verifier]") {
  Bench bench(std::chrono::milliseconds(100));
  bench.publish(0, bad_entry);
  std::optional<Outcome> outcome;
  // One of their writes is always in progress.
  std::optional<Verifier::Change> one;
  std::optional<Verifier::Change> other;
  const ByteRange range{data_at, data_at + 300};
  bool again = true;
  const auto meet = [&](auto& self) -> void {
    bench.image.meeting = {range, {}, [&] {
                             if (again) {
                               other.emplace(&bench.verifier, bench.image, range);
                               one.reset();
                               one.emplace(&bench.verifier, bench.image, range);
                               other.reset();
                               self(self);
                             }
                           }};
  };
  meet(meet);
  {
    WatchedThread checking([&] { outcome = bench.check(); });
    CHECK(checking.ends());
    again = false;
    one.reset();
  }
  CHECK(outcome == Outcome::damaged);
  CHECK(bench.verifier.failing() == 1);
}

TEST_CASE("a write does not wait for those who decode", "[verifier]") {
  Bench bench;
  DecompressorPool::Account account;
  auto loan = std::make_unique<DecompressorPool::Loan>(bench.decompressors->borrow(account));
  {
    WatchedThread writing([&] { bench.write(data_at, good_stream); });
    CHECK(writing.ends());
    loan.reset();
  }
  bench.publish(0, good_entry);
  CHECK(bench.check() == Outcome::clean);
  CHECK(bench.decodings() == 1);
}

TEST_CASE("verifiers that share their memory have no more of it together", "[verifier]") {
  Bench bench({}, 4U << 20U);
  const auto memory = Verifier::usual_memory();
  std::vector<std::unique_ptr<Verifier>> verifiers;
  const std::size_t before = bench.budget.used();
  for (unsigned i = 0; i < 5; ++i) {
    Verifier::Settings settings = bench.settings({});
    settings.memory = memory;
    settings.wake = [](std::size_t /*waiting*/) {};
    verifiers.push_back(std::make_unique<Verifier>(settings, bench.budget));
    for (std::uint32_t j = 0; j < 300; ++j) {
      const auto stream = deflated(compressible(cluster, j));
      const ByteRange range{data_at + j * cluster, data_at + j * cluster + stream.size()};
      Verifier::Change change(verifiers.back().get(), bench.image, range);
      change.wrote(stream);
    }
    CHECK(memory->taken() <= (4U << 20U) / 8);
    CHECK(bench.budget.used() <= before + (4U << 20U) / 8);
  }
  CHECK(memory->taken() > (4U << 20U) / 16);
  verifiers.clear();
  CHECK(memory->taken() == 0);
}

TEST_CASE("with little memory or none checks are as strict, and as free of alarms", "[verifier]") {
  const std::size_t memory = GENERATE(std::size_t{0}, std::size_t{40000}, std::size_t{200000});
  Bench bench({}, memory);
  std::uint64_t at = data_at;
  for (std::uint32_t i = 0; i < 60; ++i) {
    const auto stream = deflated(compressible(cluster, i));
    bench.write(at, stream);
    bench.publish(i, entry_of(at, stream.size()));
    at += stream.size();
    if (i % 7 == 0)
      CHECK(bench.check() == Outcome::clean);
  }
  CHECK(bench.check() == Outcome::clean);
  CHECK(bench.budget.used() <= memory);
  bench.publish(70, entry_of(at + cluster, 1000));
  CHECK(bench.check() == Outcome::damaged);
  CHECK(bench.check() == Outcome::damaged);
  bench.publish(70, 0);
  CHECK(bench.check() == Outcome::clean);
}

TEST_CASE("what an earlier verifier left failing is checked as long as it is there", "[verifier]") {
  Bench bench;
  bench.publish(3, good_entry);
  bench.publish(4, entry_of(data_at + 5 * cluster, good_stream.size()));
  CHECK(bench.check() == Outcome::damaged);
  std::vector<std::string> reported;
  Verifier::Settings settings = after(bench.verifier);
  CHECK(settings.left.failing.size() == 2);
  CHECK_FALSE(settings.left.more);
  settings.report = [&](const std::string& line) { reported.push_back(line); };

  bench.image.store(l2_at + 4 * 8, number(0)); // taken back by somebody else
  Verifier next(settings, bench.budget);
  CHECK(next.has_work());
  CHECK(next.check(bench.image) == Outcome::damaged);
  CHECK(next.failing() == 1);
  CHECK(reported.size() == 1);
  client_writes(next, bench.image, data_at, good_stream);
  CHECK(next.check(bench.image) == Outcome::clean);

  bench.image.store(0, std::vector<std::byte>(512)); // another file
  Verifier last(settings, bench.budget);
  CHECK(last.check(bench.image) == Outcome::clean);
}

TEST_CASE("a verifier that was never used leaves what it was left", "[verifier]") {
  Bench bench;
  bench.publish(3, entry_of(data_at, 1000));
  CHECK(bench.check() == Outcome::damaged);
  Verifier::Settings settings = after(bench.verifier);
  const Verifier unused(settings, bench.budget);
  CHECK(unused.left().failing.size() == 1);
  settings.left = {{}, true};
  const Verifier unused_again(settings, bench.budget);
  CHECK(unused_again.left().more);
  CHECK(unused_again.has_work());
}

TEST_CASE("more failures than anybody can remember are left, too", "[verifier]") {
  Bench bench;
  constexpr std::uint32_t many = 300;
  for (std::uint32_t i = 0; i < many; ++i)
    bench.publish(i, entry_of(data_at + i * cluster, 1000));
  CHECK(bench.check() == Outcome::damaged);
  CHECK(bench.verifier.failing() == many);
  CHECK(bench.check() == Outcome::damaged);
  CHECK(bench[Count::unreadable_clusters] == many); // once each
  Verifier::Settings settings = after(bench.verifier);
  CHECK(settings.left.failing.size() == 256);
  CHECK(settings.left.more);

  // All that it can remember one by one is repaired: the rest is still there.
  for (std::uint32_t i = 0; i < 256; ++i)
    bench.image.store(data_at + i * cluster, good_stream);
  for (std::uint32_t i = 0; i < 256; ++i)
    bench.image.store(l2_at + i * 8, number(good_entry + i * cluster));
  Verifier next(settings, bench.budget);
  if (GENERATE(true, false))
    client_writes(next, bench.image, l2_at + 8, number(0));
  CHECK(next.check(bench.image) == Outcome::damaged);
  CHECK(next.failing() == many - 256);
  CHECK_FALSE(next.left().more);
  for (std::uint32_t i = 256; i < many; ++i)
    client_writes(next, bench.image, l2_at + i * 8, number(0));
  CHECK(next.check(bench.image) == Outcome::clean);
  CHECK(next.left().empty());
}

TEST_CASE("what a check could not look at is left, as is what it found", "[verifier]") {
  Bench bench;
  bench.publish(3, bad_entry);
  const bool found = GENERATE(true, false);
  if (found) {
    CHECK(bench.check() == Outcome::damaged);
  } else {
    bench.write(0, std::vector(bench.image.bytes.begin(), bench.image.bytes.begin() + 512));
    bench.write(l1_at + 1, std::vector<std::byte>(3));
  }
  bench.image.refuses = true;
  if (!found)
    CHECK_THROWS_AS(bench.check(), std::system_error);
  CHECK_FALSE(bench.verifier.left().empty());
  Verifier next(after(bench.verifier), bench.budget);
  SECTION("and stays, when the next verifier cannot look, either") {
    client_writes(next, bench.image, image_size - 10, pattern(10, 1));
  }
  SECTION("and is looked at as soon as that is possible") {}
  bench.image.refuses = false;
  bench.verifier.ends(&bench.image); // who begins with the header may be uploading
  CHECK(bench.check() == Outcome::damaged);
  CHECK(next.check(bench.image) == Outcome::damaged);
}

TEST_CASE("a write over several tables ends, however little memory there is", "[verifier]") {
  const std::size_t memory =
      GENERATE(range(std::size_t{0}, std::size_t{1000000}, std::size_t{25000}));
  Bench first;
  for (std::uint64_t table = 0; table < 4; ++table) {
    first.write(l1_at + table * 8, number(l2_at + table * cluster));
    first.image.store(l2_at + table * cluster, number(entry_of(data_at, 1000)));
  }
  EmptyBench bench({}, memory);
  bench.image.bytes = first.image.bytes;
  bench.zero({l2_at, l2_at + 4 * cluster});
  CHECK(bench.check() == Outcome::clean);
  bench.write(l2_at + 3 * cluster, number(entry_of(data_at, 1000)));
  CHECK(bench.check() == Outcome::damaged);
}

TEST_CASE("what the tables of an image with unknown features mean is not guessed", "[verifier]") {
  Bench bench;
  bench.write(72, number(std::uint64_t{1} << 5U));
  bench.publish(3, entry_of(data_at, 1000));
  CHECK(bench.check() == Outcome::clean);
  bench.write(72, number(0));
  CHECK(bench.check() == Outcome::damaged);
}

TEST_CASE("where writes overlap nobody knows what is there", "[verifier]") {
  Bench bench;
  bench.publish(0, good_entry);
  const std::vector<std::byte> other(100, std::byte{0xff});
  {
    Verifier::Change first(&bench.verifier, bench.image, {data_at, data_at + good_stream.size()});
    Verifier::Change second(&bench.verifier, bench.image, {data_at + 50, data_at + 150});
    bench.image.store(data_at, good_stream);
    bench.image.store(data_at + 50, other);
    if (GENERATE(true, false)) {
      first.wrote(good_stream);
      second.wrote(other);
    } else {
      second.wrote(other);
      first.wrote(good_stream);
    }
  }
  CHECK(bench.check() == Outcome::damaged);
  bench.write(data_at, good_stream);
  CHECK(bench.check() == Outcome::clean);

  // The same with a table.
  const auto before = number(good_entry);
  const auto after = number(entry_of(data_at + 64 * cluster, good_stream.size()));
  {
    Verifier::Change first(&bench.verifier, bench.image, {l2_at + 8, l2_at + 16});
    Verifier::Change second(&bench.verifier, bench.image, {l2_at + 8, l2_at + 16});
    bench.image.store(l2_at + 8, after);
    second.wrote(after);
    first.wrote(before);
  }
  CHECK(bench.check() == Outcome::damaged);
}

TEST_CASE("streams of an image are none of the next one", "[verifier]") {
  Bench bench;
  bench.write(data_at, good_stream);
  bench.write_header(Compression::zstd);
  bench.publish(0, good_entry);
  CHECK(bench.check() == Outcome::damaged);
}

TEST_CASE("what a client cannot see is checked for one that can", "[verifier]") {
  constexpr std::uint64_t far = image_size - 4 * cluster;
  Opened bench;
  const std::uint64_t all = image_size;
  SECTION("a cluster") {
    bench.publish(0, entry_of(far, 1000));
  }
  SECTION("an L2 table") {
    bench.write(far, number(bad_entry));
    bench.write(l1_at, number(far));
  }
  SECTION("the L1 table") {
    bench.write(far, number(other_at));
    bench.write(other_at, number(bad_entry));
    bench.write(40, number(far));
  }
  SECTION("all of them, when there is no memory to follow them") {
    bench.take_memory();
    bench.write(far, number(bad_entry));
    bench.write(l1_at, number(far));
  }
  SECTION("one whose successor it sees") {
    bench.write(l1_at + 8, number(far));
    CHECK(bench.check() == Outcome::clean);
    bench.drop_tables();
    bench.image.store(far, number(0));
    bench.write(other_at, number(bad_entry));
    bench.write(l1_at + 8, number(other_at));
    bench.image.seen = all / 2;
    CHECK(bench.check() == Outcome::damaged);
    return;
  }
  bench.image.seen = all / 2;
  CHECK(bench.check() == Outcome::clean);
  CHECK(bench.verifier.has_work());
  CHECK_FALSE(bench.verifier.left().empty());
  bench.image.seen.reset();
  CHECK(bench.check() == Outcome::damaged);
}

TEST_CASE("tables that the first client cannot see are none that were checked", "[verifier]") {
  constexpr std::uint64_t far = image_size - 4 * cluster;
  Bench made;
  made.write(far, number(bad_entry));
  const bool l1 = GENERATE(true, false);
  if (l1) { // the L1 table is there
    made.write(far + cluster, number(far));
    made.write(40, number(far + cluster));
  } else {
    made.write(l1_at, number(far));
  }
  CHECK(made.check() == Outcome::damaged);
  Verifier verifier(after(made.verifier), made.budget);
  made.image.seen = image_size / 2;
  CHECK(verifier.check(made.image) == Outcome::clean);
  CHECK_FALSE(verifier.left().empty());
  made.image.seen.reset();
  CHECK(verifier.check(made.image) == Outcome::damaged);
}

TEST_CASE("no verdict on what the file did not have lasts longer than that", "[verifier]") {
  Opened bench;
  std::uint64_t at = image_size;
  SECTION("its end arrives while its begin is looked at") {
    at -= 512;
    bench.image.store(at, std::span(good_stream).first(512));
    bench.image.meeting.at = {at, image_size};
    bench.image.meeting.after = [&] {
      bench.image.bytes.resize(image_size + 2 * cluster);
      bench.write(image_size, std::span(good_stream).subspan(512));
    };
    bench.publish(0, entry_of(at, good_stream.size()));
    CHECK(bench.check() == Outcome::damaged);
  }
  SECTION("it is in what only a larger client has") {
    bench.image.bytes.resize(image_size + 2 * cluster);
    bench.write(at, std::span(good_stream).first(100)); // in two pieces, so that nobody knows it
    bench.write(at + 100, std::span(good_stream).subspan(100));
    bench.image.bytes.resize(image_size);
    bench.publish(0, entry_of(at, good_stream.size()));
    CHECK(bench.check() == Outcome::damaged);
    bench.image.bytes.resize(image_size + 2 * cluster);
    bench.image.store(at, good_stream);
  }
  CHECK(bench.check() == Outcome::clean);
}

TEST_CASE("when memory is back tables are followed again, and memory is given back", "[verifier]") {
  Bench bench({}, 0);
  std::uint64_t at = data_at;
  for (std::uint32_t i = 0; i < 20; ++i, at += cluster) {
    bench.write(at, good_stream);
    bench.publish(i, entry_of(at, good_stream.size()));
  }
  bench.budget.set_limit(64U << 20U);
  CHECK(bench.check() == Outcome::clean);
  // The old entry of a table that is written to is read, and no cluster.
  bench.image.reads = 0;
  bench.write(at, good_stream);
  bench.publish(20, entry_of(at, good_stream.size()));
  CHECK(bench.check() == Outcome::clean);
  CHECK(bench.image.reads == 1);
  CHECK(bench.budget.used() > 0);
  bench.publish(21, entry_of(at + cluster, 1000));
  CHECK(bench.check() == Outcome::damaged);
  bench.publish(21, 0);
  CHECK(bench.check() == Outcome::clean);

  bench.budget.set_limit(80000);
  bench.verifier.shrink();
  CHECK(bench.budget.used() <= 80000);
  bench.publish(21, entry_of(at + cluster, 1000));
  CHECK(bench.check() == Outcome::damaged);
}

TEST_CASE("without a verifier a change does nothing", "[verifier]") {
  MemoryImage image;
  Verifier::Change change(nullptr, image, {0, 512});
  change.wrote(std::vector<std::byte>(512));
  change.zeroed();
  CHECK(image.reads == 0);
}
