// Threads that write, zero, trim, flush and read at once, each bytes of its own that lie between
// those of the others in the same blocks and units, over storage that now and then refuses.
//
//   QCOWCACHE_MODEL_SEED=N     another seed (1); the threads' requests follow from it, not their
//                              order
//   QCOWCACHE_MODEL_ROUNDS=N   how often, each time with the next seed

#include "catch.hpp"
#include "connection.hpp"
#include "image_bytes.hpp"
#include "memory_storage.hpp"
#include "model_bytes.hpp"
#include "watchdog.hpp"

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <latch>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

using namespace qcowcache;

namespace {

using Bytes = std::vector<std::byte>;

constexpr std::uint64_t unit = WriteCache::least_unit_size;
constexpr std::uint64_t header_end = 512;
constexpr std::uint64_t disk_size = 5 * unit + 4096 + 123;
constexpr std::size_t writers_to_storage = 5;

std::uint64_t number_from(const char* variable, std::uint64_t usual) {
  const char* text = std::getenv(variable);
  return text != nullptr ? std::stoull(text) : usual;
}

struct Case {
  unsigned background_writers;
  bool multi_conn;
  std::size_t memory;
  std::uint32_t minimum;
  bool extents;
  std::uint64_t stripe;
  std::uint64_t seed;

  [[nodiscard]] std::string text() const {
    return std::to_string(background_writers) + " writers, " +
           (multi_conn ? "one cache, " : "a cache each, ") + std::to_string(memory) +
           " bytes of memory, blocks of " + std::to_string(minimum) + ", " +
           (extents ? "extents" : "no extents") + ", stripes of " + std::to_string(stripe) +
           ", QCOWCACHE_MODEL_SEED=" + std::to_string(seed);
  }
};

/// The server, its one disk, and what went wrong so far.
class World {
public:
  explicit World(const Case& chosen)
      : chosen_(chosen), most_memory_(chosen.memory), budget_(chosen.memory),
        exports_(settings(), budget_),
        disk_(std::make_shared<MemoryDisk>(align_down(disk_size, chosen.minimum))) {
    disk_->write(0, qcow2_header(16), true);
    writeback_.start(chosen.background_writers);
  }
  World(const World&) = delete;
  World& operator=(const World&) = delete;
  ~World() { writeback_.stop(); }

  [[nodiscard]] const Case& chosen() const { return chosen_; }
  [[nodiscard]] Exports& exports() { return exports_; }
  [[nodiscard]] MemoryBudget& budget() { return budget_; }
  [[nodiscard]] const std::shared_ptr<MemoryDisk>& disk() const { return disk_; }
  [[nodiscard]] std::uint64_t size() const { return align_down(disk_size, chosen_.minimum); }

  void wrong(const std::string& what) {
    const std::lock_guard lock(mutex_);
    wrong_.push_back(what);
  }
  [[nodiscard]] std::string first_wrong() const {
    const std::lock_guard lock(mutex_);
    return wrong_.empty() ? std::string() : wrong_.front();
  }

  void heal() { refusing_ = false; }

  /// Called by storage in whatever thread calls it: delays, and refuses, at random.
  void before_call() {
    const std::uint64_t number = calls_.fetch_add(1) + chosen_.seed * 1000003;
    const std::uint64_t chance = (number * 0x9e3779b97f4a7c15U) >> 40U;
    for (std::uint64_t i = 0; i < chance % 4; ++i)
      std::this_thread::yield();
    if (budget_.used() > most_memory_)
      wrong("more memory is used than allowed");
    if (refusing_ && chance % 19 == 0)
      throw std::system_error(chance % 2 == 0 ? ENOSPC : EIO, std::generic_category(), "refused");
  }

private:
  Export::Settings settings() {
    Export::Settings settings;
    settings.max_write = 4 * unit;
    settings.expire = std::chrono::milliseconds(20);
    if (chosen_.seed % 2 == 0)
      settings.max_delay = std::chrono::milliseconds(chosen_.seed % 50);
    settings.reserve = chosen_.seed % 3 * 4 * unit;
    settings.writeback = chosen_.background_writers > 0 ? &writeback_ : nullptr;
    settings.report_loss = [this](const std::string& /*name*/, const Unsaved& /*lost*/) {
      wrong("bytes were lost");
    };
    return settings;
  }

  const Case chosen_;
  const std::size_t most_memory_;
  std::atomic<std::uint64_t> calls_ = 0;
  std::atomic<bool> refusing_ = true;
  mutable std::mutex mutex_;
  std::vector<std::string> wrong_;
  MemoryBudget budget_;
  Writeback writeback_;
  Exports exports_;
  std::shared_ptr<MemoryDisk> disk_;
};

/// A client with a thread of its own. What it owns only it changes, so it knows what is there.
class Client {
public:
  Client(World& world, std::size_t number)
      : world_(world), number_(number), random_(world.chosen().seed * 100 + number),
        model_(world.disk()->now()) {
    connect();
  }
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;
  ~Client() = default;

  void work(unsigned requests) {
    for (unsigned i = 0; i < requests && world_.first_wrong().empty(); ++i)
      one_request();
  }

  /// The first client owns the header, too.
  void write_header() {
    Bytes header = qcow2_header(std::vector{9U, 12U, 16U, 16U, 17U}[random_() % 5]);
    if (random_() % 4 == 0)
      header.assign(header.size(), std::byte{0});
    write({0, header.size()}, header, random_() % 4 == 0);
  }

  void flush() {
    if (request([](WriteCache& cache, Storage& storage) { cache.flush(storage); },
                Image::Request{}))
      check_all("flushed", world_.disk()->durable());
  }

  void check_all(const char* where, const Bytes& found) {
    for (std::uint64_t begin = 0; begin < world_.size();) {
      const std::uint64_t end = std::min(world_.size(), end_of_stripe(begin));
      if (owns(begin))
        check(where, begin, std::span(found).subspan(begin, end - begin));
      begin = end;
    }
  }

  void read_all() {
    Bytes found(world_.size());
    if (request([&](WriteCache& cache, Storage& storage) { cache.read(storage, 0, found); },
                Image::Request{}))
      check_all("read", found);
  }

  void leave() {
    connection_->drain();
    connection_->end();
    if (!storage_->violations().empty())
      world_.wrong("storage was called wrongly: " + storage_->violations().front());
    connection_.reset();
  }

private:
  void connect() {
    Capabilities capabilities = MemoryStorage::everything(world_.size());
    capabilities.can_multi_conn = world_.chosen().multi_conn;
    capabilities.minimum = world_.chosen().minimum;
    capabilities.preferred = std::max(capabilities.preferred, capabilities.minimum);
    capabilities.can_extents = world_.chosen().extents;
    auto storage = std::make_unique<MemoryStorage>(capabilities, world_.disk());
    storage->before = [this](const MemoryStorage::Call& /*call*/) { world_.before_call(); };
    storage_ = storage.get();
    connection_ = std::make_unique<Connection>(world_.exports(), "export");
    connection_->begin(std::move(storage));
  }

  [[nodiscard]] std::uint64_t end_of_stripe(std::uint64_t offset) const {
    const std::uint64_t stripe = world_.chosen().stripe;
    return offset < header_end ? header_end : (offset / stripe + 1) * stripe;
  }
  [[nodiscard]] bool owns(std::uint64_t offset) const {
    return number_ ==
           (offset < header_end ? 0 : offset / world_.chosen().stripe % writers_to_storage);
  }

  /// Returns whether it succeeded.
  template <typename Work>
  bool request(Work work, const Image::Request& access = Image::Request{true}) {
    try {
      const Connection::InUse in_use = connection_->in_use(access);
      work(in_use.cache, in_use.use.storage());
      return true;
    } catch (const std::system_error& error) {
      if (error.code().value() != ENOSPC && error.code().value() != EIO)
        world_.wrong(std::string("failed for no reason: ") + error.what());
    }
    return false;
  }

  void check(const char* where, std::uint64_t offset, std::span<const std::byte> found) {
    if (const auto wrong = model_.first_wrong(offset, found))
      world_.wrong(std::string(where) + ": byte " + std::to_string(*wrong) + " of client " +
                   std::to_string(number_));
    else
      model_.seen(offset, found);
  }

  void check_durable(const ByteRange& range) {
    const Bytes durable = world_.disk()->durable();
    check("stored by FUA", range.begin, std::span(durable).subspan(range.begin, range.size()));
  }

  void write(const ByteRange& range, const Bytes& data, bool fua) {
    model_.may_be(range.begin, data);
    if (!request([&](WriteCache& cache, Storage& storage) {
          cache.write(storage, range.begin, data, fua);
        }))
      return;
    model_.is(range.begin, data);
    if (fua)
      check_durable(range);
  }

  void zero(const ByteRange& range, const Storage::ZeroOptions& options) {
    const Bytes zeros(range.size());
    model_.may_be(range.begin, zeros);
    if (!request([&](WriteCache& cache, Storage& storage) { cache.zero(storage, range, options); }))
      return;
    model_.is(range.begin, zeros);
    if (options.fua)
      check_durable(range);
  }

  void trim(const ByteRange& range, bool fua) {
    const ByteRange blocks = align_inward(range, world_.chosen().minimum);
    if (!request([&](WriteCache& cache, Storage& storage) { cache.trim(storage, range, fua); }))
      return; // storage in memory refuses it as a whole
    model_.is(blocks.begin, Bytes(blocks.size()));
    if (fua)
      check_durable(blocks);
  }

  /// Some or all of a stripe of its own, not far from where the others are at work.
  ByteRange some_range() {
    const std::uint64_t stripe = world_.chosen().stripe;
    position_ += random_() % 3 == 0 ? random_() % world_.size() : random_() % 2000;
    const std::uint64_t number = position_ % world_.size() / stripe;
    const std::uint64_t mine = number - number % writers_to_storage + number_;
    ByteRange range{mine * stripe, std::min(world_.size(), (mine + 1) * stripe)};
    range.begin = std::max(range.begin, header_end);
    if (!range.empty() && random_() % 2 == 0) {
      range.begin += random_() % range.size();
      range.end = range.begin + 1 + random_() % range.size();
    }
    return range;
  }

  void one_request() {
    const ByteRange range = some_range();
    const auto kind = random_() % 40;
    if (range.empty())
      return;
    if (kind < 20) {
      write(range, pattern(range.size(), static_cast<unsigned>(random_())), kind < 3);
    } else if (kind < 23) {
      zero(range, {kind == 20, kind == 21, false});
    } else if (kind < 25) {
      trim(range, kind == 24);
    } else if (kind < 27) {
      flush();
    } else if (kind == 27) {
      read_all();
    } else if (kind == 28 && world_.chosen().multi_conn) {
      leave(); // somebody else stays, so nothing can be lost
      connect();
    } else if (kind == 29 && number_ == 0) {
      write_header();
    } else if (kind == 29 && number_ == 1) {
      // Less than two units, half, or all of it.
      world_.budget().set_limit(world_.chosen().memory /
                                std::vector{64U, 2U, 1U, 1U}[random_() % 4]);
    } else {
      Bytes found(range.size());
      if (request([&](WriteCache& cache, Storage& storage) {
            cache.read(storage, range.begin, found);
          }))
        check("read", range.begin, found);
    }
  }

  World& world_;
  const std::size_t number_;
  std::mt19937_64 random_;
  ModelBytes model_;
  std::uint64_t position_ = 0;
  MemoryStorage* storage_ = nullptr;
  std::unique_ptr<Connection> connection_;
};

/// Returns what went wrong first; nothing: all is well.
std::string run_threads(const Case& chosen) {
  constexpr unsigned requests = 120;
  World world(chosen);
  {
    std::vector<std::unique_ptr<Client>> clients;
    for (std::size_t i = 0; i < writers_to_storage; ++i)
      clients.push_back(std::make_unique<Client>(world, i));
    // Owns nothing, and stays when the others come and go.
    Client spectator(world, writers_to_storage);
    {
      std::latch all_there(static_cast<std::ptrdiff_t>(clients.size()));
      std::vector<std::jthread> threads;
      for (const std::unique_ptr<Client>& client : clients) {
        threads.emplace_back([&all_there, &client] {
          all_there.arrive_and_wait();
          client->work(requests);
        });
      }
    }
    world.heal();
    for (const std::unique_ptr<Client>& client : clients) {
      client->read_all();
      client->flush();
      client->check_all("stored", world.disk()->now());
      client->leave();
    }
    spectator.leave();
  }
  world.exports().report_left();
  return world.first_wrong();
}

} // namespace

TEST_CASE("threads that write between each other's bytes find and store their own", "[model]") {
  const std::uint64_t first = number_from("QCOWCACHE_MODEL_SEED", 1);
  const std::uint64_t rounds = number_from("QCOWCACHE_MODEL_ROUNDS", 2);
  Watchdog watchdog("threads against the model");
  for (std::uint64_t seed = first; seed - first < rounds; ++seed) {
    std::mt19937_64 random(seed);
    for (const unsigned background_writers : {0U, 1U, 4U, 16U}) {
      for (const bool multi_conn : {true, false}) {
        for (const std::size_t memory : {std::size_t{3} * unit, std::size_t{64} * unit}) {
          const Case chosen{background_writers,
                            multi_conn,
                            memory,
                            random() % 2 == 0 ? 1U : 4096U,
                            random() % 2 == 0,
                            std::vector<std::uint64_t>{1, 37, 500, 3000, 9000}[random() % 5],
                            seed};
          watchdog.watch([&] { return chosen.text() + " hangs"; });
          INFO(chosen.text());
          REQUIRE(run_threads(chosen) == "");
        }
      }
    }
  }
}
