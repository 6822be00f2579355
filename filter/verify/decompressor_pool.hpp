#pragma once

#include "verify/qcow2/decompressor.hpp"

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace qcowcache {

/// A few decompressors that everybody shares, so that their memory does not grow with the number of
/// clients: each has a buffer of one cluster, up to 2 MiB, and up to 200 KiB for its decoders. They
/// are made when they are needed, and kept.
///
/// Each is lent for one stream at a time. When several want one, the next goes to who has fewest at
/// the moment, and among those to who has needed the least processor time for what was decoded: a
/// stream of 4 KiB may take as long as a thousand others. The last one that is left is lent only to
/// those whose streams are quick, so that these need not wait for the end of a slow one.
/// Source of the order: P. Goyal, H. M. Vin, H. Cheng, "Start-time Fair Queueing", 1996.
///
/// Thread safe. Whoever waits for one waits for others to have decoded, and for nothing else, if
/// all keep to it: REQUIRES: no mutex is held in `borrow`, and nothing is waited for between that
/// and the end of the loan.
class DecompressorPool {
public:
  /// More than one for each processor, and one for who is quick, decode no faster; nor more than
  /// five, since those who write are that many by default.
  [[nodiscard]] static std::size_t usual() noexcept;

  /// Those who decode for one image. The pool knows nobody else's.
  class Account {
  public:
    Account() = default;
    Account(const Account&) = delete;
    Account& operator=(const Account&) = delete;
    ~Account() = default;

  private:
    friend class DecompressorPool;
    // All guarded by the pool's mutex.
    std::size_t lent_ = 0;
    std::size_t waiting_ = 0;
    /// The processor time of its decodings, where it was away for a while as much as others'.
    std::chrono::nanoseconds spent_{0};
    /// What the next one has to be expected to take.
    std::chrono::nanoseconds usual_{0};
  };

  /// A decompressor, for one stream. The pool and the account outlive it.
  class Loan {
  public:
    Loan(Loan&& other) noexcept
        : pool_(other.pool_), account_(std::exchange(other.account_, nullptr)),
          decompressor_(std::move(other.decompressor_)) {}
    Loan& operator=(Loan&&) = delete;
    Loan(const Loan&) = delete;
    Loan& operator=(const Loan&) = delete;
    ~Loan() {
      if (account_ != nullptr)
        pool_.take_back(*account_, std::move(decompressor_), std::nullopt);
    }

    /// As `qcow2::Decompressor::decode`, and the end of the loan.
    [[nodiscard]] qcow2::Decoding decode(qcow2::Compression compression,
                                         std::span<const std::byte> bytes,
                                         std::uint32_t cluster_size) &&;

  private:
    friend class DecompressorPool;
    Loan(DecompressorPool& pool, Account& account,
         std::unique_ptr<qcow2::Decompressor> decompressor) noexcept
        : pool_(pool), account_(&account), decompressor_(std::move(decompressor)) {}

    DecompressorPool& pool_;
    Account* account_;
    std::unique_ptr<qcow2::Decompressor> decompressor_;
  };

  /// Processor time that the calling thread has used.
  using Clock = std::function<std::chrono::nanoseconds()>;
  [[nodiscard]] static std::chrono::nanoseconds thread_time() noexcept;

  /// At most `most` are lent at a time; not 0.
  explicit DecompressorPool(std::size_t most = usual(), Clock clock = thread_time)
      : most_(most), clock_(std::move(clock)) {}
  DecompressorPool(const DecompressorPool&) = delete;
  DecompressorPool& operator=(const DecompressorPool&) = delete;
  ~DecompressorPool() = default;

  /// Waits for its turn. Throws std::bad_alloc.
  [[nodiscard]] Loan borrow(Account& account);
  /// The same for who does not want to wait. Throws std::bad_alloc.
  [[nodiscard]] std::optional<Loan> try_borrow(Account& account);

private:
  struct Waiter {
    Account& account;
    std::condition_variable served;
    bool is_served = false;
  };
  using Lock = std::unique_lock<std::mutex>;

  // Functions that take a Lock need it held.
  [[nodiscard]] bool may_have(const Lock&, const Account& account) const noexcept;
  void arrive(const Lock&, Account& account) noexcept;
  void lend(const Lock&, Account& account) noexcept;
  void serve(const Lock&) noexcept;
  [[nodiscard]] Loan make_loan(Lock lock, Account& account);
  /// `used`: how long it decoded.
  void take_back(Account& account, std::unique_ptr<qcow2::Decompressor> decompressor,
                 std::optional<std::chrono::nanoseconds> used) noexcept;

  const std::size_t most_;
  const Clock clock_;
  std::mutex mutex_;
  /// In their order of arrival.
  std::list<Waiter*> waiters_;
  std::size_t lent_ = 0;
  /// Whoever comes back after a while begins with this.
  std::chrono::nanoseconds now_{0};
  std::vector<std::unique_ptr<qcow2::Decompressor>> idle_;
};

} // namespace qcowcache
