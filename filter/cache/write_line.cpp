#include "cache/write_line.hpp"

#include <algorithm>

namespace qcowcache {

void WriteLine::leave(Place place) noexcept {
  wait_for_memory(place, false);
  line_.erase(place);
}

void WriteLine::wait_for_memory(Place place, bool waits, Clock::time_point now) noexcept {
  waiting_for_memory_ += waits ? 1 : 0;
  waiting_for_memory_ -= place->waits_for_memory ? 1 : 0;
  place->waits_for_memory = waits;
  place->asked = now;
}

bool WriteLine::is_behind(Place place, const ByteRange& range) noexcept {
  return std::any_of(line_.begin(), place,
                     [&](const Entry& earlier) { return earlier.range.overlaps(range); });
}

bool WriteLine::may_take_memory(Place place, Clock::time_point now) noexcept {
  return std::none_of(line_.begin(), place, [&](const Entry& earlier) {
    return earlier.waits_for_memory && now - earlier.asked < patience;
  });
}

} // namespace qcowcache
