#pragma once

#include "util/byte_ranges.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <list>
#include <mutex>
#include <optional>

namespace qcowcache {

/// Who owns which bytes of one export.
///
/// Whoever changes storage in a range, or reads storage in order to complete a block that it will
/// write, owns that range alone. Without this rule a fill-up read and a change by a neighbour in
/// the same block lose an update.
///
/// Ranges are granted in the order in which they were asked for: a range waits for every earlier
/// one, owned or waiting, that it overlaps. So nobody starves, and since a thread asks for one
/// range at a time and holds no other while it waits, there is no deadlock.
///
/// Thread safe.
class RangeLock {
public:
  /// A range that is owned, or asked for; gives it back on destruction. Must not outlive its
  /// RangeLock.
  class [[nodiscard]] Owned {
  public:
    Owned(Owned&& other) noexcept;
    Owned& operator=(Owned&&) = delete;
    Owned(const Owned&) = delete;
    Owned& operator=(const Owned&) = delete;
    ~Owned();

    /// Waits until it is owned, but no longer than until `deadline`. Returns whether it is.
    [[nodiscard]] bool wait_until(std::chrono::steady_clock::time_point deadline) const;

  private:
    friend class RangeLock;
    Owned(RangeLock& lock, std::list<ByteRange>::iterator entry) noexcept
        : lock_(&lock), entry_(entry) {}

    RangeLock* lock_;
    std::list<ByteRange>::iterator entry_;
  };

  /// Waits until `range` can be owned. REQUIRES: the calling thread owns no range of this lock and
  /// holds no mutex.
  Owned own(const ByteRange& range);
  /// Asks for `range`, and waits for nothing: it is owned when `Owned::wait_until` says so.
  Owned ask(const ByteRange& range);
  /// The same, but not for longer than until `deadline`: nothing then, and nobody waits behind it.
  std::optional<Owned> own_until(const ByteRange& range,
                                 std::chrono::steady_clock::time_point deadline);
  /// Whether nobody owns anything, or asks for it.
  [[nodiscard]] bool idle() const noexcept { return asked_for_ == 0; }

private:
  [[nodiscard]] std::list<ByteRange>::iterator enter(const ByteRange& range);
  [[nodiscard]] bool granted(std::list<ByteRange>::iterator mine) const noexcept;
  void release(std::list<ByteRange>::iterator entry) noexcept;

  std::mutex mutex_;
  std::condition_variable released_;
  std::list<ByteRange> in_order_of_request_;
  /// Its size, for `idle`.
  std::atomic<std::size_t> asked_for_ = 0;
};

} // namespace qcowcache
