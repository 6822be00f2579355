#include "new_image.hpp"

#include "big_endian.hpp"
#include "header.hpp"

#include <algorithm>
#include <optional>

namespace qcowcache::qcow2 {

bool begins_image(std::uint64_t offset, std::span<const std::byte> data) noexcept {
  if (offset != 0 || data.size() < sizeof header_magic)
    return false;
  if (big_endian<std::uint32_t>(data, 0) != header_magic)
    return true;
  const std::optional<Header> header =
      parse_header(data.first(std::min(data.size(), header_bytes)));
  return header && (header->l1.entries == 0 || data.size() != header->cluster_size());
}

} // namespace qcowcache::qcow2
