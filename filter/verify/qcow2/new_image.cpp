#include "verify/qcow2/new_image.hpp"

#include "verify/qcow2/big_endian.hpp"
#include "verify/qcow2/header.hpp"

#include <algorithm>
#include <optional>

namespace qcowcache::qcow2 {

namespace {

/// The bytes of the header's cluster behind the header itself: extensions, the backing file's name.
bool nothing_follows(std::span<const std::byte> cluster, std::size_t header_length) noexcept {
  return std::ranges::all_of(cluster.subspan(std::min(header_length, cluster.size())),
                             [](std::byte byte) { return byte == std::byte{0}; });
}

} // namespace

bool begins_image(std::uint64_t offset, std::span<const std::byte> data) noexcept {
  if (offset != 0 || data.size() < sizeof header_magic)
    return false;
  if (big_endian<std::uint32_t>(data, 0) != header_magic)
    return true;
  const std::optional<Header> header =
      parse_header(data.first(std::min(data.size(), header_bytes)));
  if (!header)
    return false;
  const bool created = header->l1.entries == 0 && nothing_follows(data, header->length);
  return created || data.size() != header->cluster_size();
}

} // namespace qcowcache::qcow2
