#include "cache/cached_image.hpp"

#include <algorithm>
#include <array>

namespace qcowcache {

std::optional<qcow2::Header> CachedImage::header() {
  cache_.learn_layout(storage_);
  if (const WriteCache::KnownHeader found = cache_.header(); found.known)
    return found.header;
  // Where nothing is cached the cache does not look.
  std::array<std::byte, qcow2::header_bytes> bytes{};
  return qcow2::parse_header(begin(bytes));
}

const char* CachedImage::header_fault() {
  std::array<std::byte, qcow2::header_bytes> bytes{};
  return qcow2::header_fault(begin(bytes));
}

/// The first bytes of the file, as many as it has.
std::span<const std::byte> CachedImage::begin(std::span<std::byte> bytes) {
  const std::span<std::byte> there = bytes.first(std::min<std::uint64_t>(bytes.size(), size()));
  if (!there.empty())
    read(0, there);
  return there;
}

} // namespace qcowcache
