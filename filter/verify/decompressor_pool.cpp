#include "verify/decompressor_pool.hpp"

#include <algorithm>
#include <cstdint>
#include <ctime>
#include <new>
#include <thread>
#include <tuple>

namespace qcowcache {

namespace {
/// Clusters of 64 KiB are decoded in less, and most of 512 KiB.
constexpr std::chrono::milliseconds quick{2};
} // namespace

std::size_t DecompressorPool::usual() noexcept {
  return std::clamp<std::size_t>(std::thread::hardware_concurrency() + std::size_t{1}, 2, 5);
}

std::chrono::nanoseconds DecompressorPool::thread_time() noexcept {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
}

qcow2::Decoding DecompressorPool::Loan::decode(qcow2::Compression compression,
                                               std::span<const std::byte> bytes,
                                               std::uint32_t cluster_size) && {
  Loan ending(std::move(*this));
  const std::chrono::nanoseconds began = pool_.clock_();
  const qcow2::Decoding decoding = ending.decompressor_->decode(compression, bytes, cluster_size);
  const std::chrono::nanoseconds used = pool_.clock_() - began;
  pool_.take_back(*std::exchange(ending.account_, nullptr), std::move(ending.decompressor_), used);
  return decoding;
}

bool DecompressorPool::may_have(const Lock& /*lock*/, const Account& account) const noexcept {
  const std::size_t left = most_ - lent_;
  return left > 1 || (left == 1 && (most_ == 1 || account.usual_ <= quick));
}

void DecompressorPool::arrive(const Lock& /*lock*/, Account& account) noexcept {
  if (account.lent_ == 0 && account.waiting_ == 0)
    account.spent_ = std::max(account.spent_, now_);
}

void DecompressorPool::lend(const Lock& /*lock*/, Account& account) noexcept {
  ++lent_;
  ++account.lent_;
  now_ = std::max(now_, account.spent_);
}

/// Whoever is next, and may have one, gets it.
void DecompressorPool::serve(const Lock& lock) noexcept {
  for (;;) {
    auto next = waiters_.end();
    for (auto it = waiters_.begin(); it != waiters_.end(); ++it) {
      const auto rank = [](const Waiter& waiter) {
        return std::tuple(waiter.account.lent_, waiter.account.spent_);
      };
      if (may_have(lock, (*it)->account) && (next == waiters_.end() || rank(**it) < rank(**next)))
        next = it;
    }
    if (next == waiters_.end())
      return;
    Waiter& waiter = **next;
    waiters_.erase(next);
    --waiter.account.waiting_;
    lend(lock, waiter.account);
    waiter.is_served = true;
    waiter.served.notify_one();
  }
}

DecompressorPool::Loan DecompressorPool::borrow(Account& account) {
  Lock lock(mutex_);
  arrive(lock, account);
  if (waiters_.empty() && may_have(lock, account)) {
    lend(lock, account);
  } else {
    Waiter waiter{account, {}, false};
    waiters_.push_back(&waiter);
    ++account.waiting_;
    serve(lock);
    waiter.served.wait(lock, [&] { return waiter.is_served; });
  }
  return make_loan(std::move(lock), account);
}

std::optional<DecompressorPool::Loan> DecompressorPool::try_borrow(Account& account) {
  Lock lock(mutex_);
  arrive(lock, account);
  // Those who wait may not have it, or it would be theirs.
  if (!may_have(lock, account))
    return std::nullopt;
  lend(lock, account);
  return make_loan(std::move(lock), account);
}

DecompressorPool::Loan DecompressorPool::make_loan(Lock lock, Account& account) {
  std::unique_ptr<qcow2::Decompressor> decompressor;
  if (!idle_.empty()) {
    decompressor = std::move(idle_.back());
    idle_.pop_back();
  } else {
    try {
      idle_.reserve(most_);
      decompressor = std::make_unique<qcow2::Decompressor>();
    } catch (const std::bad_alloc&) {
      lock.unlock();
      take_back(account, nullptr, std::nullopt);
      throw;
    }
  }
  return {*this, account, std::move(decompressor)};
}

void DecompressorPool::take_back(Account& account,
                                 std::unique_ptr<qcow2::Decompressor> decompressor,
                                 std::optional<std::chrono::nanoseconds> used) noexcept {
  const Lock lock(mutex_);
  if (decompressor)
    idle_.push_back(std::move(decompressor)); // there is room for all that were made
  --lent_;
  --account.lent_;
  if (used) {
    account.spent_ += *used;
    // One that was slow is to be expected again for a while.
    account.usual_ = std::max(*used, account.usual_ - account.usual_ / 8);
  }
  serve(lock);
}

} // namespace qcowcache
