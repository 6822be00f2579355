#include "cache/zero_map.hpp"

#include <new>
#include <utility>

namespace qcowcache {

void ZeroMap::learn(Question question, const ByteRange& answered, const ByteRanges& zeros) {
  const ByteRanges changed_meanwhile = std::move(*question);
  questions_.erase(question);
  ByteRanges still_zeros = zeros;
  still_zeros.remove(changed_meanwhile);
  zeros_.add(still_zeros);
  keep_small();
  if (asked_.count() < most_ranges)
    asked_.add(answered);
}

void ZeroMap::changed(const ByteRange& range) noexcept {
  try {
    zeros_.remove(range);
    for (ByteRanges& changes : questions_)
      changes.add(range);
    keep_small();
  } catch (const std::bad_alloc&) {
    // Forgetting is always right, remembering too much never is.
    zeros_.clear();
    for (ByteRanges& changes : questions_) {
      changes.clear();
      changes.add({0, UINT64_MAX}); // fits without allocating
    }
  }
}

void ZeroMap::zeroed(const ByteRange& range) {
  changed(range);
  zeros_.add(range);
  keep_small();
}

void ZeroMap::clear() noexcept {
  asked_.clear();
  zeros_.clear();
  for (ByteRanges& changes : questions_)
    changes.clear(), changes.add({0, UINT64_MAX});
}

void ZeroMap::keep_small() noexcept {
  // Changes come where the client writes now, which is mostly at the end: the front is older.
  while (zeros_.count() > most_ranges)
    zeros_.remove(ByteRange{*zeros_.begin()});
  for (ByteRanges& changes : questions_) {
    if (changes.count() > most_ranges) {
      const ByteRange hull = changes.hull();
      changes.add(hull);
    }
  }
}

} // namespace qcowcache
