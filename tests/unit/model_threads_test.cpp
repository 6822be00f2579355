// Threads that write, zero, trim, flush and read at once, each bytes of its own that lie between
// those of the others in the same blocks and units: in one export, over storage that now and then
// refuses; or in several, whose last connection may end at any time.
//
//   QCOWCACHE_MODEL_SEED=N     another seed (1); the threads' requests follow from it, not their
//                              order
//   QCOWCACHE_MODEL_ROUNDS=N   how often, each time with the next seed

#include "catch.hpp"
#include "image_bytes.hpp"
#include "memory_storage.hpp"
#include "model_client.hpp"
#include "model_generator.hpp"
#include "watchdog.hpp"

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <deque>
#include <latch>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

using namespace qcowcache;

namespace {

constexpr std::uint64_t unit = WriteCache::least_unit_size;
constexpr std::uint64_t disk_size = 5 * unit + 4096 + 123;
constexpr std::uint64_t writers_to_storage = 5;

std::uint64_t number_from(const char* variable, std::uint64_t usual) {
  const char* text = std::getenv(variable);
  return text != nullptr ? std::stoull(text) : usual;
}

struct Case {
  /// As far as it is about storage and memory.
  ModelSetup setup;
  unsigned background_writers;
  bool multi_conn;
  std::size_t exports;
  std::uint64_t seed;

  [[nodiscard]] std::string text() const {
    return std::to_string(background_writers) + " writers, " + std::to_string(exports) +
           " exports, " + (multi_conn ? "one cache, " : "a cache each, ") +
           "QCOWCACHE_MODEL_SEED=" + std::to_string(seed) + "\n" + to_text({setup, {}});
  }
};

/// The server, its disks, one for each export, and what went wrong so far.
class World final : public ModelReferee {
public:
  explicit World(const Case& chosen)
      : chosen_(chosen), refusing_(chosen.exports == 1), budget_(chosen.setup.memory),
        exports_(settings(), budget_) {
    for (std::size_t i = 0; i < chosen.exports; ++i) {
      disks_.push_back(std::make_shared<MemoryDisk>(chosen.setup.size));
      disks_.back()->write(0, qcow2_header(16), true);
    }
    writeback_.start(chosen.background_writers);
  }
  World(const World&) = delete;
  World& operator=(const World&) = delete;
  ~World() override { writeback_.stop(); }
  /// Returns what went wrong first; nothing: all is well. REQUIRES: all clients have left.
  std::string end() {
    writeback_.stop();
    exports_.report_left();
    if (budget_.used() > 0)
      breaks("memory is still in use at the end");
    return first_wrong();
  }

  [[nodiscard]] const ModelSetup& setup() const { return chosen_.setup; }
  /// Nothing is lost when a connection ends: somebody else stays, or storage refuses nothing.
  [[nodiscard]] bool may_leave() const { return chosen_.multi_conn || chosen_.exports > 1; }
  [[nodiscard]] Exports& exports() { return exports_; }
  [[nodiscard]] MemoryBudget& budget() { return budget_; }
  [[nodiscard]] const std::vector<std::shared_ptr<MemoryDisk>>& disks() const { return disks_; }

  std::unique_ptr<MemoryStorage> make_storage(const std::shared_ptr<MemoryDisk>& disk) {
    Capabilities capabilities = MemoryStorage::everything(setup().size);
    capabilities.can_multi_conn = chosen_.multi_conn;
    capabilities.minimum = static_cast<std::uint32_t>(setup().minimum);
    capabilities.can_extents = setup().can_extents;
    auto storage = std::make_unique<MemoryStorage>(capabilities, disk);
    storage->before = [this](const MemoryStorage::Call& /*call*/) { before_call(); };
    return storage;
  }

  void breaks(const std::string& what) override {
    const std::lock_guard lock(mutex_);
    wrong_.push_back(what);
  }
  bool excuses(int error) override { return error == ENOSPC || error == EIO; }
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
    if (budget_.used() > setup().memory)
      breaks("more memory is used than allowed");
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
      breaks("bytes were lost");
    };
    return settings;
  }

  const Case chosen_;
  std::atomic<std::uint64_t> calls_ = 0;
  std::atomic<bool> refusing_;
  mutable std::mutex mutex_;
  std::vector<std::string> wrong_;
  MemoryBudget budget_;
  Writeback writeback_;
  Exports exports_;
  std::vector<std::shared_ptr<MemoryDisk>> disks_;
};

/// A client with a thread of its own. What it owns only it changes, so it knows what is there.
class ThreadClient {
public:
  ThreadClient(World& world, std::uint64_t number)
      : world_(world), client_(world, number, {world.setup().stripe, writers_to_storage, true}) {
    for (const std::shared_ptr<MemoryDisk>& disk : world.disks())
      views_.push_back({disk, ModelBytes(disk->now())});
    connect(number);
  }

  void work(const std::vector<ModelStep>& steps) {
    for (const ModelStep& step : steps) {
      if (!world_.first_wrong().empty())
        return;
      if (step.kind == StepKind::budget)
        world_.budget().set_limit(std::min<std::size_t>(step.length, world_.setup().memory));
      else if (step.kind != StepKind::disconnect)
        client_.carry_out(step);
      else if (world_.may_leave()) {
        leave();
        connect(export_ + 1);
      }
    }
  }
  void finish() {
    for (std::size_t i = 0; i < views_.size(); ++i) {
      client_.read({0, world_.setup().size});
      client_.flush();
      client_.check_stored("stored", {0, world_.setup().size}, false);
      leave();
      if (i + 1 < views_.size())
        connect(export_ + 1);
    }
  }
  void leave() { client_.disconnect(); }

private:
  void connect(std::size_t number) {
    export_ = number % views_.size();
    ModelView& view = views_[export_];
    client_.connect(world_.exports(), world_.make_storage(view.disk), view,
                    std::to_string(export_));
  }

  World& world_;
  /// Of each export.
  std::vector<ModelView> views_;
  std::size_t export_ = 0;
  ModelClient client_;
};

/// Returns what went wrong first; nothing: all is well.
std::string run_threads(const Case& chosen) {
  constexpr std::size_t steps = 800;
  World world(chosen);
  {
    std::vector<std::vector<ModelStep>> scripts(writers_to_storage);
    for (const ModelStep& step : random_steps(chosen.setup, chosen.seed, steps))
      scripts[step.connection].push_back(step);
    std::deque<ThreadClient> clients;
    for (std::uint64_t i = 0; i < writers_to_storage; ++i)
      clients.emplace_back(world, i);
    // Owns nothing, and stays when the others come and go.
    std::optional<ThreadClient> spectator;
    if (chosen.exports == 1)
      spectator.emplace(world, writers_to_storage);
    {
      std::latch all_there(static_cast<std::ptrdiff_t>(clients.size()));
      std::vector<std::jthread> threads;
      for (std::size_t i = 0; i < clients.size(); ++i) {
        threads.emplace_back([&, i] {
          all_there.arrive_and_wait();
          clients[i].work(scripts[i]);
        });
      }
    }
    world.heal();
    for (ThreadClient& client : clients)
      client.finish();
    if (spectator)
      spectator->leave();
  }
  return world.end();
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
        for (const std::size_t units : {3U, 64U, 10U}) {
          Case chosen{{}, background_writers, multi_conn, units == 10 ? 3U : 1U, seed};
          ModelSetup& setup = chosen.setup;
          setup.sharing = Sharing::disk;
          setup.connections = writers_to_storage;
          setup.memory = units * unit;
          setup.minimum = random() % 2 == 0 ? 1 : 4096;
          setup.size = align_down(disk_size, setup.minimum);
          setup.can_extents = random() % 2 == 0;
          setup.stripe = std::vector<std::uint64_t>{1, 37, 500, 3000, 9000}[random() % 5];
          watchdog.watch([&] { return chosen.text() + " hangs"; });
          INFO(chosen.text());
          REQUIRE(run_threads(chosen) == "");
        }
      }
    }
  }
}
