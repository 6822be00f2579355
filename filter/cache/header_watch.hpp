#pragma once

#include "util/byte_ranges.hpp"
#include "verify/qcow2/header.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace qcowcache {

/// A copy of the bytes where a qcow2 header would be, kept current as clients write, so that a
/// header that arrives in pieces, or changes, is seen at once and storage need not be read again.
/// Not thread safe: guarded by the cache's mutex.
class HeaderWatch {
public:
  /// The bytes that are watched in an export of `size` bytes.
  [[nodiscard]] static ByteRange watched(std::uint64_t size) noexcept {
    return {0, size < qcow2::header_bytes ? size : qcow2::header_bytes};
  }

  /// The export has `data` at `offset`, or zeros in `range`, from now on.
  void wrote(std::uint64_t offset, std::span<const std::byte> data);
  void zeroed(const ByteRange& range);
  /// Nobody knows what is in `range` now.
  void forget(const ByteRange& range) noexcept { known_.remove(range); }
  /// Takes from `data`, which storage has at `offset`, what is not known yet.
  void learn(std::uint64_t offset, std::span<const std::byte> data);

  [[nodiscard]] bool complete(std::uint64_t size) const noexcept {
    return known_.contains(watched(size));
  }
  /// The header, if all watched bytes are known and are one.
  [[nodiscard]] std::optional<qcow2::Header> header(std::uint64_t size) const noexcept;

private:
  std::array<std::byte, qcow2::header_bytes> bytes_{};
  ByteRanges known_;
};

} // namespace qcowcache
