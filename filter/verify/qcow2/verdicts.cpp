#include "verify/qcow2/verdicts.hpp"

#include <algorithm>
#include <new>

namespace qcowcache::qcow2 {

std::size_t Verdicts::place(std::uint64_t offset, std::uint32_t length) noexcept {
  const std::uint64_t mixed = (offset ^ std::uint64_t{length} << 40U) * 0x9e3779b97f4a7c15U;
  return static_cast<std::size_t>(mixed >> 40U) % places;
}

std::optional<Decoding> Verdicts::find(const CompressedCluster& cluster,
                                       std::uint64_t end) const noexcept {
  if (noted_.empty())
    return std::nullopt;
  // A good stream is good whatever follows it. What is wrong with one depends on where it is cut
  // off.
  const Noted& good = noted_[place(cluster.offset, 0)];
  if (good.cluster.length > 0 && good.cluster.offset == cluster.offset && good.decoding.whole() &&
      cluster.offset + good.decoding.stream_size <= end)
    return good.decoding;
  const Noted& bad = noted_[place(cluster.offset, cluster.length)];
  if (bad.cluster == cluster && bad.end == end && !bad.decoding.whole())
    return bad.decoding;
  return std::nullopt;
}

void Verdicts::note(const CompressedCluster& cluster, std::uint64_t end,
                    const Decoding& decoding) noexcept {
  try {
    if (noted_.empty())
      noted_.resize(places);
  } catch (const std::bad_alloc&) {
    return;
  }
  noted_[place(cluster.offset, decoding.whole() ? 0 : cluster.length)] = {cluster, end, decoding};
  const ByteRange range = cluster.range();
  hull_ = hull_.empty()
              ? range
              : ByteRange{std::min(hull_.begin, range.begin), std::max(hull_.end, range.end)};
}

void Verdicts::forget(const ByteRange& range) noexcept {
  if (!hull_.overlaps(range)) // as with most writes
    return;
  for (Noted& each : noted_) {
    if (each.cluster.range().overlaps(range))
      each = {};
  }
}

void Verdicts::clear() noexcept {
  std::vector<Noted>().swap(noted_);
  hull_ = {};
}

} // namespace qcowcache::qcow2
