#include "util/byte_ranges.hpp"

#include <numeric>

namespace qcowcache {

std::string to_string(const ByteRange& range) {
  return std::to_string(range.begin) + "-" + std::to_string(range.end - 1);
}

ByteRanges::Ranges::iterator ByteRanges::first_ending_from(std::uint64_t offset) noexcept {
  if (ranges_.empty() || ranges_.back().end < offset)
    return ranges_.end();
  if (ranges_.size() == 1 || ranges_[ranges_.size() - 2].end < offset)
    return ranges_.end() - 1;
  return std::partition_point(ranges_.begin(), ranges_.end(),
                              [offset](const ByteRange& range) { return range.end < offset; });
}

ByteRanges::const_iterator ByteRanges::first_ending_after(std::uint64_t offset) const noexcept {
  if (ranges_.empty() || ranges_.back().end <= offset)
    return ranges_.end();
  if (ranges_.size() == 1 || ranges_[ranges_.size() - 2].end <= offset)
    return ranges_.end() - 1;
  return std::partition_point(ranges_.begin(), ranges_.end(),
                              [offset](const ByteRange& range) { return range.end <= offset; });
}

void ByteRanges::add(const ByteRange& range) {
  if (range.empty())
    return;
  const auto first = first_ending_from(range.begin);
  auto last = first;
  ByteRange joined = range;
  while (last != ranges_.end() && last->begin <= range.end) {
    joined = {std::min(joined.begin, last->begin), std::max(joined.end, last->end)};
    ++last;
  }
  if (first == last) {
    ranges_.insert(first, range);
  } else {
    *first = joined;
    ranges_.erase(first + 1, last);
  }
}

void ByteRanges::add(const ByteRanges& other) {
  for (const ByteRange& range : other)
    add(range);
}

void ByteRanges::remove(const ByteRange& range) {
  if (range.empty())
    return;
  auto first = ranges_.begin() + (first_ending_after(range.begin) - ranges_.cbegin());
  if (first == ranges_.end() || first->begin >= range.end)
    return;
  if (first->begin < range.begin && range.end < first->end) {
    const ByteRange behind{range.end, first->end};
    first = ranges_.insert(first + 1, behind) - 1; // the only step that can throw comes first
    first->end = range.begin;
    return;
  }
  if (first->begin < range.begin) {
    first->end = range.begin;
    ++first;
  }
  auto last = first;
  while (last != ranges_.end() && last->end <= range.end)
    ++last;
  if (last != ranges_.end() && last->begin < range.end)
    last->begin = range.end;
  ranges_.erase(first, last);
}

void ByteRanges::remove(const ByteRanges& other) {
  for (const ByteRange& range : other)
    remove(range);
}

bool ByteRanges::contains(const ByteRange& range) const noexcept {
  if (range.empty())
    return true;
  const auto found = first_ending_after(range.begin);
  return found != end() && found->contains(range);
}

bool ByteRanges::overlaps(const ByteRange& range) const noexcept {
  if (range.empty())
    return false;
  const auto found = first_ending_after(range.begin);
  return found != end() && found->begin < range.end;
}

ByteRanges ByteRanges::inside(const ByteRange& range) const {
  ByteRanges found;
  for (auto it = first_ending_after(range.begin); it != end() && it->begin < range.end; ++it)
    found.add(it->intersection(range));
  return found;
}

ByteRanges ByteRanges::missing(const ByteRange& range) const {
  ByteRanges gaps;
  std::uint64_t from = range.begin;
  for (auto it = first_ending_after(range.begin); it != end() && it->begin < range.end; ++it) {
    gaps.add({from, it->begin});
    from = it->end;
  }
  gaps.add({from, range.end});
  return gaps;
}

std::uint64_t ByteRanges::bytes() const noexcept {
  return std::accumulate(
      begin(), end(), std::uint64_t{0},
      [](std::uint64_t sum, const ByteRange& range) { return sum + range.size(); });
}

} // namespace qcowcache
