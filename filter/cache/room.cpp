#include "cache/room.hpp"

#include <algorithm>
#include <bit>
#include <iterator>
#include <new>
#include <utility>

namespace qcowcache {

Room::Room(std::uint64_t largest) noexcept : largest_(std::bit_floor(largest)), window_(largest_) {}

void Room::give_up() noexcept {
  window_ = 0;
  there_.clear();
}

ByteRange Room::window(const ByteRange& unit, std::uint64_t size) const noexcept {
  const std::uint64_t most = unit.begin < beginning ? std::min(window_, beginning) : window_;
  const std::uint64_t bytes = std::max(most, unit.size());
  const std::uint64_t begin = align_down(unit.begin, bytes);
  return ByteRange{begin, begin + bytes}.intersection({0, size});
}

std::optional<ByteRange> Room::next_unit(const ByteRange& unit, std::uint64_t size) const noexcept {
  if (!proven_ || !asks() || window_ != largest_)
    return std::nullopt;
  const ByteRange now = window(unit, UINT64_MAX);
  const ByteRange next = ByteRange{now.end, now.end + unit.size()}.intersection({0, size});
  if (unit.begin < now.begin + now.size() / 2 || next.empty() || has(next))
    return std::nullopt;
  return next;
}

void Room::smaller(std::uint64_t least) noexcept {
  // Few steps: each is an error to whoever reads storage's messages.
  window_ = std::max(window_ / 8, std::min(window_, least));
}

void Room::larger() noexcept {
  if (window_ > 0)
    window_ = std::min(window_ * 2, largest_);
}

void Room::found(const ByteRange& range) {
  there_.add(range);
  keep_small(range);
}

void Room::reserved(const ByteRange& range) {
  reserved_.add(range);
  there_.add(range);
  keep_small(range);
}

void Room::wrote(const ByteRange& range) noexcept {
  not_reserved(range);
  if (window_ == 0)
    return;
  try {
    found(range);
  } catch (const std::bad_alloc&) {
    // It is asked for again.
  }
}

void Room::gone(const ByteRange& range) noexcept {
  not_reserved(range);
  try {
    there_.remove(range);
  } catch (const std::bad_alloc&) {
    there_.clear();
  }
}

void Room::not_reserved(const ByteRange& range) noexcept {
  try {
    reserved_.remove(range);
  } catch (const std::bad_alloc&) {
    reserved_.clear();
  }
}

void Room::clear() noexcept {
  there_.clear();
  reserved_.clear();
  window_ = largest_;
  asks_again_at_.reset();
  proven_ = false;
}

/// What somebody has just come to stays.
void Room::keep_small(const ByteRange& but) {
  for (ByteRanges* const ranges : {&there_, &reserved_}) {
    while (ranges->count() > most_ranges) {
      const bool is_first = ranges->begin()->overlaps(but);
      ranges->remove(ByteRange{is_first ? *std::prev(ranges->end()) : *ranges->begin()});
    }
  }
}

} // namespace qcowcache
