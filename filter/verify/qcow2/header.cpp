#include "verify/qcow2/header.hpp"

#include "verify/qcow2/big_endian.hpp"

namespace qcowcache::qcow2 {

namespace {

constexpr std::uint32_t luks = 2;
constexpr std::size_t version_2_length = 72;
constexpr std::size_t version_3_length = 104;
constexpr std::uint64_t dirty = 1U << 0U;
constexpr std::uint64_t corrupt = 1U << 1U;
constexpr std::uint64_t external_data_file = 1U << 2U;
constexpr std::uint64_t has_compression_type = 1U << 3U;
constexpr std::uint64_t extended_l2 = 1U << 4U;
constexpr std::uint64_t known_features =
    dirty | corrupt | external_data_file | has_compression_type | extended_l2;
constexpr std::uint32_t least_cluster_bits = 9;
constexpr std::uint32_t most_cluster_bits = 21;
constexpr std::uint32_t least_extended_l2_cluster_bits = 14;
constexpr std::uint32_t most_refcount_order = 6;
/// QEMU refuses to open images with more.
constexpr std::uint32_t most_l1_entries = 32U * 1024 * 1024 / l1_entry_size;
/// Offsets in the file are 56 bits wide in all tables.
constexpr std::uint64_t offset_limit = std::uint64_t{1} << 56U;

/// Whether a table can begin there: on a cluster of the file, behind the header.
bool may_begin_at(std::uint64_t offset, const Header& header) noexcept {
  return offset >= header.cluster_size() && offset < offset_limit &&
         (offset & (header.cluster_size() - 1)) == 0;
}

/// Nothing in a fresh image, whose fields may not make sense yet.
TablePlace l1_table(std::span<const std::byte> bytes, const Header& header) noexcept {
  const auto entries = big_endian<std::uint32_t>(bytes, 36);
  const auto offset = big_endian<std::uint64_t>(bytes, 40);
  if (entries == 0 || entries > most_l1_entries || !may_begin_at(offset, header))
    return {};
  return {offset, entries};
}

/// The field is there when the header is longer.
unsigned compression_type(std::span<const std::byte> bytes) noexcept {
  const bool has_field =
      big_endian<std::uint32_t>(bytes, 100) > version_3_length && bytes.size() > version_3_length;
  return has_field ? std::to_integer<unsigned>(bytes[version_3_length]) : 0U;
}

/// REQUIRES: a header of version 3. Returns what is wrong, or nullptr.
const char* compression_fault(std::span<const std::byte> bytes) noexcept {
  const unsigned type = compression_type(bytes);
  // The feature bit says whether it is not deflate.
  const bool bit = (big_endian<std::uint64_t>(bytes, 72) & has_compression_type) != 0;
  if (type > 1)
    return "its header has a compression type that does not exist";
  if (type != 0 && !bit)
    return "its header has a compression type, without the feature bit for it";
  if (type == 0 && bit)
    return "its header has the feature bit for a compression type, and no compression type";
  return nullptr;
}

} // namespace

const char* header_fault(std::span<const std::byte> bytes) noexcept {
  if (bytes.size() < version_3_length || big_endian<std::uint32_t>(bytes, 0) != header_magic ||
      big_endian<std::uint32_t>(bytes, 4) != 3)
    return nullptr;
  return compression_fault(bytes);
}

std::optional<Header> parse_header(std::span<const std::byte> bytes) noexcept {
  if (bytes.size() < version_2_length || big_endian<std::uint32_t>(bytes, 0) != header_magic)
    return std::nullopt;

  Header header;
  header.version = big_endian<std::uint32_t>(bytes, 4);
  header.cluster_bits = big_endian<std::uint32_t>(bytes, 20);
  if (header.version < 2 || header.version > 3 || header.cluster_bits < least_cluster_bits ||
      header.cluster_bits > most_cluster_bits || big_endian<std::uint32_t>(bytes, 32) >= luks)
    return std::nullopt;
  header.length = version_2_length;
  header.l1 = l1_table(bytes, header);
  if (header.version == 2)
    return header;

  if (bytes.size() < version_3_length)
    return std::nullopt;
  const auto features = big_endian<std::uint64_t>(bytes, 72);
  const auto header_length = big_endian<std::uint32_t>(bytes, 100);
  if ((features & external_data_file) != 0 || header_length < version_3_length ||
      header_length > header.cluster_size() ||
      big_endian<std::uint32_t>(bytes, 96) > most_refcount_order)
    return std::nullopt;

  header.length = header_length;
  header.unknown_features = (features & ~known_features) != 0;
  header.extended_l2 = (features & extended_l2) != 0;
  if (header.extended_l2 && header.cluster_bits < least_extended_l2_cluster_bits)
    return std::nullopt;

  if (compression_fault(bytes) != nullptr)
    return std::nullopt;
  const unsigned type = compression_type(bytes);
  header.compression = type == 1 ? Compression::zstd : Compression::deflate;
  return header;
}

} // namespace qcowcache::qcow2
