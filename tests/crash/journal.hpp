#pragma once

#include "util/byte_ranges.hpp"

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

/// A request that changes what a disk holds, or a flush.
struct Change {
  enum class Kind : std::uint32_t { write, zero, trim, flush };

  Kind kind = Kind::flush;
  /// Empty for a flush.
  qcowcache::ByteRange range;
  /// As long as `range` for a write; empty otherwise.
  std::vector<std::byte> data;
  bool fua = false;

  /// What the byte at `offset`, inside the range, becomes: a trimmed byte reads as zero here.
  [[nodiscard]] std::byte byte_at(std::uint64_t offset) const {
    return kind == Kind::write ? data[offset - range.begin] : std::byte{0};
  }
  /// Puts what becomes of `part`, inside the range, into an image of the whole disk.
  void apply(const qcowcache::ByteRange& part, std::vector<std::byte>& image) const;
};

/// What clients asked of the cache and what the cache asked of storage, in one order: the begin of
/// each request, and its end if it succeeded. A request that failed never ends.
///
/// `begin` and `end` are thread safe; the rest is for when all threads have ended.
class Journal {
public:
  enum class Side : std::uint32_t { client, storage };
  enum class Moment : std::uint32_t { begin, end };
  struct Entry {
    Side side;
    Moment moment;
    /// Number of the change, counted in the order in which they began.
    std::size_t change;
  };

  /// Returns the change's number.
  std::size_t begin(Side side, Change change);
  void end(Side side, std::size_t change);

  [[nodiscard]] const std::vector<Entry>& entries() const noexcept { return entries_; }
  [[nodiscard]] const Change& change(const Entry& entry) const { return changes_[entry.change]; }

  /// One line for each of the first `count` entries that concern the byte at `offset`, flushes
  /// among them.
  [[nodiscard]] std::string history(std::uint64_t offset, std::size_t count) const;

private:
  std::mutex mutex_;
  std::vector<Change> changes_;
  std::vector<Entry> entries_;
};
