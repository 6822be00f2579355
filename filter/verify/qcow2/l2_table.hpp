#pragma once

#include "util/byte_ranges.hpp"
#include "verify/qcow2/header.hpp"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace qcowcache::qcow2 {

// Source: QEMU's docs/interop/qcow2, section "Cluster mapping". All functions are pure and take any
// input.

/// Where the bytes of a compressed cluster lie, as an L2 entry says it: from byte `offset` of the
/// file on, at most `length` of them. The stream ends somewhere in there, what follows it belongs
/// to others; the last sector may reach past the end of the file.
struct CompressedCluster {
  std::uint64_t offset = 0;
  /// 1 byte to two clusters.
  std::uint32_t length = 0;

  [[nodiscard]] ByteRange range() const noexcept { return {offset, offset + length}; }
  friend bool operator==(const CompressedCluster&, const CompressedCluster&) noexcept = default;
};

/// The offset of the L2 table that an entry of the L1 table names; nothing when there is none, or
/// when it does not lie on a cluster of the file, where no image has one.
[[nodiscard]] std::optional<std::uint64_t> l2_table_offset(std::uint64_t l1_entry,
                                                           const Header& header) noexcept;

/// Whether an entry of an L2 table (the first 8 bytes of an extended one) stands for a compressed
/// cluster.
[[nodiscard]] constexpr bool is_compressed(std::uint64_t l2_entry) noexcept {
  return (l2_entry >> 62U & 1U) != 0;
}

/// Where that cluster's bytes lie. REQUIRES: is_compressed(l2_entry).
[[nodiscard]] CompressedCluster compressed_cluster(std::uint64_t l2_entry,
                                                   const Header& header) noexcept;

/// The entry of an L1 table that begins at byte `at` of `bytes`. REQUIRES: all of it lies there.
[[nodiscard]] std::uint64_t l1_entry(std::span<const std::byte> bytes, std::size_t at) noexcept;

/// The entry with this number of the L2 table, or part of one, in `bytes`. REQUIRES: all of the
/// entry lies within `bytes`.
[[nodiscard]] std::uint64_t l2_entry(std::span<const std::byte> bytes, std::size_t index,
                                     const Header& header) noexcept;

} // namespace qcowcache::qcow2
