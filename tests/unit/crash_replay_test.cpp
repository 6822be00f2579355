#include "crash_replay.hpp"

#include "catch.hpp"
#include "image_bytes.hpp"
#include "memory_storage.hpp"
#include "sanitized.hpp"
#include "serving.hpp"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>

// Whole runs, recorded and replayed. From the environment:
//
//   SEED=N   repeat the run with this seed, and no other; a run with one client and no background
//            writers is then the same, others are as similar as threads are
//   LONG=1   a hundred times as many runs

using namespace qcowcache;
using Kind = Change::Kind;
using Side = Journal::Side;

namespace {

constexpr std::uint64_t unit = WriteCache::least_unit_size;

// Under a sanitizer each run takes many times as long.
constexpr std::uint64_t usual_runs = sanitized ? 2 : 6;
/// So many states are looked at of each moment, or of each sixteenth: only one thread does so.
constexpr unsigned states_of_each = sanitized ? 8 : 64;
constexpr unsigned one_moment_in = thread_sanitized ? 16 : 1;

/// A journal made by hand, on a disk of zeros.
class Story {
public:
  std::size_t begins(Side side, Change change) { return journal_.begin(side, std::move(change)); }
  void ends(Side side, std::size_t change) { journal_.end(side, change); }
  Story& does(Side side, Change change) {
    ends(side, begins(side, std::move(change)));
    return *this;
  }

  /// What is wrong at the first point where something is; "" if all is well.
  [[nodiscard]] std::string verdict() const {
    std::mt19937_64 random(1);
    CrashReplay replay(journal_, std::vector<std::byte>(8192));
    while (replay.advance()) {
      if (const std::optional<std::string> wrong = replay.examine(random, 8))
        return *wrong;
    }
    return "";
  }

  [[nodiscard]] bool says(const char* words) const {
    return verdict().find(words) != std::string::npos;
  }

private:
  Journal journal_;
};

Change letters(const ByteRange& range, char letter, bool fua = false) {
  return {Kind::write, range, std::vector(range.size(), static_cast<std::byte>(letter)), fua};
}

const Change flush;

/// Everything about a run that is not its requests, by chance.
struct Setup {
  explicit Setup(std::mt19937_64& random);

  Capabilities capabilities;
  std::size_t memory;
  unsigned clients;
  unsigned writers;
  std::optional<std::uint64_t> cluster_size;
  std::uint64_t max_write;
  std::optional<std::chrono::milliseconds> expire;
  std::uint64_t reserve;
};

template <typename Value>
Value one_of(std::mt19937_64& random, std::initializer_list<Value> values) {
  return values.begin()[static_cast<std::ptrdiff_t>(random() % values.size())];
}

Setup::Setup(std::mt19937_64& random) {
  capabilities = MemoryStorage::everything(0);
  capabilities.minimum = one_of(random, {1U, 1U, 512U, 4096U});
  capabilities.size =
      24 * unit + random() % (4 * unit) / capabilities.minimum * capabilities.minimum;
  capabilities.maximum = one_of(random, {UINT32_MAX, UINT32_MAX, 65536U * 3, 8192U});
  capabilities.fua = one_of(random, {Fua::none, Fua::emulate, Fua::native});
  capabilities.can_extents = random() % 2 == 0;
  clients = one_of(random, {1U, 3U, 6U});
  writers = one_of(random, {0U, 1U, 4U});
  memory = one_of(random, {std::size_t{3}, std::size_t{8}, std::size_t{100}}) * unit;
  if (random() % 4 == 0)
    cluster_size = 65536;
  max_write = one_of(random, {unit, 16 * unit});
  if (random() % 3 != 0)
    expire = std::chrono::milliseconds(one_of(random, {0, 3}));
  reserve = one_of(random, {std::uint64_t{0}, std::uint64_t{0}, 2 * unit});
}

/// Where compressed clusters go next, as a qcow2 writer sees it.
class Allocator {
public:
  explicit Allocator(std::uint64_t begin, std::uint64_t end) : next_(begin), end_(end) {}

  /// Empty when there is no room.
  ByteRange allocate(std::uint64_t size, std::uint64_t alignment) {
    const std::lock_guard lock(mutex_);
    const std::uint64_t begin = align_up(next_, alignment);
    if (begin + size > end_)
      return {};
    next_ = begin + size;
    return {begin, next_};
  }

private:
  std::mutex mutex_;
  std::uint64_t next_;
  const std::uint64_t end_;
};

/// Makes storage write down in a journal, which outlives it, what it is asked to change.
void record_in(Journal& journal, MemoryStorage& storage) {
  const auto change_of = [native = storage.capabilities().fua == Fua::native](
                             const MemoryStorage::Call& call) -> std::optional<Change> {
    const std::vector<std::byte> data(call.data.begin(), call.data.end());
    switch (call.kind) {
    case MemoryStorage::Kind::write:
      return Change{Kind::write, call.range, data, call.fua && native};
    case MemoryStorage::Kind::zero:
      return Change{Kind::zero, call.range, {}, call.fua && native};
    case MemoryStorage::Kind::trim:
      return Change{Kind::trim, call.range, {}, call.fua && native};
    case MemoryStorage::Kind::flush:
      return Change{};
    default:
      return std::nullopt;
    }
  };
  // Of the call that this thread is in.
  static thread_local std::optional<std::size_t> number;
  storage.before = [&journal, change_of](const MemoryStorage::Call& call) {
    number.reset();
    if (const std::optional<Change> change = change_of(call)) {
      number = journal.begin(Side::storage, *change);
      std::this_thread::yield(); // requests take time, and others begin and end meanwhile
    }
  };
  storage.after = [&journal](const MemoryStorage::Call& /*call*/) {
    if (number) {
      std::this_thread::yield();
      journal.end(Side::storage, *number);
    }
  };
}

/// A client that sends what a qcow2 writer does, and worse. It never changes another's bytes, but
/// they lie side by side.
class Writer {
public:
  Writer(Exports& exports, const std::shared_ptr<MemoryDisk>& disk,
         const Capabilities& capabilities, Journal& journal, Allocator& allocator,
         std::uint64_t seed, bool has_header)
      : exports_(exports), disk_(disk), capabilities_(capabilities), journal_(journal),
        allocator_(allocator), random_(seed), has_header_(has_header),
        table_(allocator.allocate(unit, unit)) {
    connect();
  }

  void run(unsigned steps) {
    for (unsigned i = 0; i < steps; ++i)
      step();
    client_.reset();
  }

private:
  void connect() {
    auto storage = std::make_unique<MemoryStorage>(capabilities_, disk_);
    record_in(journal_, *storage);
    client_ = std::make_unique<Client>(exports_, "", std::move(storage));
  }

  void step();
  void append();
  void request(Kind kind, const ByteRange& range, bool fua);
  void send(Change change);
  [[nodiscard]] ByteRange some_part_of(const ByteRange& range) {
    const std::uint64_t begin = range.begin + random_() % range.size();
    return {begin, begin + 1 + random_() % (range.end - begin)};
  }
  [[nodiscard]] ByteRange something_of_mine() {
    return some_part_of(mine_.empty() ? table_ : mine_[random_() % mine_.size()]);
  }
  [[nodiscard]] bool chance(unsigned percent) { return random_() % 100 < percent; }

  Exports& exports_;
  const std::shared_ptr<MemoryDisk> disk_;
  const Capabilities capabilities_;
  Journal& journal_;
  Allocator& allocator_;
  std::mt19937_64 random_;
  const bool has_header_;
  const ByteRange table_;
  std::vector<ByteRange> mine_;
  unsigned written_ = 0;
  std::unique_ptr<Client> client_;
};

void Writer::step() {
  const auto dice = random_() % 100;
  if (dice < 50) {
    append();
  } else if (dice < 62) {
    // Entries one by one, slices, and whole tables.
    const std::uint64_t size = one_of<std::uint64_t>(random_, {8, 4096, unit});
    const std::uint64_t begin = table_.begin + random_() % (unit / size) * size;
    request(Kind::write, {begin, begin + size}, chance(10));
  } else if (dice < 72) {
    request(Kind::write, something_of_mine(), chance(40));
  } else if (dice < 79) {
    request(Kind::zero, something_of_mine(), chance(30));
  } else if (dice < 84) {
    request(Kind::trim, something_of_mine(), chance(30));
  } else if (dice < 93) {
    request(Kind::flush, {}, false);
  } else if (dice < 96) {
    const std::size_t size = random_() % (2 * unit) + 1;
    static_cast<void>(client_->read(random_() % (capabilities_.size - size), size));
  } else if (dice < 98 && has_header_) {
    // A new image over the old one, or none at all for a while.
    if (chance(30))
      send({Kind::zero, {0, 512}, {}, false});
    else
      send({Kind::write, {0, 112}, qcow2_header(one_of(random_, {9U, 16U, 17U})), chance(20)});
  } else if (dice < 99) {
    client_.reset();
    connect();
  }
}

void Writer::append() {
  const bool compressed = chance(85);
  const std::uint64_t size =
      compressed
          ? one_of<std::uint64_t>(random_, {1, 300, 2000, 9000, 27000, 66000}) + random_() % 500
          : unit;
  const ByteRange range = allocator_.allocate(size, compressed ? 1 : unit);
  if (range.empty()) {
    request(Kind::write, something_of_mine(), false);
    return;
  }
  mine_.push_back(range);
  request(Kind::write, range, chance(3));
}

void Writer::request(Kind kind, const ByteRange& range, bool fua) {
  Change change{kind, range, {}, fua};
  if (kind == Kind::write)
    change.data = pattern(range.size(), static_cast<unsigned>(random_()) + ++written_);
  send(std::move(change));
}

void Writer::send(Change change) {
  const Change sent = change;
  const std::size_t number = journal_.begin(Side::client, std::move(change));
  // What others are acknowledged from here on a flush need not cover.
  switch (sent.kind) {
  case Kind::write:
    client_->write(sent.range.begin, sent.data, sent.fua);
    break;
  case Kind::zero:
    client_->zero(sent.range, {chance(50), sent.fua, false});
    break;
  case Kind::trim:
    client_->trim(sent.range, sent.fua);
    break;
  case Kind::flush:
    client_->flush();
    break;
  }
  journal_.end(Side::client, number);
}

/// What a run left for the replay.
struct Recorded {
  std::vector<std::byte> initial;
  Journal journal;
};

void record(std::uint64_t seed, Recorded& recorded) {
  std::mt19937_64 random(seed);
  const Setup setup(random);
  const std::uint64_t size = setup.capabilities.size;

  // An image with something of others' in it, here and there.
  const auto disk = std::make_shared<MemoryDisk>(size);
  for (std::uint64_t begin = 0; begin + 3000 < size; begin += 3000 + random() % (4 * unit))
    disk->write(begin, pattern(3000, static_cast<unsigned>(random())), true);
  disk->write(0, qcow2_header(16), true);
  recorded.initial = disk->now();

  MemoryBudget budget(setup.memory);
  Writeback writeback;
  Export::Settings settings;
  settings.cluster_size = setup.cluster_size;
  settings.max_write = setup.max_write;
  settings.expire = setup.expire;
  settings.reserve = setup.reserve;
  settings.writeback = setup.writers > 0 ? &writeback : nullptr;
  Exports exports(settings, budget);
  writeback.start(setup.writers);
  Allocator allocator(unit, size);
  std::vector<std::unique_ptr<Writer>> clients;
  for (unsigned i = 0; i < setup.clients; ++i)
    clients.push_back(std::make_unique<Writer>(exports, disk, setup.capabilities, recorded.journal,
                                               allocator, random(), i == 0));
  const unsigned steps = 60 / setup.clients;
  if (clients.size() == 1) {
    clients.front()->run(steps);
  } else {
    std::vector<std::jthread> threads;
    threads.reserve(clients.size());
    for (const std::unique_ptr<Writer>& client : clients)
      threads.emplace_back([&client, steps] { client->run(steps); });
  }
  writeback.stop();
}

/// The states that were looked at.
std::uint64_t replay(const Recorded& recorded, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  CrashReplay replay(recorded.journal, recorded.initial);
  std::optional<std::string> wrong;
  unsigned moments = 0;
  while (!wrong && replay.advance()) {
    // In between, clients are promised no more and storage has no more to lose.
    const Journal::Entry& entry = replay.entry();
    const Change& change = recorded.journal.change(entry);
    const bool promises = change.kind == Kind::flush || change.fua;
    const bool begins = entry.moment == Journal::Moment::begin;
    if ((entry.side == Side::storage ? begins : !begins && promises) &&
        ++moments % one_moment_in == 0)
      wrong = replay.examine(random, states_of_each);
  }
  INFO(wrong.value_or(""));
  CHECK_FALSE(wrong);
  return replay.states();
}

std::uint64_t number_from_environment(const char* name, std::uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::stoull(text) : otherwise;
}

} // namespace

TEST_CASE("a flush that is acknowledged too early is found", "[crash_replay]") {
  const Change data = letters({1000, 3000}, 'a');
  Story story;
  story.does(Side::client, data);
  const std::size_t asked = story.begins(Side::client, flush);

  SECTION("storage has been flushed behind the write") {
    story.does(Side::storage, data).does(Side::storage, flush).ends(Side::client, asked);
    CHECK(story.verdict().empty());
  }
  SECTION("storage has nothing") {
    story.ends(Side::client, asked);
    CHECK_FALSE(story.verdict().empty());
  }
  SECTION("storage has not been flushed") {
    story.does(Side::storage, data).ends(Side::client, asked);
    CHECK_FALSE(story.verdict().empty());
  }
  SECTION("storage was flushed before") {
    story.does(Side::storage, flush).does(Side::storage, data).ends(Side::client, asked);
    CHECK_FALSE(story.verdict().empty());
  }
  SECTION("storage's flush began before its write had ended") {
    const std::size_t writing = story.begins(Side::storage, data);
    const std::size_t flushing = story.begins(Side::storage, flush);
    story.ends(Side::storage, writing);
    story.ends(Side::storage, flushing);
    story.ends(Side::client, asked);
    CHECK_FALSE(story.verdict().empty());
  }
  SECTION("a part is missing") {
    story.does(Side::storage, letters({1000, 2999}, 'a')).does(Side::storage, flush);
    story.ends(Side::client, asked);
    CHECK(story.says("the byte at 2999 is 0"));
  }
}

TEST_CASE("FUA makes its own bytes durable, and no others", "[crash_replay]") {
  const bool passed_on = GENERATE(true, false);
  const Change data = letters({0, 512}, 'a', true);
  Story story;
  story.does(Side::client, letters({0, 1024}, 'x')).does(Side::storage, letters({0, 1024}, 'x'));
  const std::size_t asked = story.begins(Side::client, data);
  story.does(Side::storage, letters({0, 512}, 'a', passed_on)).ends(Side::client, asked);
  CHECK(story.verdict().empty() == passed_on);
}

TEST_CASE("what replaces flushed bytes may be there or not, but nothing else", "[crash_replay]") {
  Story story;
  for (const char letter : {'a', 'b', 'c'}) {
    story.does(Side::client, letters({0, 2048}, letter));
    if (letter == 'a') {
      const std::size_t asked = story.begins(Side::client, flush);
      story.does(Side::storage, letters({0, 2048}, 'a')).does(Side::storage, flush);
      story.ends(Side::client, asked);
    }
  }
  story.does(Side::storage, letters({0, 2048}, 'b')).does(Side::storage, letters({512, 999}, 'c'));
  CHECK(story.verdict().empty());
  story.does(Side::storage, letters({999, 1000}, 'd'));
  CHECK(story.says("the byte at 999 is 100"));
}

TEST_CASE("bytes that nobody asked to change must not change", "[crash_replay]") {
  Story story;
  story.does(Side::client, letters({0, 100}, 'a')).does(Side::storage, letters({0, 101}, 'a'));
  CHECK(story.says("the byte at 100 is 97"));
}

TEST_CASE("a trim leaves the bytes or zeros, a zero only zeros", "[crash_replay]") {
  const Kind kind = GENERATE(Kind::trim, Kind::zero);
  Story story;
  const Change data = letters({0, 512}, 'a', true);
  const std::size_t asked = story.begins(Side::client, data);
  story.does(Side::storage, data).ends(Side::client, asked);
  story.does(Side::client, {kind, {0, 512}, {}, true});
  CHECK(story.verdict().empty() == (kind == Kind::trim));
}

TEST_CASE("two changes in the same bytes at once are found", "[crash_replay]") {
  Story story;
  story.does(Side::client, letters({0, 600}, 'a'));
  static_cast<void>(story.begins(Side::storage, letters({0, 512}, 'a')));
  static_cast<void>(story.begins(Side::storage, letters({511, 600}, 'a')));
  CHECK_THROWS_AS(story.verdict(), std::logic_error);
}

TEST_CASE("whenever the power fails, what was flushed is there", "[crash_replay]") {
  const bool repeated = std::getenv("SEED") != nullptr;
  const bool more = number_from_environment("LONG", 0) != 0;
  const std::uint64_t first = number_from_environment("SEED", std::random_device()());
  const std::uint64_t runs = repeated ? 1 : more ? 100 * usual_runs : usual_runs;
  std::uint64_t states = 0;
  for (std::uint64_t seed = first; seed < first + runs; ++seed) {
    INFO("SEED=" << seed << " repeats this run");
    Recorded recorded;
    record(seed, recorded);
    states += replay(recorded, seed);
  }
  WARN(states << " states, seeds " << first << " to " << first + runs - 1);
  CHECK(states * one_moment_in >= runs * 15 * states_of_each);
}
