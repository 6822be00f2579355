#include "verify/qcow2/decoded_streams.hpp"

#include <algorithm>
#include <new>

namespace qcowcache::qcow2 {

namespace {
/// At least as large as any stream, so that one reaches into the next region at most.
constexpr std::uint64_t region_size = std::uint64_t{4} * 1024 * 1024;
} // namespace

void DecodedStreams::remember(std::uint64_t offset, std::uint32_t size) {
  forget({offset, offset + size});
  bool remembered = false;
  do
    remembered = try_remember(offset, size);
  while (!remembered && drop_lowest());
}

bool DecodedStreams::drop_lowest() noexcept {
  if (regions_.empty())
    return false;
  regions_.erase(regions_.begin());
  return true;
}

bool DecodedStreams::try_remember(std::uint64_t offset, std::uint32_t size) {
  try {
    Region& region = regions_[offset / region_size];
    const Stream stream{static_cast<std::uint32_t>(offset % region_size), size};
    // From the end: that is where data arrives.
    auto behind = region.end();
    while (behind != region.begin() && std::prev(behind)->begin > stream.begin)
      --behind;
    region.insert(behind, stream);
    return true;
  } catch (const std::bad_alloc&) {
    const auto region = regions_.find(offset / region_size);
    if (region != regions_.end() && region->second.empty())
      regions_.erase(region); // or it would be there to be forgotten again and again
    return false;
  }
}

void DecodedStreams::forget(const ByteRange& range) noexcept {
  const std::uint64_t first = range.begin / region_size;
  auto it = regions_.lower_bound(first == 0 ? 0 : first - 1);
  while (it != regions_.end() && it->first * region_size < range.end) {
    Region& region = it->second;
    const std::uint64_t base = it->first * region_size;
    const auto begin =
        std::partition_point(region.begin(), region.end(), [&](const Stream& stream) {
          return base + stream.end() <= range.begin;
        });
    const auto end = std::partition_point(
        begin, region.end(), [&](const Stream& stream) { return base + stream.begin < range.end; });
    region.erase(begin, end);
    it = region.empty() ? regions_.erase(it) : std::next(it);
  }
}

std::uint32_t DecodedStreams::size_at(std::uint64_t offset) const noexcept {
  const auto found = regions_.find(offset / region_size);
  if (found == regions_.end())
    return 0;
  const Region& region = found->second;
  const auto stream =
      std::partition_point(region.begin(), region.end(), [&](const Stream& candidate) {
        return candidate.begin < offset % region_size;
      });
  return stream != region.end() && stream->begin == offset % region_size ? stream->size : 0;
}

} // namespace qcowcache::qcow2
