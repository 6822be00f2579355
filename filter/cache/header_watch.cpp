#include "cache/header_watch.hpp"

#include "util/copy_bytes.hpp"

#include <algorithm>

namespace qcowcache {

namespace {
constexpr ByteRange all{0, qcow2::header_bytes};
}

void HeaderWatch::wrote(std::uint64_t offset, std::span<const std::byte> data) {
  const ByteRange part = ByteRange{offset, offset + data.size()}.intersection(all);
  if (part.empty())
    return;
  copy_bytes(data.subspan(part.begin - offset, part.size()), &bytes_[part.begin]);
  known_.add(part);
}

void HeaderWatch::zeroed(const ByteRange& range) {
  const ByteRange part = range.intersection(all);
  if (part.empty())
    return;
  std::fill_n(&bytes_[part.begin], part.size(), std::byte{0});
  known_.add(part);
}

void HeaderWatch::learn(std::uint64_t offset, std::span<const std::byte> data) {
  for (const ByteRange& gap :
       known_.missing(ByteRange{offset, offset + data.size()}.intersection(all)))
    wrote(gap.begin, data.subspan(gap.begin - offset, gap.size()));
}

std::optional<qcow2::Header> HeaderWatch::header(std::uint64_t size) const noexcept {
  if (!complete(size))
    return std::nullopt;
  return qcow2::parse_header(std::span(bytes_).first(watched(size).size()));
}

} // namespace qcowcache
