#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>

namespace qcowcache {

/// How fast storage takes what is written to it in the background, measured while something is.
///
/// Time in which nothing was under way does not count. Not thread safe: guarded by the cache's
/// mutex.
class WriteRate {
public:
  using Clock = std::chrono::steady_clock;

  /// A write begins.
  void began(Clock::time_point now) noexcept;
  /// One that began has ended, and storage has taken `bytes` bytes of it.
  void ended(Clock::time_point now, std::uint64_t bytes) noexcept;

  /// Bytes that storage takes in `time`; nothing as long as too little was written to tell.
  [[nodiscard]] std::optional<std::uint64_t> bytes_in(Clock::duration time) const noexcept;

private:
  std::size_t under_way_ = 0;
  Clock::time_point since_;
  /// Of the measurement that goes on.
  Clock::duration busy_{};
  std::uint64_t bytes_ = 0;
  /// Bytes in a second.
  std::optional<double> rate_;
};

} // namespace qcowcache
