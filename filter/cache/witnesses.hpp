#pragma once

#include "util/byte_ranges.hpp"

#include <boost/container/static_vector.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace qcowcache {

/// What a disk is known to have in a few places, by which another connection's storage can be
/// recognised as the same disk: the block with the header, and the blocks written last.
///
/// Kept as checksums, one for each block of 512 to 1024 bytes. Not thread safe: guarded by the
/// cache's mutex; told of every change by the owner of its range, before that is given back.
class Witnesses {
public:
  using Clock = std::chrono::steady_clock;

  struct Witness {
    ByteRange block;
    std::size_t checksum = 0;
    /// When the write began that it is left from; nothing where it was read, or where a disk that
    /// was never written to would have the same: zeros.
    std::optional<Clock::time_point> written;

    bool operator==(const Witness&) const = default;
  };
  static constexpr std::size_t most = 4;
  using All = boost::container::static_vector<Witness, most>;

  /// Bytes, at most and at least; what a small disk begins with may be less.
  static constexpr std::uint64_t largest_block = 1024;
  static constexpr std::uint64_t smallest_block = 512;

  [[nodiscard]] static std::size_t checksum(std::span<const std::byte> block) noexcept;

  /// The disk has `data` in `range` by a write that began at `begun`; the first block is taken.
  void wrote(const ByteRange& range, std::span<const std::byte> data,
             Clock::time_point begun) noexcept;
  /// The disk was found to have `data` in `range`, of which the first block is taken.
  void read(const ByteRange& range, std::span<const std::byte> data) noexcept;
  /// Nobody knows what is in `range` now.
  void changed(const ByteRange& range) noexcept;
  void clear() noexcept { all_.clear(); }

  /// The latest first.
  [[nodiscard]] const All& all() const noexcept { return all_; }

private:
  void remember(const Witness& witness) noexcept;

  All all_;
};

} // namespace qcowcache
