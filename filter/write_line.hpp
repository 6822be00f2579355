#pragma once

#include "byte_ranges.hpp"

#include <cstddef>
#include <list>

namespace qcowcache {

/// Requests that change an export and could not be done at once, in the order in which they came.
///
/// A request may wait for long: for memory, for its turn at a range, for storage that hangs. Who
/// asks for the same bytes later must not be answered before it: its client may be gone, and then
/// its bytes, which nobody was told of, would replace newer ones that somebody was.
///
/// Not thread safe: guarded by the cache's mutex.
class WriteLine {
public:
  struct Entry {
    ByteRange range;
    bool waits_for_memory = false;
  };
  using Place = std::list<Entry>::iterator;

  /// At the end of the line. Throws std::bad_alloc.
  [[nodiscard]] Place join(const ByteRange& range) { return line_.insert(line_.end(), {range}); }
  void leave(Place place) noexcept;
  void wait_for_memory(Place place, bool waits) noexcept;

  /// Where somebody stands who is not in the line yet.
  [[nodiscard]] Place behind_all() noexcept { return line_.end(); }
  [[nodiscard]] bool empty() const noexcept { return line_.empty(); }
  /// Whether somebody who came before asks for bytes of `range`.
  [[nodiscard]] bool is_behind(Place place, const ByteRange& range) noexcept;
  /// Whether nobody who came before waits for memory.
  [[nodiscard]] bool may_take_memory(Place place) noexcept;
  /// How many wait for memory.
  [[nodiscard]] std::size_t waiting_for_memory() const noexcept { return waiting_for_memory_; }

private:
  std::list<Entry> line_;
  std::size_t waiting_for_memory_ = 0;
};

} // namespace qcowcache
