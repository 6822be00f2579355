#pragma once

#include "util/byte_ranges.hpp"

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>

namespace qcowcache {

/// Where storage has room for what clients write, as far as that is known, and what of it was
/// reserved for them: allocated, without anything in it but zeros.
///
/// Storage is asked in windows, so that it is asked seldom. The first one is small: whoever creates
/// an image and leaves gives little back, and a filesystem then puts what follows behind it, in one
/// piece. Where there is too little room for a window they become smaller, down to a unit, and
/// larger again as soon as one fits.
///
/// Remembers a bounded number of ranges: room that does not fit is asked for once more, or stays
/// reserved. Not thread safe: guarded by the cache's mutex.
class Room {
public:
  using Clock = std::chrono::steady_clock;
  /// No more ranges than this are remembered, of either kind.
  static constexpr std::size_t most_ranges = 4096;
  /// The first window of a disk, and how much storage is asked for before it is known to reserve.
  static constexpr std::uint64_t beginning = std::uint64_t{1024} * 1024;

  /// Windows of `largest` bytes, rounded down to a power of two; 0: storage is never asked.
  explicit Room(std::uint64_t largest) noexcept;

  /// Whether storage is asked: nobody knows that it cannot reserve, and it need not be left alone.
  [[nodiscard]] bool asks() const noexcept {
    return window_ > 0 && (!asks_again_at_ || *asks_again_at_ <= Clock::now());
  }
  /// It cannot: it is not asked again, and room counts as there.
  void give_up() noexcept;
  /// It could not be asked: until `moment` room counts as there.
  void pause(Clock::time_point moment) noexcept { asks_again_at_ = moment; }
  /// It can: what it was asked for it has allocated, and still calls a hole.
  void prove() noexcept { proven_ = true; }
  [[nodiscard]] bool proven() const noexcept { return proven_; }

  /// Whether there is room for all of `range`, or nobody can tell.
  [[nodiscard]] bool has(const ByteRange& range) const noexcept {
    return !asks() || there_.contains(range);
  }
  /// The parts of `range` for which it is known that there is room.
  [[nodiscard]] ByteRanges known_in(const ByteRange& range) const { return there_.inside(range); }
  /// What storage is to be asked for next so that `unit`, which begins on a multiple of its size, a
  /// power of two, has room: inside an export of `size` bytes.
  [[nodiscard]] ByteRange window(const ByteRange& unit, std::uint64_t size) const noexcept;
  /// Clients have come to `unit`, a new one, in the second half of its window: the first unit
  /// behind that, if there is one, and the room of its window is not known. Nothing while room is
  /// scarce.
  [[nodiscard]] std::optional<ByteRange> next_unit(const ByteRange& unit,
                                                   std::uint64_t size) const noexcept;
  /// Storage has no room for a window of this size: an eighth next time, if that is not less than
  /// `least`.
  void smaller(std::uint64_t least) noexcept;
  /// It has had room: twice as much next time, as far as that was ever wanted.
  void larger() noexcept;

  /// There is room in `range`. Throws std::bad_alloc; nothing is known then that was not before.
  void found(const ByteRange& range);
  /// The same, because storage was asked to reserve it.
  void reserved(const ByteRange& range);
  /// A client's bytes are there now, or zeros that it wants to have room for.
  void wrote(const ByteRange& range) noexcept;
  /// Maybe there is no room there any more.
  void gone(const ByteRange& range) noexcept;

  /// What is reserved that no client has written to: it reads as zeros, and clients take it for a
  /// hole.
  [[nodiscard]] const ByteRanges& reserved() const noexcept { return reserved_; }
  [[nodiscard]] ByteRanges reserved_in(const ByteRange& range) const {
    return reserved_.inside(range);
  }
  /// Everything that was learned goes: it is another disk, or may be.
  void clear() noexcept;

private:
  void not_reserved(const ByteRange& range) noexcept;
  void keep_small(const ByteRange& but);

  std::uint64_t largest_;
  /// 0: storage cannot reserve.
  std::uint64_t window_;
  std::optional<Clock::time_point> asks_again_at_;
  bool proven_ = false;
  ByteRanges there_;
  ByteRanges reserved_;
};

} // namespace qcowcache
