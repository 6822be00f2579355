#include "cache/group_flush.hpp"

#include "catch.hpp"
#include "error_of.hpp"
#include "memory_storage.hpp"
#include "watched_thread.hpp"

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <latch>
#include <optional>
#include <stdexcept>
#include <system_error>

using qcowcache::GroupFlush;
using Kind = MemoryStorage::Kind;

namespace {

/// A connection to a disk, whose first flush can be held up.
class Flusher {
public:
  Flusher() {
    storage.before = [this](const MemoryStorage::Call& /*call*/) {
      if (holds_up.exchange(false)) {
        entered_.count_down();
        goes_on_.wait();
      }
      if (fails)
        throw std::system_error(EIO, std::generic_category(), "refused");
    };
  }
  [[nodiscard]] std::size_t flushes() const { return storage.calls(Kind::flush).size(); }
  void wait_until_entered() const { entered_.wait(); }
  void goes_on() { goes_on_.count_down(); }

  std::atomic<bool> holds_up = false;
  std::atomic<bool> fails = false;
  MemoryStorage storage{MemoryStorage::everything(65536)};

private:
  std::latch entered_{1};
  std::latch goes_on_{1};
};

/// A thread that flushes, and what has come of it: 0, an errno, or -1 as long as it has not ended.
class Flushing {
public:
  Flushing(GroupFlush& group, Flusher& flusher, bool shares = true,
           std::optional<std::uint64_t> moment = std::nullopt)
      : thread_([this, &group, &flusher, shares, moment] {
          try {
            group.flush(flusher.storage, shares, moment, [] {});
            result = 0;
          } catch (const std::system_error& error) {
            result = error.code().value();
          }
        }) {}
  [[nodiscard]] bool waits() { return thread_.waits(); }
  [[nodiscard]] int ends() { return thread_.ends() ? result.load() : -1; }

  std::atomic<int> result = -1;

private:
  WatchedThread thread_;
};

constexpr std::chrono::minutes for_ever{10};

} // namespace

TEST_CASE("flushes that come while one is under way share the next", "[group_flush]") {
  GroupFlush group(for_ever);
  Flusher first;
  Flusher second;
  Flusher third;
  first.holds_up = true;
  Flushing leads(group, first);
  first.wait_until_entered();
  second.holds_up = true;
  Flushing follows(group, second);
  Flushing follows_too(group, third);
  REQUIRE(follows.waits());
  REQUIRE(follows_too.waits());
  CHECK(second.flushes() + third.flushes() == 0);
  first.goes_on();
  CHECK(leads.ends() == 0);
  second.goes_on();
  CHECK(follows.ends() == 0);
  CHECK(follows_too.ends() == 0);
  CHECK(second.flushes() + third.flushes() == 1);
}

TEST_CASE("one that had begun before is no answer", "[group_flush]") {
  GroupFlush group(for_ever);
  Flusher first;
  Flusher second;
  first.holds_up = true;
  Flushing leads(group, first);
  first.wait_until_entered();
  Flushing follows(group, second);
  REQUIRE(follows.waits());
  first.goes_on();
  CHECK(leads.ends() == 0);
  CHECK(follows.ends() == 0);
  CHECK(second.flushes() == 1);
  // Nor is one that has ended.
  group.flush(second.storage, true, std::nullopt, [] {});
  CHECK(second.flushes() == 2);
}

TEST_CASE("once a flush has failed each asks storage for itself", "[group_flush]") {
  GroupFlush group(for_ever);
  Flusher first;
  Flusher second;
  Flusher third;
  first.holds_up = true;
  first.fails = true;
  Flushing fails(group, first);
  first.wait_until_entered();
  Flushing follows(group, second);
  REQUIRE(follows.waits());
  first.goes_on();
  CHECK(fails.ends() == EIO);
  CHECK(follows.ends() == 0);
  CHECK(second.flushes() == 1);
  // For good: who has not been told of what is lost must not share with who has.
  second.holds_up = true;
  Flushing held_up(group, second);
  second.wait_until_entered();
  Flushing own(group, third);
  CHECK(own.ends() == 0);
  CHECK(third.flushes() == 1);
  second.goes_on();
  CHECK(held_up.ends() == 0);
}

TEST_CASE("who may not share does not wait", "[group_flush]") {
  GroupFlush group(for_ever);
  Flusher first;
  Flusher second;
  first.holds_up = true;
  Flushing held_up(group, first);
  first.wait_until_entered();
  Flushing own(group, second, false);
  CHECK(own.ends() == 0);
  CHECK(second.flushes() == 1);
  first.goes_on();
  CHECK(held_up.ends() == 0);
}

TEST_CASE("nobody waits for ever for a connection that hangs", "[group_flush]") {
  GroupFlush group(std::chrono::milliseconds(5));
  Flusher hangs;
  Flusher second;
  hangs.holds_up = true;
  Flushing hanging(group, hangs);
  hangs.wait_until_entered();
  Flushing other(group, second);
  CHECK(other.ends() == 0);
  CHECK(second.flushes() == 1);
  hangs.goes_on();
  CHECK(hanging.ends() == 0);
}

TEST_CASE("whose client is gone waits for nobody's flush", "[group_flush]") {
  GroupFlush group(for_ever);
  Flusher first;
  Flusher second;
  first.holds_up = true;
  Flushing leads(group, first);
  first.wait_until_entered();
  const auto gone = [] { throw std::runtime_error("gone"); };
  CHECK_THROWS_AS(group.flush(second.storage, true, std::nullopt, gone), std::runtime_error);
  CHECK(second.flushes() == 0);
  first.goes_on();
  CHECK(leads.ends() == 0);
}

TEST_CASE("what was flushed is known of each connection, until a flush fails", "[group_flush]") {
  GroupFlush group;
  Flusher one;
  Flusher other;
  const auto flush = [&](Flusher& flusher, std::optional<std::uint64_t> moment) {
    return error_of([&] { group.flush(flusher.storage, true, moment, [] {}); });
  };
  REQUIRE(flush(one, 7) == 0);
  CHECK(group.is_flushed(one.storage, 7));
  CHECK_FALSE(group.is_flushed(one.storage, 8));
  CHECK_FALSE(group.is_flushed(other.storage, 7));
  REQUIRE(flush(one, 6) == 0); // asked for earlier
  REQUIRE(flush(one, std::nullopt) == 0);
  CHECK(group.is_flushed(one.storage, 7));
  REQUIRE(flush(one, 8) == 0);
  CHECK(group.is_flushed(one.storage, 8));
  group.forget(one.storage);
  CHECK_FALSE(group.is_flushed(one.storage, 8));
  REQUIRE(flush(one, 8) == 0);
  other.fails = true;
  REQUIRE(flush(other, 8) == EIO);
  CHECK_FALSE(group.is_flushed(one.storage, 8));
  REQUIRE(flush(one, 8) == 0);
  group.failed(); // by FUA
  CHECK_FALSE(group.is_flushed(one.storage, 8));
  // Nor by one that had begun before.
  one.holds_up = true;
  Flushing held_up(group, one, true, 8);
  one.wait_until_entered();
  REQUIRE(flush(other, 8) == EIO);
  one.goes_on();
  REQUIRE(held_up.ends() == 0);
  CHECK_FALSE(group.is_flushed(one.storage, 8));
}
