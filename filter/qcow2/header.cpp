#include "header.hpp"

namespace qcowcache::qcow2 {

namespace {

template <typename Integer>
Integer big_endian(std::span<const std::byte> bytes, std::size_t offset) noexcept {
  Integer value = 0;
  for (const std::byte byte : bytes.subspan(offset, sizeof(Integer)))
    value = static_cast<Integer>(value << 8U) | std::to_integer<Integer>(byte);
  return value;
}

constexpr std::uint32_t magic = 0x514649fb; // "QFI\xfb"
constexpr std::uint32_t luks = 2;
constexpr std::size_t version_2_length = 72;
constexpr std::size_t version_3_length = 104;
constexpr std::uint64_t external_data_file = 1U << 2U;
constexpr std::uint64_t has_compression_type = 1U << 3U;
constexpr std::uint64_t extended_l2 = 1U << 4U;
constexpr std::uint32_t least_cluster_bits = 9;
constexpr std::uint32_t most_cluster_bits = 21;
constexpr std::uint32_t least_extended_l2_cluster_bits = 14;
constexpr std::uint32_t most_refcount_order = 6;

} // namespace

std::optional<Header> parse_header(std::span<const std::byte> bytes) noexcept {
  if (bytes.size() < version_2_length || big_endian<std::uint32_t>(bytes, 0) != magic)
    return std::nullopt;

  Header header;
  header.version = big_endian<std::uint32_t>(bytes, 4);
  header.cluster_bits = big_endian<std::uint32_t>(bytes, 20);
  if (header.version < 2 || header.version > 3 || header.cluster_bits < least_cluster_bits ||
      header.cluster_bits > most_cluster_bits || big_endian<std::uint32_t>(bytes, 32) >= luks)
    return std::nullopt;
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

  header.extended_l2 = (features & extended_l2) != 0;
  if (header.extended_l2 && header.cluster_bits < least_extended_l2_cluster_bits)
    return std::nullopt;

  // The field is there when the header is longer; the feature bit says whether it is not deflate.
  const bool has_field = header_length > version_3_length && bytes.size() > version_3_length;
  const auto type = has_field ? std::to_integer<unsigned>(bytes[version_3_length]) : 0U;
  if (type > 1 || (type != 0) != ((features & has_compression_type) != 0))
    return std::nullopt;
  header.compression = type == 1 ? Compression::zstd : Compression::deflate;
  return header;
}

} // namespace qcowcache::qcow2
