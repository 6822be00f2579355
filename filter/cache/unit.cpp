#include "cache/unit.hpp"

#include "util/copy_bytes.hpp"

#include <algorithm>
#include <utility>

namespace qcowcache {

std::span<const std::byte> Unit::bytes(const ByteRange& part) const noexcept {
  return {at(part.begin), part.size()};
}

bool Unit::full(std::uint64_t size) const noexcept {
  return !written_.empty() && written_.contains({range_.begin, std::min(range_.end, size)});
}

bool Unit::fragmented() const noexcept {
  return std::max({dirty_.count(), in_flight_.count(), known_.count(), written_.count()}) >=
         most_fragments_;
}

bool Unit::owes(std::uint64_t moment) const noexcept {
  return (!dirty_.empty() && dirty_since_ <= moment) ||
         (!in_flight_.empty() && in_flight_since_ <= moment);
}

void Unit::absorb(std::uint64_t offset, std::span<const std::byte> data, std::uint64_t moment) {
  const ByteRange range{offset, offset + data.size()};
  const bool was_clean = dirty_.empty();
  known_.reserve(known_.count() + 1);
  written_.reserve(written_.count() + 1);
  dirty_.reserve(dirty_.count() + 1 + in_flight_.count());
  copy_bytes(data, at(offset));
  known_.add(range);
  written_.add(range);
  dirty_.add(range);
  if (was_clean)
    dirty_since_ = moment;
}

void Unit::wrote_through(std::uint64_t offset, std::span<const std::byte> data) {
  const ByteRange range{offset, offset + data.size()};
  if (fragmented() && !range.contains(dirty_.hull())) {
    for (const ByteRange& part : known_.inside(range))
      copy_bytes(data.subspan(part.begin - offset, part.size()), at(part.begin));
    return;
  }
  // The bytes first: should a set not be changed for want of memory, they are only written again.
  copy_bytes(data, at(offset));
  known_.add(range);
  written_.add(range);
  dirty_.remove(range);
}

void Unit::zeroed(const ByteRange& range) {
  const ByteRange part = range.intersection(range_);
  if (fragmented() && !part.contains(dirty_.hull())) {
    for (const ByteRange& known : known_.inside(part))
      std::fill_n(at(known.begin), known.size(), std::byte{0});
    return;
  }
  std::fill_n(at(part.begin), part.size(), std::byte{0});
  known_.add(part);
  dirty_.remove(part);
}

void Unit::discard(const ByteRange& range) {
  dirty_.remove(range);
  known_.remove(range);
  written_.remove(range);
}

void Unit::forget(const ByteRange& range) {
  ByteRanges kept = known_;
  kept.remove(fragmented() ? range_ : range);
  kept.add(dirty_);
  kept.add(in_flight_);
  known_ = std::move(kept);
}

void Unit::learn(std::uint64_t offset, std::span<const std::byte> data, Buffer* snapshot) {
  const ByteRange range = ByteRange{offset, offset + data.size()}.intersection(range_);
  const auto source = [&](const ByteRange& part) {
    return data.subspan(part.begin - offset, part.size());
  };
  if (snapshot != nullptr && snapshot != buffer_.get()) {
    // What a client has written since then is known in the new buffer only; the snapshot wants what
    // storage has, except for the bytes that are in flight.
    for (const ByteRange& gap : in_flight_.missing(range))
      copy_bytes(source(gap),
                 snapshot->bytes().begin() + static_cast<std::ptrdiff_t>(gap.begin - range_.begin));
  }
  const ByteRanges gaps = known_.missing(range);
  for (const ByteRange& gap : gaps)
    copy_bytes(source(gap), at(gap.begin));
  known_.add(gaps);
}

void Unit::learn_zeros(const ByteRange& range) {
  const ByteRanges gaps = known_.missing(range.intersection(range_));
  for (const ByteRange& gap : gaps)
    std::fill_n(at(gap.begin), gap.size(), std::byte{0});
  known_.add(gaps);
}

void Unit::replace_buffer(std::shared_ptr<Buffer> fresh) noexcept {
  for (const ByteRange& part : known_)
    copy_bytes(bytes(part),
               fresh->bytes().begin() + static_cast<std::ptrdiff_t>(part.begin - range_.begin));
  buffer_ = std::move(fresh);
  pinned_ = false;
}

void Unit::start_writing(const ByteRange& below) {
  ByteRanges starting = dirty_.inside(below);
  ByteRanges staying;
  staying.reserve(dirty_.count() + 2); // room for `refused`, even when `below` cuts two ranges
  staying.add(dirty_);
  staying.remove(starting);
  // Nothing above this line changed the unit, nothing below it throws.
  in_flight_ = std::move(starting);
  in_flight_since_ = dirty_since_;
  dirty_ = std::move(staying);
  pinned_ = true;
}

void Unit::stored() noexcept {
  in_flight_.clear();
  pinned_ = false;
  was_refused = false;
}

void Unit::refused() noexcept {
  was_refused = true;
  pinned_ = false;
  if (in_flight_.empty())
    return; // the attempt ended before it began
  // No allocation: `absorb` reserved for these ranges beside its own.
  dirty_.add(in_flight_);
  dirty_since_ = in_flight_since_;
  in_flight_.clear();
}

} // namespace qcowcache
