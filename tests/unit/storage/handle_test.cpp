#include "storage/handle.hpp"

#include "catch.hpp"
#include "memory_storage.hpp"
#include "watched_thread.hpp"

#include <atomic>
#include <latch>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

using qcowcache::Handle;

namespace {

std::unique_ptr<MemoryStorage> some_storage() {
  return std::make_unique<MemoryStorage>(MemoryStorage::everything(4096));
}

} // namespace

TEST_CASE("a handle gives the right to use its storage", "[handle]") {
  std::unique_ptr<MemoryStorage> storage = some_storage();
  const MemoryStorage* const itself = storage.get();
  Handle handle(std::move(storage));
  const std::optional<Handle::Use> use = handle.use();
  REQUIRE(use);
  CHECK(&use->storage() == itself);
}

TEST_CASE("a retired handle gives no right any more", "[handle]") {
  Handle handle(some_storage());
  handle.retire();
  CHECK_FALSE(handle.use());
}

TEST_CASE("who retires a handle waits for those who use it", "[handle]") {
  Handle handle(some_storage());
  std::optional<Handle::Use> used = handle.use();
  WatchedThread retiring([&] { handle.retire(); });
  const bool waited = retiring.waits();
  used.reset();
  CHECK(retiring.ends());
  CHECK(waited);
}

TEST_CASE("a handle was opened before whatever is done later", "[handle]") {
  const auto before = std::chrono::steady_clock::now();
  const Handle handle(some_storage());
  CHECK(handle.opened() >= before);
  CHECK(handle.opened() <= std::chrono::steady_clock::now());
}

TEST_CASE("a handle may be retired again", "[handle]") {
  Handle handle(some_storage());
  handle.retire();
  handle.retire();
  CHECK_FALSE(handle.use());
}

TEST_CASE("capabilities are there before and after a handle is retired", "[handle]") {
  Handle handle(some_storage());
  CHECK(handle.capabilities().size == 4096);
  handle.retire();
  CHECK(handle.capabilities().size == 4096);
}

TEST_CASE("a handle knows its own storage among those who write", "[handle]") {
  std::unique_ptr<MemoryStorage> storage = some_storage();
  const qcowcache::Storage* const itself = storage.get();
  const std::unique_ptr<MemoryStorage> other = some_storage();
  const Handle handle(std::move(storage));
  CHECK(handle.is(itself));
  CHECK_FALSE(handle.is(static_cast<const qcowcache::Storage*>(other.get())));
  CHECK_FALSE(handle.is(nullptr));
}

TEST_CASE("who retires a handle waits until the last use has ended", "[handle]") {
  Handle handle(some_storage());
  std::optional<Handle::Use> first = handle.use();
  std::optional<Handle::Use> second = handle.use();
  // No requirement before the uses have ended: the thread could never be joined.
  WatchedThread retiring([&] { handle.retire(); });
  const bool waited_for_both = retiring.waits();
  first.reset();
  const bool waited_for_second = retiring.waits();
  const bool refused_meanwhile = !handle.use();
  second.reset();
  CHECK(retiring.ends());
  CHECK(waited_for_both);
  CHECK(waited_for_second);
  CHECK(refused_meanwhile);
}

TEST_CASE("everybody who retires a handle waits for its users", "[handle]") {
  Handle handle(some_storage());
  std::optional<Handle::Use> use = handle.use();
  WatchedThread finalize([&] { handle.retire(); });
  WatchedThread close([&] { handle.retire(); });
  const bool both_waited = finalize.waits() && close.waits();
  use.reset();
  CHECK(finalize.ends());
  CHECK(close.ends());
  CHECK(both_waited);
}

TEST_CASE("a use that was moved ends once, where it went", "[handle]") {
  Handle handle(some_storage());
  std::optional<Handle::Use> keeper;
  {
    std::optional<Handle::Use> use = handle.use();
    keeper.emplace(std::move(*use));
  }
  WatchedThread retiring([&] { handle.retire(); });
  const bool waited = retiring.waits();
  keeper.reset();
  CHECK(retiring.ends());
  CHECK(waited);
}

TEST_CASE("no use is under way once a handle is retired, however many threads want one",
          "[handle]") {
  for (int round = 0; round < 50; ++round) {
    Handle handle(some_storage());
    std::atomic<int> users = 0;
    std::atomic<int> after_the_end = 0;
    std::atomic<bool> retired = false;
    constexpr int threads = 3;
    std::latch all_there(threads + 1);
    {
      std::vector<std::jthread> workers;
      for (int i = 0; i < threads; ++i) {
        workers.emplace_back([&] {
          all_there.arrive_and_wait();
          while (const std::optional<Handle::Use> use = handle.use()) {
            ++users;
            after_the_end += retired ? 1 : 0;
            std::this_thread::yield();
            --users;
          }
        });
      }
      all_there.arrive_and_wait();
      std::this_thread::yield();
      handle.retire();
      retired = true;
      after_the_end += users;
    }
    REQUIRE(after_the_end == 0);
  }
}
