#pragma once

#include <boost/container/small_vector.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

namespace qcowcache {

/// The bytes from `begin` up to, not including, `end`; offsets in bytes from the start of the
/// export.
struct ByteRange {
  std::uint64_t begin = 0;
  std::uint64_t end = 0;

  [[nodiscard]] std::uint64_t size() const noexcept { return end > begin ? end - begin : 0; }
  [[nodiscard]] bool empty() const noexcept { return end <= begin; }
  [[nodiscard]] bool overlaps(const ByteRange& other) const noexcept {
    return begin < other.end && other.begin < end && !empty() && !other.empty();
  }
  [[nodiscard]] bool contains(const ByteRange& other) const noexcept {
    return other.empty() || (begin <= other.begin && other.end <= end);
  }
  [[nodiscard]] ByteRange intersection(const ByteRange& other) const noexcept {
    return {std::max(begin, other.begin), std::min(end, other.end)};
  }
  friend bool operator==(const ByteRange&, const ByteRange&) noexcept = default;
};

/// For people: its first and its last byte, as in "4096-8191".
[[nodiscard]] std::string to_string(const ByteRange& range);

/// Multiples of `alignment` (a power of two) at or below, and at or above, `offset`.
[[nodiscard]] constexpr std::uint64_t align_down(std::uint64_t offset,
                                                 std::uint64_t alignment) noexcept {
  return offset & ~(alignment - 1);
}
[[nodiscard]] constexpr std::uint64_t align_up(std::uint64_t offset,
                                               std::uint64_t alignment) noexcept {
  return align_down(offset + alignment - 1, alignment);
}

/// The smallest range of whole blocks of `alignment` bytes that has all of `range` in it.
[[nodiscard]] constexpr ByteRange align_outward(const ByteRange& range,
                                                std::uint64_t alignment) noexcept {
  return {align_down(range.begin, alignment), align_up(range.end, alignment)};
}

/// The largest range of whole blocks of `alignment` bytes inside `range`; empty if there is none.
[[nodiscard]] constexpr ByteRange align_inward(const ByteRange& range,
                                               std::uint64_t alignment) noexcept {
  const ByteRange inner{align_up(range.begin, alignment), align_down(range.end, alignment)};
  return inner.begin < inner.end ? inner : ByteRange{range.begin, range.begin};
}

/// A set of bytes, kept as sorted ranges that neither overlap nor touch.
///
/// Adding right behind the last range, which is what a qcow2 writer does nearly always, costs O(1);
/// everything else costs O(log n) to find plus O(n) to move, with n the number of ranges.
/// Not thread safe. Throws std::bad_alloc; the set is then unchanged.
class ByteRanges {
public:
  using Ranges = boost::container::small_vector<ByteRange, 2>;
  using const_iterator = Ranges::const_iterator;

  ByteRanges() = default;
  explicit ByteRanges(const ByteRange& range) { add(range); }

  void add(const ByteRange& range);
  void add(const ByteRanges& other);
  void remove(const ByteRange& range);
  void remove(const ByteRanges& other);
  void clear() noexcept { ranges_.clear(); }
  /// Makes room for `count` ranges in all: up to that number `add` does not throw.
  void reserve(std::size_t count) { ranges_.reserve(count); }

  [[nodiscard]] bool empty() const noexcept { return ranges_.empty(); }
  [[nodiscard]] bool contains(const ByteRange& range) const noexcept;
  [[nodiscard]] bool overlaps(const ByteRange& range) const noexcept;

  /// The parts of `range` that are in the set, and those that are not.
  [[nodiscard]] ByteRanges inside(const ByteRange& range) const;
  [[nodiscard]] ByteRanges missing(const ByteRange& range) const;

  /// The smallest range that has every byte of the set in it; empty for an empty set.
  [[nodiscard]] ByteRange hull() const noexcept {
    return empty() ? ByteRange{} : ByteRange{ranges_.front().begin, ranges_.back().end};
  }
  /// How many bytes, and in how many ranges.
  [[nodiscard]] std::uint64_t bytes() const noexcept;
  [[nodiscard]] std::size_t count() const noexcept { return ranges_.size(); }

  [[nodiscard]] const_iterator begin() const noexcept { return ranges_.begin(); }
  [[nodiscard]] const_iterator end() const noexcept { return ranges_.end(); }

  friend bool operator==(const ByteRanges& left, const ByteRanges& right) noexcept {
    return std::equal(left.begin(), left.end(), right.begin(), right.end());
  }

private:
  /// The first range that ends at or behind `offset`; the search starts at the end.
  [[nodiscard]] Ranges::iterator first_ending_from(std::uint64_t offset) noexcept;
  /// The first range that ends behind `offset`.
  [[nodiscard]] const_iterator first_ending_after(std::uint64_t offset) const noexcept;

  Ranges ranges_;
};

} // namespace qcowcache
