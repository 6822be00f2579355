#pragma once

#include "storage/storage.hpp"

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace qcowcache {

/// Flushes of one disk, no more of them than promise something.
///
/// Where a flush through any connection is one of all that the disk was given (NBD protocol,
/// NBD_FLAG_CAN_MULTI_CONN), those that are asked for while one is under way share the next: group
/// commit (DeWitt et al., Implementation Techniques for Main Memory Database Systems, SIGMOD 1984).
/// Each of them is answered by a flush that began after it was asked for and has succeeded. Since
/// then nobody shares any more once one has failed: an operating system may tell a lost write to
/// each open file once, and whoever shared the success of another would not hear of it.
///
/// Thread safe.
class GroupFlush {
public:
  /// Nobody waits for another connection's flush longer than `patience`: that connection may hang.
  explicit GroupFlush(std::chrono::milliseconds patience = std::chrono::seconds(1)) noexcept
      : patience_(patience) {}

  /// Flushes, by this storage unless it may share (`shares`). `moment`, if any, is how far all
  /// changes are on storage already, for `is_flushed`. `still_wanted` is called now and then while
  /// it waits, with no mutex held, and may throw to end that; it does not wait unless it shares.
  /// Throws storage's error.
  void flush(Storage& storage, bool shares, std::optional<std::uint64_t> moment,
             const std::function<void()>& still_wanted);
  /// Whether this storage itself has been flushed at this moment, and no flush has failed since.
  [[nodiscard]] bool is_flushed(const Storage& storage, std::uint64_t moment) const noexcept;
  /// Storage has told somebody of an error that it may tell only once.
  void failed() noexcept;
  /// It is gone.
  void forget(const Storage& storage) noexcept;

private:
  void note_flushed(const Storage& storage, std::uint64_t moment) noexcept;
  void note_failed() noexcept;

  const std::chrono::milliseconds patience_;
  mutable std::mutex mutex_;
  std::condition_variable ended_;
  /// One of those that may be shared is under way, the latest that has begun.
  bool running_ = false;
  std::uint64_t begun_ = 0;
  /// The latest that has succeeded.
  std::uint64_t succeeded_ = 0;
  std::uint64_t failures_ = 0;
  std::vector<std::pair<const Storage*, std::uint64_t>> flushed_;
};

} // namespace qcowcache
