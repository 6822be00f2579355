#pragma once

#include "util/byte_ranges.hpp"

#include <chrono>
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
  using Clock = std::chrono::steady_clock;
  /// Who waits for memory asks for it again and again; if not for so long, it waits for something
  /// else by now, maybe for storage that hangs.
  static constexpr std::chrono::milliseconds patience{1000};

  struct Entry {
    ByteRange range;
    bool waits_for_memory = false;
    Clock::time_point asked = {};
  };
  using Place = std::list<Entry>::iterator;

  /// At the end of the line. Throws std::bad_alloc.
  [[nodiscard]] Place join(const ByteRange& range) { return line_.insert(line_.end(), {range}); }
  void leave(Place place) noexcept;
  /// It asks for memory, or no longer.
  void wait_for_memory(Place place, bool waits, Clock::time_point now = Clock::now()) noexcept;

  /// Where somebody stands who is not in the line yet.
  [[nodiscard]] Place behind_all() noexcept { return line_.end(); }
  [[nodiscard]] bool empty() const noexcept { return line_.empty(); }
  /// Whether somebody who came before asks for bytes of `range`.
  [[nodiscard]] bool is_behind(Place place, const ByteRange& range) noexcept;
  /// Whether nobody who came before waits for memory, and has asked for it lately.
  [[nodiscard]] bool may_take_memory(Place place, Clock::time_point now) noexcept;
  [[nodiscard]] bool may_take_memory(Place place) noexcept {
    return waiting_for_memory_ == 0 || may_take_memory(place, Clock::now());
  }
  /// How many wait for memory.
  [[nodiscard]] std::size_t waiting_for_memory() const noexcept { return waiting_for_memory_; }

private:
  std::list<Entry> line_;
  std::size_t waiting_for_memory_ = 0;
};

} // namespace qcowcache
