#include "cache/group_flush.hpp"

#include "catch.hpp"
#include "error_of.hpp"
#include "gate.hpp"
#include "memory_storage.hpp"
#include "watched_thread.hpp"

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>

using qcowcache::GroupFlush;
using Kind = MemoryStorage::Kind;

namespace {

const auto disk = MemoryStorage::everything(65536);
constexpr std::chrono::minutes for_ever{10};

std::size_t flushes(const MemoryStorage& storage) {
  return storage.calls(Kind::flush).size();
}

/// A thread that flushes, and what has come of it: 0, an errno, or -1 as long as it has not ended.
class Flushing {
public:
  Flushing(GroupFlush& group, MemoryStorage& storage, bool shares = true,
           std::optional<std::uint64_t> moment = std::nullopt)
      : thread_([this, &group, &storage, shares, moment] {
          result_ = error_of([&] { group.flush(storage, shares, moment, [] {}); });
        }) {}
  [[nodiscard]] bool waits() { return thread_.waits(); }
  [[nodiscard]] int ends() { return thread_.ends() ? result_.load() : -1; }

private:
  std::atomic<int> result_ = -1;
  WatchedThread thread_;
};

/// One whose storage has been asked, and takes until `ends`.
class HeldUp {
public:
  HeldUp(GroupFlush& group, MemoryStorage& storage,
         std::optional<std::uint64_t> moment = std::nullopt)
      : gate_(storage, Kind::flush), flushing_(group, storage, true, moment) {
    gate_.wait_until_reached();
  }
  [[nodiscard]] int ends() {
    gate_.let_go();
    return flushing_.ends();
  }

private:
  Gate gate_;
  Flushing flushing_;
};

} // namespace

TEST_CASE("flushes that come while one is under way share the next", "[group_flush]") {
  GroupFlush group(for_ever);
  MemoryStorage first(disk);
  MemoryStorage second(disk);
  MemoryStorage third(disk);
  HeldUp leads(group, first);
  Flushing follows(group, second);
  Flushing follows_too(group, third);
  REQUIRE(follows.waits());
  REQUIRE(follows_too.waits());
  CHECK(flushes(second) + flushes(third) == 0);
  CHECK(leads.ends() == 0);
  CHECK(follows.ends() == 0);
  CHECK(follows_too.ends() == 0);
  CHECK(flushes(second) + flushes(third) == 1);
}

TEST_CASE("one that had begun before is no answer", "[group_flush]") {
  GroupFlush group(for_ever);
  MemoryStorage first(disk);
  MemoryStorage second(disk);
  HeldUp leads(group, first);
  Flushing follows(group, second);
  REQUIRE(follows.waits());
  CHECK(leads.ends() == 0);
  CHECK(follows.ends() == 0);
  CHECK(flushes(second) == 1);
  // Nor is one that has ended.
  group.flush(second, true, std::nullopt, [] {});
  CHECK(flushes(second) == 2);
}

TEST_CASE("once a flush has failed each asks storage for itself", "[group_flush]") {
  GroupFlush group(for_ever);
  MemoryStorage first(disk);
  MemoryStorage second(disk);
  MemoryStorage third(disk);
  first.after = MemoryStorage::refusal(Kind::flush, EIO);
  HeldUp fails(group, first);
  {
    Flushing follows(group, second);
    REQUIRE(follows.waits());
    CHECK(fails.ends() == EIO);
    CHECK(follows.ends() == 0);
  }
  CHECK(flushes(second) == 1);
  // For good: who has not been told of what is lost must not share with who has.
  HeldUp held_up(group, second);
  CHECK(Flushing(group, third).ends() == 0);
  CHECK(flushes(third) == 1);
  CHECK(held_up.ends() == 0);
}

TEST_CASE("who may not share does not wait", "[group_flush]") {
  GroupFlush group(for_ever);
  MemoryStorage first(disk);
  MemoryStorage second(disk);
  HeldUp held_up(group, first);
  CHECK(Flushing(group, second, false).ends() == 0);
  CHECK(flushes(second) == 1);
  CHECK(held_up.ends() == 0);
}

TEST_CASE("nobody waits for ever for a connection that hangs", "[group_flush]") {
  GroupFlush group(std::chrono::milliseconds(5));
  MemoryStorage first(disk);
  MemoryStorage second(disk);
  HeldUp hangs(group, first);
  CHECK(Flushing(group, second).ends() == 0);
  CHECK(flushes(second) == 1);
  CHECK(hangs.ends() == 0);
}

TEST_CASE("whose client is gone waits for nobody's flush", "[group_flush]") {
  GroupFlush group(for_ever);
  MemoryStorage first(disk);
  MemoryStorage second(disk);
  HeldUp leads(group, first);
  const auto gone = [] { throw std::runtime_error("gone"); };
  CHECK_THROWS_AS(group.flush(second, true, std::nullopt, gone), std::runtime_error);
  CHECK(flushes(second) == 0);
  CHECK(leads.ends() == 0);
}

TEST_CASE("what was flushed is known of each connection, until a flush fails", "[group_flush]") {
  GroupFlush group;
  MemoryStorage one(disk);
  MemoryStorage other(disk);
  const auto flush = [&](MemoryStorage& storage, std::optional<std::uint64_t> moment) {
    return error_of([&] { group.flush(storage, true, moment, [] {}); });
  };
  REQUIRE(flush(one, 7) == 0);
  CHECK(group.is_flushed(one, 7));
  CHECK_FALSE(group.is_flushed(one, 8));
  CHECK_FALSE(group.is_flushed(other, 7));
  REQUIRE(flush(one, 6) == 0); // asked for earlier
  REQUIRE(flush(one, std::nullopt) == 0);
  CHECK(group.is_flushed(one, 7));
  REQUIRE(flush(one, 8) == 0);
  CHECK(group.is_flushed(one, 8));
  group.forget(one);
  CHECK_FALSE(group.is_flushed(one, 8));
  REQUIRE(flush(one, 8) == 0);
  other.before = MemoryStorage::refusal(Kind::flush, EIO);
  REQUIRE(flush(other, 8) == EIO);
  CHECK_FALSE(group.is_flushed(one, 8));
  REQUIRE(flush(one, 8) == 0);
  group.failed(); // by FUA
  CHECK_FALSE(group.is_flushed(one, 8));
  // Nor by one that had begun before.
  HeldUp held_up(group, one, 8);
  REQUIRE(flush(other, 8) == EIO);
  REQUIRE(held_up.ends() == 0);
  CHECK_FALSE(group.is_flushed(one, 8));
}
