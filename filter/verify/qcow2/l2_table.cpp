#include "verify/qcow2/l2_table.hpp"

#include "verify/qcow2/big_endian.hpp"

namespace qcowcache::qcow2 {

namespace {

constexpr std::uint64_t offset_mask = 0x00ff'ffff'ffff'fe00; // bits 9 to 55
constexpr std::uint32_t sector_size = 512;

} // namespace

std::optional<std::uint64_t> l2_table_offset(std::uint64_t l1_entry,
                                             const Header& header) noexcept {
  const std::uint64_t offset = l1_entry & offset_mask;
  if (offset == 0 || offset % header.cluster_size() != 0)
    return std::nullopt;
  return offset;
}

CompressedCluster compressed_cluster(std::uint64_t l2_entry, const Header& header) noexcept {
  const std::uint32_t sectors_bits = header.cluster_bits - 8;
  const std::uint32_t offset_bits = 62 - sectors_bits;
  const std::uint64_t offset = l2_entry & ((std::uint64_t{1} << offset_bits) - 1);
  const std::uint64_t more_sectors =
      l2_entry >> offset_bits & ((std::uint64_t{1} << sectors_bits) - 1);
  return {offset,
          static_cast<std::uint32_t>((more_sectors + 1) * sector_size - offset % sector_size)};
}

std::uint64_t l1_entry(std::span<const std::byte> bytes, std::size_t at) noexcept {
  return big_endian<std::uint64_t>(bytes, at);
}

std::uint64_t l2_entry(std::span<const std::byte> bytes, std::size_t index,
                       const Header& header) noexcept {
  return big_endian<std::uint64_t>(bytes, index * header.l2_entry_size());
}

} // namespace qcowcache::qcow2
