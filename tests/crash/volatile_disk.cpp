#include "volatile_disk.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

using qcowcache::ByteRange;
using qcowcache::ByteRanges;

void VolatileDisk::begin(std::size_t number, const Change& change) {
  if (change.kind == Change::Kind::flush) {
    Flush flush{number, {}};
    for (const Pending& pending : pending_) {
      if (pending.ended)
        flush.covers.push_back(pending.number);
    }
    flushes_.push_back(std::move(flush));
    return;
  }
  for (const Pending& pending : pending_) {
    if (!pending.ended && pending.change->range.overlaps(change.range))
      throw std::logic_error("changes #" + std::to_string(pending.number) + " and #" +
                             std::to_string(number) + " were in the same bytes at once");
  }
  pending_.push_back({&change, number, ByteRanges(change.range), false});
}

void VolatileDisk::end(std::size_t number, const Change& change) {
  if (change.kind == Change::Kind::flush) {
    const auto flush = std::ranges::find(flushes_, number, &Flush::number);
    for (const std::size_t covered : flush->covers)
      make_durable(covered);
    flushes_.erase(flush);
    return;
  }
  std::ranges::find(pending_, number, &Pending::number)->ended = true;
  if (change.fua)
    make_durable(number);
}

void VolatileDisk::make_durable(std::size_t number) {
  const auto found = std::ranges::find(pending_, number, &Pending::number);
  if (found == pending_.end())
    return; // another flush was quicker
  for (const ByteRange& range : found->open)
    found->change->apply(range, durable_);
  touched_.add(found->open); // the next image takes it over
  for (auto older = pending_.begin(); older != found; ++older)
    older->open.remove(found->change->range);
  pending_.erase(found);
}

ByteRanges VolatileDisk::undecided() const {
  ByteRanges all;
  for (const Pending& pending : pending_)
    all.add(pending.open);
  return all;
}
