#include "cache/range_lock.hpp"

#include "catch.hpp"
#include "watched_thread.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <latch>
#include <list>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

using qcowcache::ByteRange;
using qcowcache::RangeLock;

namespace {

/// A thread that owns a range from when it is granted until it is told to give it back.
class Owner {
public:
  Owner(RangeLock& lock, const ByteRange& range)
      : thread_([this, &lock, range] {
          const RangeLock::Owned owned = lock.own(range);
          granted_.count_down();
          give_back_.wait();
        }) {}

  [[nodiscard]] bool waits() { return thread_.waits() && !granted_.try_wait(); }
  [[nodiscard]] bool is_granted() {
    // Asleep before that, it waits for the range.
    while (!granted_.try_wait()) {
      if (thread_.waits() && !granted_.try_wait())
        return false;
    }
    return true;
  }
  void may_give_back() {
    if (!std::exchange(told_, true))
      give_back_.count_down();
  }
  void gives_back() {
    may_give_back();
    REQUIRE(thread_.ends());
  }

private:
  std::latch granted_{1};
  std::latch give_back_{1};
  bool told_ = false;
  WatchedThread thread_;
};

/// Those who asked for ranges of one lock. All are told to give back before the first is waited
/// for.
class Owners {
public:
  Owners() = default;
  Owners(const Owners&) = delete;
  Owners& operator=(const Owners&) = delete;
  ~Owners() {
    for (Owner& owner : owners_)
      owner.may_give_back();
  }

  Owner& ask(const ByteRange& range) { return owners_.emplace_back(lock_, range); }
  [[nodiscard]] RangeLock& lock() { return lock_; }

private:
  RangeLock lock_;
  std::list<Owner> owners_;
};

} // namespace

TEST_CASE("a range that overlaps an owned one is granted when that is given back", "[range_lock]") {
  const ByteRange second = GENERATE(ByteRange{100, 200}, ByteRange{199, 300}, ByteRange{0, 101},
                                    ByteRange{150, 151}, ByteRange{0, 1000});
  Owners owners;
  Owner& owner = owners.ask({100, 200});
  REQUIRE(owner.is_granted());
  Owner& waiting = owners.ask(second);
  REQUIRE(waiting.waits());
  owner.gives_back();
  REQUIRE(waiting.is_granted());
}

TEST_CASE("ranges that share no byte are owned at the same time", "[range_lock]") {
  Owners owners;
  REQUIRE(owners.ask({100, 200}).is_granted());
  REQUIRE(owners.ask({0, 100}).is_granted());
  REQUIRE(owners.ask({200, UINT64_MAX}).is_granted());
}

TEST_CASE("an empty range keeps nobody waiting and waits for nobody", "[range_lock]") {
  Owners owners;
  Owner& whole = owners.ask({0, 1000});
  REQUIRE(whole.is_granted());
  REQUIRE(owners.ask({500, 500}).is_granted());
  whole.gives_back();
  REQUIRE(owners.ask({0, 1000}).is_granted());
}

TEST_CASE("ranges that overlap are granted in the order in which they were asked for",
          "[range_lock]") {
  Owners owners;
  std::vector<Owner*> in_order = {&owners.ask({0, 100})};
  REQUIRE(in_order.front()->is_granted());
  for (const std::uint64_t end : {100U, 50U, 200U, 10U}) {
    in_order.push_back(&owners.ask({0, end}));
    REQUIRE(in_order.back()->waits());
  }
  while (!in_order.empty()) {
    REQUIRE(in_order.front()->is_granted());
    for (std::size_t later = 1; later < in_order.size(); ++later)
      REQUIRE(in_order[later]->waits());
    in_order.front()->gives_back();
    in_order.erase(in_order.begin());
  }
}

TEST_CASE("who waits is not overtaken by a later range that overlaps it", "[range_lock]") {
  Owners owners;
  Owner& first = owners.ask({0, 100});
  REQUIRE(first.is_granted());
  Owner& wide = owners.ask({0, 200});
  REQUIRE(wide.waits());
  Owner& late = owners.ask({150, 160});
  REQUIRE(late.waits());

  first.gives_back();
  REQUIRE(wide.is_granted());
  REQUIRE(late.waits());
  wide.gives_back();
  REQUIRE(late.is_granted());
}

TEST_CASE("who waits does not keep others from ranges that nobody asked for", "[range_lock]") {
  Owners owners;
  REQUIRE(owners.ask({0, 100}).is_granted());
  REQUIRE(owners.ask({50, 150}).waits());
  REQUIRE(owners.ask({150, 250}).is_granted());
}

TEST_CASE("who waits only until a moment keeps nobody waiting after it", "[range_lock]") {
  RangeLock lock;
  const auto now = std::chrono::steady_clock::now();
  auto first = std::make_unique<RangeLock::Owned>(lock.own({0, 10}));
  CHECK_FALSE(lock.own_until({5, 20}, now));
  CHECK(lock.own_until({10, 20}, now)); // behind nobody
  first.reset();
  CHECK(lock.own_until({5, 20}, now));
}

TEST_CASE("a range that waits for two is granted with the second", "[range_lock]") {
  Owners owners;
  Owner& left = owners.ask({0, 100});
  Owner& right = owners.ask({100, 200});
  REQUIRE(left.is_granted());
  REQUIRE(right.is_granted());
  Owner& both = owners.ask({50, 150});
  REQUIRE(both.waits());
  left.gives_back();
  REQUIRE(both.waits());
  right.gives_back();
  REQUIRE(both.is_granted());
}

TEST_CASE("all that waited for one range and share no byte are granted together", "[range_lock]") {
  Owners owners;
  Owner& whole = owners.ask({0, 1000});
  REQUIRE(whole.is_granted());
  Owner& left = owners.ask({0, 500});
  Owner& right = owners.ask({500, 1000});
  REQUIRE(left.waits());
  REQUIRE(right.waits());
  whole.gives_back();
  REQUIRE(left.is_granted());
  REQUIRE(right.is_granted());
}

TEST_CASE("a range that was moved is given back once, by its new owner", "[range_lock]") {
  Owners owners;
  std::optional<RangeLock::Owned> keeper;
  {
    RangeLock::Owned owned = owners.lock().own({0, 100});
    keeper.emplace(std::move(owned));
  }
  Owner& waiting = owners.ask({0, 100});
  REQUIRE(waiting.waits());
  keeper.reset();
  REQUIRE(waiting.is_granted());
}

TEST_CASE("a range is given back when an exception ends its owner's work", "[range_lock]") {
  Owners owners;
  const auto fail = [&] {
    const RangeLock::Owned owned = owners.lock().own({0, 100});
    throw std::runtime_error("storage failed");
  };
  CHECK_THROWS_AS(fail(), std::runtime_error);
  REQUIRE(owners.ask({0, 100}).is_granted());
}

TEST_CASE("no byte ever has two owners, whatever ranges many threads ask for", "[range_lock]") {
  constexpr unsigned threads = 4;
  constexpr std::size_t size = 64;
  RangeLock lock;
  std::array<std::atomic<unsigned>, size> owner_of{};
  std::array<unsigned, size> times_owned{}; // without a lock but that of its range
  std::atomic<unsigned> owned_in_all = 0;
  std::atomic<int> collisions = 0;
  {
    std::latch all_there(threads);
    std::vector<std::jthread> workers;
    for (unsigned self = 1; self <= threads; ++self) {
      workers.emplace_back([&, self] {
        std::minstd_rand dice(self);
        all_there.arrive_and_wait();
        for (int i = 0; i < 2000; ++i) {
          const std::size_t begin = dice() % size;
          const std::size_t end = std::min(size, begin + 1 + dice() % 16);
          const RangeLock::Owned owned = lock.own({begin, end});
          for (std::size_t at = begin; at < end; ++at)
            collisions += owner_of[at].exchange(self) == 0 ? 0 : 1;
          for (std::size_t at = begin; at < end; ++at)
            ++times_owned[at];
          owned_in_all += static_cast<unsigned>(end - begin);
          std::this_thread::yield();
          for (std::size_t at = begin; at < end; ++at)
            collisions += owner_of[at].exchange(0) == self ? 0 : 1;
        }
      });
    }
  }
  CHECK(collisions == 0);
  CHECK(std::accumulate(times_owned.begin(), times_owned.end(), 0U) == owned_in_all);
}
