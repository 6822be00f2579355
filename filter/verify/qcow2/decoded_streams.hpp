#pragma once

#include "util/byte_ranges.hpp"

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory_resource>
#include <vector>

namespace qcowcache::qcow2 {

/// Where in the file streams lie that decode to exactly one cluster, and that nobody has written to
/// since. Takes 8 to 16 bytes a stream; forgets the lowest when there is no memory for another.
///
/// Not thread safe.
class DecodedStreams {
public:
  /// The memory outlives it.
  explicit DecodedStreams(std::pmr::memory_resource* memory) : regions_(memory) {}

  /// A stream of `size` bytes, less than 4 MiB, begins at `offset`.
  void remember(std::uint64_t offset, std::uint32_t size);
  /// The bytes of `range` are going to be others.
  void forget(const ByteRange& range) noexcept;
  void clear() noexcept { regions_.clear(); }
  /// Forgets the lowest ones, for their memory. Returns false when there are none.
  bool drop_lowest() noexcept;

  /// The size of the stream that begins at `offset`; 0 when none is known there.
  [[nodiscard]] std::uint32_t size_at(std::uint64_t offset) const noexcept;

private:
  /// In bytes, from the begin of its region on.
  struct Stream {
    std::uint32_t begin;
    std::uint32_t size;

    [[nodiscard]] std::uint64_t end() const noexcept { return std::uint64_t{begin} + size; }
  };
  /// Sorted; they do not overlap.
  using Region = std::pmr::vector<Stream>;

  bool try_remember(std::uint64_t offset, std::uint32_t size);

  std::pmr::map<std::uint64_t, Region> regions_;
};

} // namespace qcowcache::qcow2
