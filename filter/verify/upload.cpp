#include "verify/upload.hpp"

#include <algorithm>
#include <new>

namespace qcowcache {

namespace {
/// More than clients have in flight; less than there is between the header of an image and where
/// somebody works on it.
constexpr std::uint64_t largest_gap = std::uint64_t{64} << 20U;
constexpr std::size_t most_pieces = 1024;
constexpr std::uint64_t sector = 512;

void add(ByteRanges& ranges, const ByteRange& range) {
  ranges.add(range);
  if (ranges.count() > most_pieces)
    ranges.add({ranges.begin()->begin, (ranges.begin() + most_pieces / 2)->end});
}
} // namespace

void Upload::wrote(const ByteRange& range, const void* client) noexcept {
  try {
    add(ever_, range);
    if (range.begin == 0 && !range.empty()) {
      end();
      going_ = true;
    } else if (!going_ || written_.overlaps(range) ||
               range.begin > std::max(written_.hull().end, zeroed_to_) + largest_gap) {
      end();
      return;
    }
    add(written_, range);
    clients_.insert(client);
  } catch (const std::bad_alloc&) {
    end();
    ever_.clear(); // one range takes no memory
    ever_.add({0, UINT64_MAX});
  }
}

void Upload::zeroed(const ByteRange& range) noexcept {
  if (going_ && range.begin <= std::max(written_.hull().end, zeroed_to_) + largest_gap)
    zeroed_to_ = std::max(zeroed_to_, range.end);
}

void Upload::left(const void* client) noexcept {
  clients_.erase(client);
  if (clients_.empty())
    end();
}

void Upload::end() noexcept {
  going_ = false;
  written_.clear();
  zeroed_to_ = 0;
  clients_.clear();
}

bool Upload::awaits(const ByteRange& range) const noexcept {
  if (!going_ || range.empty())
    return false;
  // The last sector of a cluster belongs to others from the end of its stream on.
  const ByteRange last{align_down(range.end - 1, sector), range.end};
  return written_.hull().end <= last.begin && !ever_.overlaps(last);
}

} // namespace qcowcache
