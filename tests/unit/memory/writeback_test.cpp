#include "memory/writeback.hpp"

#include "catch.hpp"

#include <atomic>
#include <latch>
#include <semaphore>
#include <vector>

using namespace qcowcache;

namespace {

/// A source with a number of units to write; says when the last one was.
class Counted final : public Writeback::Source {
public:
  explicit Counted(std::size_t units) : left_(units), done_(static_cast<std::ptrdiff_t>(units)) {}

  void write_one() override {
    std::size_t left = left_.load();
    while (left > 0 && !left_.compare_exchange_weak(left, left - 1)) {
    }
    if (left == 0)
      return;
    if (during)
      during();
    ++written;
    done_.count_down();
  }
  [[nodiscard]] std::size_t waiting() const override { return left_.load(); }
  void tick() override { ++ticks; }
  void wait_until_done() { done_.wait(); }

  std::function<void()> during;
  std::atomic<std::size_t> written = 0;
  std::atomic<unsigned> ticks = 0;

private:
  std::atomic<std::size_t> left_;
  std::latch done_;
};

} // namespace

TEST_CASE("one wake is enough for all that waits at a source", "[writeback]") {
  Writeback writeback;
  const auto source = std::make_shared<Counted>(100);
  writeback.add(source);
  writeback.start(3);
  writeback.wake(source, source->waiting());
  source->wait_until_done();
  writeback.stop();
  CHECK(source->written == 100);
}

TEST_CASE("several writers work on one source at once", "[writeback]") {
  Writeback writeback;
  const auto source = std::make_shared<Counted>(4);
  std::latch together(4); // none gets past it until all four are there
  source->during = [&] { together.arrive_and_wait(); };
  writeback.add(source);
  writeback.start(4);
  writeback.wake(source, source->waiting());
  source->wait_until_done();
  writeback.stop();
  CHECK(source->written == 4);
}

TEST_CASE("sources take turns", "[writeback]") {
  Writeback writeback;
  const auto large = std::make_shared<Counted>(1000);
  const auto small = std::make_shared<Counted>(1);
  std::atomic<std::size_t> before_small = 0;
  small->during = [&] { before_small = large->written.load(); };
  writeback.add(large);
  writeback.add(small);
  writeback.wake(large, large->waiting());
  writeback.wake(small, small->waiting());
  writeback.start(1);
  small->wait_until_done();
  large->wait_until_done();
  writeback.stop();
  CHECK(before_small <= 2);
}

TEST_CASE("after stop nothing more is written, and what waits is still there", "[writeback]") {
  Writeback writeback;
  const auto source = std::make_shared<Counted>(10);
  std::binary_semaphore reached(0);
  std::binary_semaphore go_on(0);
  source->during = [&] {
    reached.release();
    go_on.acquire();
  };
  writeback.add(source);
  writeback.start(1);
  writeback.wake(source, source->waiting());
  reached.acquire();
  std::thread stopping([&] { writeback.stop(); });
  go_on.release();
  // The writer may begin with further units until it sees that it is to stop.
  std::atomic<bool> stopped = false;
  std::thread letting_go([&] {
    while (!stopped) {
      if (reached.try_acquire_for(std::chrono::milliseconds(1)))
        go_on.release();
    }
  });
  stopping.join();
  stopped = true;
  letting_go.join();
  const std::size_t written = source->written;
  CHECK(written + source->waiting() == 10);
  writeback.wake(source, source->waiting());
  CHECK(source->written == written);
}

TEST_CASE("a source that was removed is not called any more", "[writeback]") {
  Writeback writeback;
  const auto removed = std::make_shared<Counted>(5);
  const auto kept = std::make_shared<Counted>(5);
  writeback.add(removed);
  writeback.add(kept);
  writeback.wake(removed, removed->waiting());
  writeback.remove(removed);
  writeback.wake(removed, removed->waiting());
  writeback.wake(kept, kept->waiting());
  writeback.start(2);
  kept->wait_until_done();
  writeback.stop();
  CHECK(removed->written == 0);
}

TEST_CASE("sources hear the clock tick", "[writeback]") {
  std::binary_semaphore ticked(0);
  Writeback writeback([&] { ticked.release(); });
  const auto source = std::make_shared<Counted>(0);
  writeback.add(source);
  writeback.start(2);
  ticked.acquire();
  ticked.acquire();
  writeback.stop();
  CHECK(source->ticks >= 1);
}

TEST_CASE("sources that hang keep no others from being written", "[writeback]") {
  constexpr unsigned writers = 2;
  std::counting_semaphore<> ticked(0);
  Writeback writeback([&] { ticked.release(); });
  std::latch open(1);
  std::vector<std::shared_ptr<Counted>> hanging;
  std::atomic<int> caught = 0;
  for (int i = 0; i < 3; ++i) {
    hanging.push_back(std::make_shared<Counted>(10));
    hanging.back()->during = [&] {
      ++caught;
      open.wait();
    };
    writeback.add(hanging.back());
  }
  const auto works = std::make_shared<Counted>(1000);
  writeback.add(works);
  writeback.start(writers);
  for (const auto& source : hanging)
    writeback.wake(source, source->waiting());
  while (caught < 6) // each has caught as many as it may have
    std::this_thread::yield();
  writeback.wake(works, works->waiting());
  works->wait_until_done();
  // Those who are caught are replaced at a tick; who came then has been at work by the next one.
  while (ticked.try_acquire()) {
  }
  for (int i = 0; i < 3; ++i)
    ticked.acquire();
  CHECK(caught == 6);
  open.count_down();
  for (const auto& source : hanging)
    source->wait_until_done();
  writeback.stop();
}

TEST_CASE("a source whose turn does not come gets a writer while all others are busy",
          "[writeback]") {
  std::latch ticking(1);
  std::latch done(1);
  // The clock stands still: nobody else comes to the rescue.
  Writeback writeback([&] {
    ticking.count_down(ticking.try_wait() ? 0 : 1);
    done.wait();
  });
  const auto slow = std::make_shared<Counted>(1);
  const auto waits = std::make_shared<Counted>(1);
  bool written_meanwhile = false;
  slow->during = [&] {
    std::this_thread::sleep_for(Writeback::patience * 3 / 2); // storage takes its time
    writeback.wake(waits, waits->waiting());
    const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    while (waits->written == 0 && std::chrono::steady_clock::now() < give_up)
      std::this_thread::yield();
    written_meanwhile = waits->written == 1;
  };
  writeback.add(slow);
  writeback.add(waits);
  writeback.start(1);
  ticking.wait();
  writeback.wake(slow, slow->waiting());
  slow->wait_until_done();
  done.count_down();
  writeback.stop();
  CHECK(written_meanwhile);
}
