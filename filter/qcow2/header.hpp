#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace qcowcache::qcow2 {

/// How many bytes from the start of the file `parse_header` looks at.
inline constexpr std::size_t header_bytes = 112;

/// The field "compression_type"; absent means deflate.
enum class Compression : std::uint8_t { deflate = 0, zstd = 1 };

/// The fields of a qcow2 header that this filter uses, each checked against its limits.
/// Source: QEMU's docs/interop/qcow2, section "Header".
struct Header {
  std::uint32_t version = 0;
  /// The size of a host cluster is 1 << cluster_bits bytes; 9 to 21.
  std::uint32_t cluster_bits = 0;
  Compression compression = Compression::deflate;
  bool extended_l2 = false;

  [[nodiscard]] std::uint32_t cluster_size() const noexcept { return 1U << cluster_bits; }
};

/// Reads a header of version 2 or 3 from the first bytes of a file, `header_bytes` of them or as
/// many as the file has. Nothing when that is not a qcow2 header, when a field is out of range, or
/// when the image keeps its data elsewhere (external data file) or encrypts it (LUKS), since such
/// images have no compressed clusters. Tables that are not there yet (a fresh image) are not an
/// error. Pure; never fails on any input.
[[nodiscard]] std::optional<Header> parse_header(std::span<const std::byte> bytes) noexcept;

} // namespace qcowcache::qcow2
