#include "verify/decompressor_pool.hpp"

#include "catch.hpp"
#include "compressed_bytes.hpp"
#include "watched_thread.hpp"

#include <chrono>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

using qcowcache::DecompressorPool;
using qcowcache::qcow2::Compression;
using Account = DecompressorPool::Account;
using Loan = DecompressorPool::Loan;
using namespace std::chrono_literals;

namespace {

/// A pool in which decoding takes as long as the test says.
struct Bench {
  explicit Bench(std::size_t most) : pool(most, [this] { return now += taking; }) {}

  void decode(Loan loan, std::chrono::nanoseconds time = 1us) {
    taking = time;
    // Catch's own checks are for one thread.
    if (!std::move(loan).decode(Compression::deflate, stream, 4096).whole())
      throw std::logic_error("a stream that is good is not");
  }
  void decode(Account& account, std::chrono::nanoseconds time) {
    decode(pool.borrow(account), time);
  }
  /// Somebody who waits for a decompressor, and writes to `order` when it is there.
  std::unique_ptr<WatchedThread> wait(Account& account, const std::string& name,
                                      std::chrono::nanoseconds time = 1ms) {
    auto waiter = std::make_unique<WatchedThread>([this, &account, name, time] {
      Loan loan = pool.borrow(account);
      order += name;
      decode(std::move(loan), time);
    });
    CHECK(waiter->waits());
    return waiter;
  }

  const std::vector<std::byte> stream = deflated(compressible(4096, 1));
  std::chrono::nanoseconds now{0};
  std::chrono::nanoseconds taking{0};
  /// Changed only by who has the one decompressor.
  std::string order;
  DecompressorPool pool;
};

} // namespace

TEST_CASE("who wants more decompressors than there are waits", "[decompressor_pool]") {
  Bench bench(2);
  Account account;
  const Loan first = bench.pool.borrow(account);
  Loan second = bench.pool.borrow(account);
  CHECK_FALSE(bench.pool.try_borrow(account));
  const auto third = bench.wait(account, "third");
  SECTION("until one was not needed") {
    const Loan ends = std::move(second);
  }
  SECTION("for one stream") {
    bench.decode(std::move(second));
  }
  CHECK(third->ends());
}

TEST_CASE("a decompressor is lent for one stream at a time", "[decompressor_pool]") {
  Bench bench(1);
  Account account;
  Account other;
  Loan loan = bench.pool.borrow(account);
  const auto waiter = bench.wait(other, "other");
  bench.decode(std::move(loan));
  CHECK(waiter->ends()); // though the loan is in scope
  CHECK(bench.pool.try_borrow(other));
}

TEST_CASE("who has needed the least time is next", "[decompressor_pool]") {
  Bench bench(1);
  Account bomb;
  Account another;
  Account healthy;
  bench.decode(bomb, 10ms);
  bench.decode(another, 9ms);
  bench.decode(healthy, 5ms);
  Account holder;
  Loan loan = bench.pool.borrow(holder);
  const auto first = bench.wait(bomb, "b");
  const auto second = bench.wait(another, "a");
  const auto third = bench.wait(healthy, "h");
  const auto fourth = bench.wait(healthy, "h");
  bench.decode(std::move(loan));
  for (const auto* waiter : {&first, &second, &third, &fourth})
    CHECK((*waiter)->ends());
  CHECK(bench.order == "hhab");
}

TEST_CASE("nobody saves up time by being away", "[decompressor_pool]") {
  Bench bench(1);
  Account busy;
  Account late;
  for (unsigned i = 0; i < 10; ++i)
    bench.decode(busy, 10ms);
  Account holder;
  Loan loan = bench.pool.borrow(holder);
  const auto first = bench.wait(late, "l", 20ms);
  const auto second = bench.wait(late, "l", 20ms);
  const auto third = bench.wait(busy, "b", 20ms);
  bench.decode(std::move(loan));
  for (const auto* waiter : {&first, &second, &third})
    CHECK((*waiter)->ends());
  CHECK(bench.order == "lbl");
}

TEST_CASE("who has fewest is next, whatever it has needed", "[decompressor_pool]") {
  Bench bench(2);
  Account many;
  Account none;
  bench.decode(none, 1ms);
  Loan first = bench.pool.borrow(many);
  const Loan second = bench.pool.borrow(many);
  const auto greedy = bench.wait(many, "m");
  const auto modest = bench.wait(none, "n");
  bench.decode(std::move(first));
  CHECK(greedy->ends());
  CHECK(modest->ends());
  CHECK(bench.order == "nm");
}

TEST_CASE("the last decompressor is for those whose streams are quick", "[decompressor_pool]") {
  Bench bench(3);
  Account bomb;
  Account healthy;
  bench.decode(bomb, 10ms);
  Loan first = bench.pool.borrow(bomb);
  const Loan second = bench.pool.borrow(bomb);
  CHECK_FALSE(bench.pool.try_borrow(bomb));
  const auto slow = bench.wait(bomb, "b");
  for (unsigned i = 0; i < 3; ++i) {
    bench.decode(healthy, 1ms); // does not wait
    CHECK(bench.order.empty());
  }
  CHECK(slow->waits());
  bench.decode(std::move(first));
  CHECK(slow->ends());
}

TEST_CASE("who was slow is quick again when it has been so for a while", "[decompressor_pool]") {
  Bench bench(2);
  Account account;
  bench.decode(account, 10ms);
  {
    const Loan one = bench.pool.borrow(account);
    CHECK_FALSE(bench.pool.try_borrow(account));
  }
  for (unsigned i = 0; i < 40; ++i)
    bench.decode(account, 1ms);
  const Loan one = bench.pool.borrow(account);
  CHECK(bench.pool.try_borrow(account));
}
