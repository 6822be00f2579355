#include "cached_image.hpp"

#include <algorithm>
#include <array>

namespace qcowcache {

std::optional<qcow2::Header> CachedImage::header() {
  cache_.learn_layout(storage_);
  if (const WriteCache::KnownHeader found = cache_.header(); found.known)
    return found.header;
  // Where nothing is cached the cache does not look.
  std::array<std::byte, qcow2::header_bytes> bytes{};
  const std::span<std::byte> there =
      std::span(bytes).first(std::min<std::uint64_t>(bytes.size(), size()));
  if (!there.empty())
    read(0, there);
  return qcow2::parse_header(there);
}

} // namespace qcowcache
