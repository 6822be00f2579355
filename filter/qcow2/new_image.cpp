#include "new_image.hpp"

#include "header.hpp"

#include <algorithm>
#include <array>
#include <optional>

namespace qcowcache::qcow2 {

bool begins_image(std::uint64_t offset, std::span<const std::byte> data) noexcept {
  constexpr std::array<std::byte, magic_bytes> magic = {std::byte{'Q'}, std::byte{'F'},
                                                        std::byte{'I'}, std::byte{0xfb}};
  if (offset != 0 || data.size() < magic.size())
    return false;
  if (!std::ranges::equal(data.first(magic.size()), magic))
    return true;
  const std::optional<Header> header =
      parse_header(data.first(std::min(data.size(), header_bytes)));
  return header && (header->l1.entries == 0 || data.size() != header->cluster_size());
}

} // namespace qcowcache::qcow2
