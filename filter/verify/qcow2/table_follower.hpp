#pragma once

#include "util/byte_ranges.hpp"
#include "verify/qcow2/header.hpp"
#include "verify/qcow2/l2_table.hpp"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory_resource>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace qcowcache::qcow2 {

/// Where the active L1 table lies; empty when there is none.
[[nodiscard]] ByteRange l1_range(const Header& header) noexcept;

/// Follows the active L1 table of an image and the L2 tables that it names, by what is written to
/// them, and tells which compressed clusters became reachable and have not been checked.
///
/// The L1 table is held in memory, an L2 table only once something of it has changed: a copy of its
/// compressed entries, with a bit for each that is unchecked. What an entry's place in the previous
/// table had already is not new; so a snapshot's copy of a table brings no work. Of each table that
/// was ever read it is known about where the clusters are that it names, so that few have to be
/// read once more when bytes are written that an entry may name: then such an entry is new again.
///
/// When there is no memory for a table's copy, all its entries count as new whenever it changes.
/// When there is none to keep track at all, `lost` says so, and every table has to be looked at.
///
/// Not thread safe. Knows no storage: whoever uses it reads tables when asked to. Does not throw
/// but where it says so.
class TableFollower {
public:
  /// A compressed cluster, and where its entry stands.
  struct Entry {
    std::uint32_t l1_index = 0;
    std::uint32_t l2_index = 0;
    std::uint64_t value = 0;
  };

  /// Somebody else gives back some of the memory, for so many bytes; returns false when nothing is
  /// left to give, or they could not be had all the same. Must not throw, nor call the follower.
  using MakeRoom = std::function<bool(std::size_t bytes)>;

  /// The memory outlives it.
  explicit TableFollower(
      std::pmr::memory_resource* memory,
      MakeRoom make_room = [](std::size_t /*bytes*/) { return false; })
      : memory_(memory), make_room_(std::move(make_room)), l1_(memory), named_(memory),
        by_offset_(memory), copies_(memory) {}

  /// Forgets everything; there is no image.
  void clear() noexcept;
  /// Something was not noted: from here on the tables are `lost`.
  void lose() noexcept;
  /// Follows the image with this header from now on. What an earlier image of the same layout had
  /// at the same place of its L1 table is not new; in an image of another layout all is. The L1
  /// table has to be read then, if it exists.
  void set_header(const Header& header) noexcept;
  [[nodiscard]] const std::optional<Header>& header() const noexcept { return header_; }

  [[nodiscard]] ByteRange l1_range() const noexcept;
  [[nodiscard]] bool l1_is_stale() const noexcept { return l1_stale_; }
  /// The L1 table is going to be read: whether it is changed meanwhile is found out by
  /// `l1_entries`.
  void begin_reading_l1() noexcept { l1_touched_ = false; }
  /// The L1 table has these bytes from this entry on. `old`: its tables count as checked.
  void l1_entries(std::uint32_t first, std::span<const std::byte> bytes, bool old) noexcept;
  /// All of it was read, so that entries behind its end are gone. It is still stale if it was
  /// changed while it was being read.
  void end_reading_l1() noexcept;

  /// Bytes of the file have become these, zeros, or unknown ones.
  void wrote(std::uint64_t offset, std::span<const std::byte> data) noexcept;
  void zeroed(const ByteRange& range) noexcept;
  void changed(const ByteRange& range) noexcept;

  /// A table that the range overlaps, whose content counts as checked but is not in memory: it has
  /// to be read before it changes. The first, or the next behind that of `before`.
  [[nodiscard]] std::optional<std::uint32_t>
  unread_in(const ByteRange& range,
            std::optional<std::uint32_t> before = std::nullopt) const noexcept;
  /// REQUIRES: the L1 table names one with this index.
  [[nodiscard]] bool is_unread(std::uint32_t l1_index) const noexcept {
    return copy_of(l1_index) == nullptr;
  }
  /// Whether the range has a part of the L1 table or of an L2 table in it.
  [[nodiscard]] bool is_table(const ByteRange& range) const noexcept;
  [[nodiscard]] bool has_table(std::uint32_t l1_index) const noexcept {
    return l1_index < l1_.size() && l1_[l1_index] != 0;
  }
  /// Where the table is that this entry of the L1 table names. REQUIRES: it names one.
  [[nodiscard]] std::uint64_t table_offset(std::uint32_t l1_index) const noexcept {
    return l1_[l1_index];
  }
  /// Whether clients wrote zeros, and nothing else since, to all of the range.
  [[nodiscard]] bool reads_zeros(const ByteRange& range) const noexcept {
    return zeros_.contains(range);
  }
  /// This was the table's content, all of it, and counts as checked.
  void load_checked(std::uint32_t l1_index, std::span<const std::byte> table) noexcept;

  /// A table with this index or a higher one that has to be read before its entries are known.
  [[nodiscard]] std::optional<std::uint32_t> stale_from(std::uint32_t l1_index) const noexcept;
  /// The table that this one took the place of and that counts as checked, if it has to be read.
  [[nodiscard]] std::optional<std::uint64_t> replaced(std::uint32_t l1_index) const noexcept;
  /// What is in the range now is not what was checked: where a table in it was replaced, all
  /// entries of its successor are new.
  void forget_replaced(const ByteRange& range) noexcept;
  void begin_reading(std::uint32_t l1_index) noexcept;
  /// Whether all entries of this table are new, and it has no copy yet.
  [[nodiscard]] bool all_new(std::uint32_t l1_index) const noexcept {
    const Copy* copy = copy_of(l1_index);
    return copy != nullptr && copy->entries.empty() && copy->replaced == 0;
  }
  /// The table has this content. Returns false when there is no memory for a copy: then the caller
  /// has to look at all of its compressed entries, and calls `looked_at_all`.
  [[nodiscard]] bool load(std::uint32_t l1_index, std::span<const std::byte> table) noexcept;
  /// All entries of a table without a copy were found good, or not.
  void looked_at_all(std::uint32_t l1_index, bool good) noexcept;

  /// A table with this index or a higher one that may name bytes in the ranges, and whose entries
  /// do not all count as new anyway.
  [[nodiscard]] std::optional<std::uint32_t> named_from(std::uint32_t l1_index,
                                                        const ByteRanges& ranges) const noexcept;
  /// Whether its entries are in memory.
  [[nodiscard]] bool has_copy(std::uint32_t l1_index) const noexcept {
    const Copy* copy = copy_of(l1_index);
    return copy != nullptr && !copy->entries.empty();
  }
  /// The clusters are to be checked again that name bytes in the ranges. REQUIRES: `has_copy`.
  void renew(std::uint32_t l1_index, const ByteRanges& ranges) noexcept;
  /// Whether the table has entries that name bytes in the ranges.
  [[nodiscard]] bool names(std::span<const std::byte> table, const ByteRanges& ranges) const;
  /// A table that is not in memory has this content.
  void note_content(std::uint32_t l1_index, std::span<const std::byte> table) noexcept;

  /// The first unchecked cluster at or behind this place.
  [[nodiscard]] std::optional<Entry> unchecked_from(std::uint32_t l1_index,
                                                    std::uint32_t l2_index) const noexcept;
  /// The cluster is good, should it still be the one that its place stands for.
  void checked(const Entry& entry) noexcept;

  /// The cluster is to be checked again, should its place stand for it. REQUIRES: its table is
  /// named by the L1 table and its content was given to `load_checked`.
  void uncheck(const Entry& entry) noexcept;

  /// Whether `unchecked_from` or `stale_from` have anything, or the L1 table has to be read, or,
  /// when the tables are lost, anything was written.
  [[nodiscard]] bool has_work() const noexcept;
  /// There was no memory to keep track of the tables: all of them have to be looked at, as said by
  /// `begin_looking_at_everything`, whenever something was written.
  [[nodiscard]] bool lost() const noexcept { return lost_; }
  void begin_looking_at_everything() noexcept;
  /// This is where the table is that was looked at.
  void looked_at_table(std::uint32_t l1_index, std::uint64_t offset) noexcept;
  /// All was good, and nobody is about to change anything: if nobody did meanwhile, and there is
  /// memory, the tables are followed again, and count as checked.
  void follow_again() noexcept;
  /// Something was not good, so that all has to be looked at again.
  void look_at_everything_again() noexcept { lost_touched_ = lost_; }
  /// Gives back the memory of tables that are checked.
  void drop_checked_copies() noexcept;

private:
  struct Copy {
    explicit Copy(std::pmr::memory_resource* memory) : entries(memory), unchecked(memory) {}

    /// The compressed entries, 0 for others; empty: not in memory.
    std::pmr::vector<std::uint64_t> entries;
    /// A bit for each.
    std::pmr::vector<std::uint64_t> unchecked;
    std::uint32_t unchecked_count = 0;
    /// The table has to be read.
    bool stale = false;
    /// It was changed while it was being read.
    bool touched = false;
    /// Another table stood here and counts as checked, but was not in memory; 0: none.
    std::uint64_t replaced = 0;

    [[nodiscard]] bool has_work() const noexcept { return stale || unchecked_count > 0; }
  };

  /// Where in the file the clusters are that a table names, in MiB, both ends included. Grows with
  /// entries, and shrinks when the table is read.
  struct Extent {
    std::uint32_t first = 0;
    std::uint32_t last = UINT32_MAX;

    static Extent none() noexcept { return {UINT32_MAX, 0}; }
    void extend(const CompressedCluster& cluster) noexcept;
    [[nodiscard]] ByteRange bytes() const noexcept;
  };

  /// The entry that begins at an offset in the file.
  using EntryAt = std::function<std::uint64_t(std::uint64_t at)>;

  void set_l1_entry(std::uint32_t index, std::uint64_t offset, bool old);
  void place(std::uint32_t index, std::uint64_t offset);
  void sort_by_offset(std::uint32_t first, std::uint32_t end);
  Copy* copy_of(std::uint32_t index) noexcept;
  [[nodiscard]] const Copy* copy_of(std::uint32_t index) const noexcept;
  Copy& make_copy(std::uint32_t index);
  bool allocate(Copy& copy) noexcept;
  template <typename Allocate>
  auto with_room(std::size_t bytes, Allocate allocate);
  void make_l1();
  void free_l1() noexcept;
  static void apply(Copy& copy, std::uint32_t l2_index, std::uint64_t value) noexcept;
  void note_zeros(const ByteRange& range, bool zeros) noexcept;
  [[nodiscard]] bool is_before(std::uint32_t left, std::uint32_t right) const noexcept {
    return std::pair(l1_[left], left) < std::pair(l1_[right], right);
  }
  [[nodiscard]] std::pmr::vector<std::uint32_t>::const_iterator
  first_table(const ByteRange& range) const noexcept;
  template <typename Function>
  void for_each_table(const ByteRange& range, Function function) const;
  void write_tables(const ByteRange& range, const EntryAt& entry_at) noexcept;

  std::pmr::memory_resource* memory_;
  MakeRoom make_room_;
  std::optional<Header> header_;
  bool l1_stale_ = false;
  bool l1_touched_ = false;
  bool lost_ = false;
  bool lost_touched_ = false;
  /// While they are lost: the L1 table in memory is what is being looked at, so far.
  bool learning_ = false;
  /// Offsets of the tables, 0 for none.
  std::pmr::vector<std::uint64_t> l1_;
  /// By index, too.
  std::pmr::vector<Extent> named_;
  /// The indices of those that exist, sorted by offset, then by index.
  std::pmr::vector<std::uint32_t> by_offset_;
  /// By index.
  std::pmr::map<std::uint32_t, Copy> copies_;
  /// Some of them may have a `replaced`.
  bool any_replaced_ = false;
  /// Some of them may have no work.
  bool any_checked_ = false;
  /// Ranges written with zeros only: a new table there is known without being read.
  ByteRanges zeros_;
};

} // namespace qcowcache::qcow2
