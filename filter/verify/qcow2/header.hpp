#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace qcowcache::qcow2 {

/// What a qcow2 file begins with, big endian: "QFI\xfb".
inline constexpr std::uint32_t header_magic = 0x514649fb;

/// How many bytes from the start of the file `parse_header` looks at.
inline constexpr std::size_t header_bytes = 112;

/// The field "compression_type"; absent means deflate.
enum class Compression : std::uint8_t { deflate = 0, zstd = 1 };

/// The size of an entry of an L1 table, in bytes.
inline constexpr std::uint32_t l1_entry_size = 8;

/// Where a table begins in the file, in bytes, and how many entries it has: none when there is no
/// table.
struct TablePlace {
  std::uint64_t offset = 0;
  std::uint32_t entries = 0;

  friend bool operator==(const TablePlace&, const TablePlace&) noexcept = default;
};

/// The fields of a qcow2 header that this filter uses, each checked against its limits.
/// Source: QEMU's docs/interop/qcow2, section "Header".
struct Header {
  std::uint32_t version = 0;
  /// The size of a host cluster is 1 << cluster_bits bytes; 9 to 21.
  std::uint32_t cluster_bits = 0;
  Compression compression = Compression::deflate;
  bool extended_l2 = false;
  /// The image has features that this filter does not know and without which nobody may open it:
  /// what its tables mean is unknown. QEMU refuses it.
  bool unknown_features = false;
  /// Of the header itself, without extensions, in bytes.
  std::uint32_t length = 0;
  /// The active L1 table. It does not exist in a fresh image, and counts as absent where a field is
  /// out of range: not cluster aligned, no offset that a file can have, more entries than QEMU
  /// takes. It may lie past the end of the file.
  TablePlace l1;

  [[nodiscard]] std::uint32_t cluster_size() const noexcept { return 1U << cluster_bits; }
  /// The size of an entry of an L2 table, in bytes, and how many entries one has. An L2 table is
  /// one host cluster.
  [[nodiscard]] std::uint32_t l2_entry_size() const noexcept { return extended_l2 ? 16 : 8; }
  [[nodiscard]] std::uint32_t l2_entries() const noexcept {
    return cluster_size() / l2_entry_size();
  }
  /// Where on the guest's disk the cluster is that an entry of an L2 table stands for, in bytes.
  [[nodiscard]] std::uint64_t guest_offset(std::uint32_t l1_index,
                                           std::uint32_t l2_index) const noexcept {
    return (std::uint64_t{l1_index} * l2_entries() + l2_index) << cluster_bits;
  }
};

/// Reads a header of version 2 or 3 from the first bytes of a file, `header_bytes` of them or as
/// many as the file has. Nothing when that is not a qcow2 header, when a field is out of range, or
/// when the image keeps its data elsewhere (external data file) or encrypts it (LUKS), since such
/// images have no compressed clusters. Tables that are not there yet (a fresh image) are not an
/// error. Pure; never fails on any input.
[[nodiscard]] std::optional<Header> parse_header(std::span<const std::byte> bytes) noexcept;

/// Why nobody can open an image with this header though it has the format's magic number and
/// version, from the same bytes; nullptr when it can be opened, or is no image at all. Says only
/// what no client writes on its way to a good header: a compression type that contradicts the
/// feature bits, or that does not exist. Lives as long as the program.
[[nodiscard]] const char* header_fault(std::span<const std::byte> bytes) noexcept;

} // namespace qcowcache::qcow2
