#pragma once

#include "qcow2/decompressor.hpp"

#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

namespace qcowcache {

/// A few decompressors that everybody shares, so that their memory does not grow with the number of
/// clients: each has a buffer of one cluster, up to 2 MiB, and up to 200 KiB for its decoders. They
/// are made when they are needed, and kept.
///
/// Thread safe. Whoever waits for one waits for others to have decoded, and for nothing else, if
/// all keep to it: REQUIRES: no mutex is held in `borrow`, and nothing is waited for between that
/// and the end of the loan.
class DecompressorPool {
public:
  /// Writers decode as well as they can write: one for each by default, and one for a check.
  static constexpr std::size_t usual = 5;

  /// A decompressor, until it is destroyed. The pool outlives it.
  class Loan {
  public:
    Loan(Loan&& other) noexcept = default;
    Loan& operator=(Loan&&) = delete;
    Loan(const Loan&) = delete;
    Loan& operator=(const Loan&) = delete;
    ~Loan();

    qcow2::Decompressor& operator*() const noexcept { return *decompressor_; }
    qcow2::Decompressor* operator->() const noexcept { return decompressor_.get(); }

  private:
    friend class DecompressorPool;
    Loan(DecompressorPool& pool, std::unique_ptr<qcow2::Decompressor> decompressor) noexcept
        : pool_(pool), decompressor_(std::move(decompressor)) {}

    DecompressorPool& pool_;
    std::unique_ptr<qcow2::Decompressor> decompressor_;
  };

  /// At most `most` are lent at a time; not 0.
  explicit DecompressorPool(std::size_t most = usual) : most_(most) {}
  DecompressorPool(const DecompressorPool&) = delete;
  DecompressorPool& operator=(const DecompressorPool&) = delete;
  ~DecompressorPool() = default;

  /// Waits until there is one. Throws std::bad_alloc.
  [[nodiscard]] Loan borrow();

private:
  const std::size_t most_;
  std::mutex mutex_;
  std::condition_variable returned_;
  std::vector<std::unique_ptr<qcow2::Decompressor>> idle_;
  /// How many there are, lent or idle.
  std::size_t made_ = 0;
};

} // namespace qcowcache
