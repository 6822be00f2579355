#include "verify/qcow2/table_follower.hpp"

#include "util/all_zeros.hpp"
#include "verify/qcow2/big_endian.hpp"

#include <algorithm>
#include <bit>
#include <new>
#include <utility>

namespace qcowcache::qcow2 {

namespace {

/// Clients write zeros in many places: what is beyond this number is only read once more.
constexpr std::size_t most_zero_ranges = 1024;
/// More than so many tables that change their place are sorted together.
constexpr std::size_t few = 8;
constexpr std::size_t bits = 64;

bool same_layout(const Header& left, const Header& right) noexcept {
  return left.cluster_bits == right.cluster_bits && left.extended_l2 == right.extended_l2 &&
         left.compression == right.compression;
}

} // namespace

ByteRange l1_range(const Header& header) noexcept {
  const TablePlace& l1 = header.l1;
  return {l1.offset, l1.offset + std::uint64_t{l1.entries} * l1_entry_size};
}

// ---- The L1 table

void TableFollower::clear() noexcept {
  header_.reset();
  l1_stale_ = false;
  l1_touched_ = false;
  lost_ = false;
  lost_touched_ = false;
  learning_ = false;
  l1_.clear();
  named_.clear();
  by_offset_.clear();
  copies_.clear();
}

void TableFollower::lose() noexcept {
  free_l1();
  copies_.clear();
  zeros_.clear();
  l1_stale_ = false;
  lost_ = true;
  lost_touched_ = true;
  learning_ = false;
}

void TableFollower::begin_looking_at_everything() noexcept {
  lost_touched_ = false;
  learning_ = false;
  l1_.clear();
  named_.clear();
  by_offset_.clear();
  try {
    make_l1();
    learning_ = true;
  } catch (const std::bad_alloc&) {
    free_l1(); // it goes without, as before
  }
}

void TableFollower::looked_at_table(std::uint32_t l1_index, std::uint64_t offset) noexcept {
  if (lost_ && learning_ && l1_index < l1_.size())
    l1_[l1_index] = offset;
}

void TableFollower::follow_again() noexcept {
  if (!lost_ || !learning_ || lost_touched_ || l1_.size() != header_->l1.entries)
    return;
  sort_by_offset(0, static_cast<std::uint32_t>(l1_.size()));
  lost_ = false;
  learning_ = false;
}

void TableFollower::set_header(const Header& header) noexcept {
  if (!header_ || !same_layout(*header_, header)) {
    clear();
    l1_stale_ = true;
  } else if (header_->l1 != header.l1) {
    l1_stale_ = !lost_;
    lost_touched_ = lost_;
  }
  header_ = header;
}

ByteRange TableFollower::l1_range() const noexcept {
  return header_ ? qcow2::l1_range(*header_) : ByteRange{};
}

void TableFollower::l1_entries(std::uint32_t first, std::span<const std::byte> bytes,
                               bool old) noexcept {
  if (lost_)
    return;
  try {
    const std::size_t whole = bytes.size() / l1_entry_size;
    const auto count = static_cast<std::uint32_t>(
        std::min<std::size_t>(whole, header_->l1.entries - std::min(first, header_->l1.entries)));
    const auto offset_of = [&](std::uint32_t index) {
      return l2_table_offset(l1_entry(bytes, std::size_t{index - first} * l1_entry_size), *header_)
          .value_or(0);
    };
    const auto differs = [&](std::uint32_t index) {
      return offset_of(index) != (index < l1_.size() ? l1_[index] : 0);
    };
    std::size_t moved = 0;
    for (std::uint32_t index = first; index < first + count; ++index)
      moved += differs(index) ? 1U : 0U;
    if (moved > 0 && first + count > l1_.size())
      make_l1();
    for (std::uint32_t index = first; moved > 0 && index < first + count; ++index) {
      if (!differs(index))
        continue;
      named_[index] = {};
      set_l1_entry(index, offset_of(index), old);
      if (moved > few)
        l1_[index] = offset_of(index);
      else
        place(index, offset_of(index));
    }
    if (moved > few)
      sort_by_offset(first, first + count);
  } catch (const std::bad_alloc&) {
    lose();
  }
}

void TableFollower::end_reading_l1() noexcept {
  if (lost_)
    return;
  if (const std::uint32_t entries = header_->l1.entries; l1_.size() > entries) {
    std::erase_if(by_offset_, [entries](std::uint32_t index) { return index >= entries; });
    copies_.erase(copies_.lower_bound(entries), copies_.end());
    l1_.resize(entries);
    named_.resize(entries);
  }
  l1_stale_ = l1_touched_;
  l1_touched_ = false;
}

/// The entry is going to name a table at `offset`, 0 for none, and not the one that it names now.
void TableFollower::set_l1_entry(std::uint32_t index, std::uint64_t offset, bool old) {
  const std::uint64_t before = l1_[index];
  if (offset == 0) {
    copies_.erase(index);
  } else if (!old) {
    const bool was_unread = before != 0 && copy_of(index) == nullptr;
    Copy& copy = make_copy(index);
    copy.stale = true;
    copy.touched = true;
    if (was_unread) {
      copy.replaced = before;
      any_replaced_ = true;
    }
    if (zeros_.contains({offset, offset + header_->cluster_size()})) {
      copy.replaced = 0;
      if (allocate(copy)) {
        std::ranges::fill(copy.entries, 0);
        std::ranges::fill(copy.unchecked, 0);
        copy.unchecked_count = 0;
        copy.stale = false;
        any_checked_ = true;
        named_[index] = Extent::none();
      }
    }
  }
}

/// Allocates about so many bytes, if need be after others have given up theirs. Throws
/// std::bad_alloc.
template <typename Allocate>
auto TableFollower::with_room(std::size_t bytes, Allocate allocate) {
  try {
    return allocate();
  } catch (const std::bad_alloc&) {
    drop_checked_copies();
  }
  for (;;) {
    try {
      return allocate();
    } catch (const std::bad_alloc&) {
      if (!make_room_(bytes))
        throw;
    }
  }
}

/// Makes room for all entries of the L1 table, here and in their order. Throws std::bad_alloc.
void TableFollower::make_l1() {
  const std::size_t entries = header_->l1.entries;
  with_room(entries * (sizeof l1_[0] + sizeof named_[0] + sizeof by_offset_[0]), [this, entries] {
    by_offset_.reserve(entries);
    named_.resize(entries);
    l1_.resize(entries);
  });
}

/// Without keeping their memory for later, which others can use.
void TableFollower::free_l1() noexcept {
  decltype(l1_)(memory_).swap(l1_);
  decltype(named_)(memory_).swap(named_);
  decltype(by_offset_)(memory_).swap(by_offset_);
}

/// The table of this index is at `offset`, 0 for nowhere.
void TableFollower::place(std::uint32_t index, std::uint64_t offset) {
  const auto position = [this](std::uint32_t wanted) {
    return std::partition_point(by_offset_.begin(), by_offset_.end(),
                                [&](std::uint32_t other) { return is_before(other, wanted); });
  };
  if (l1_[index] != 0)
    by_offset_.erase(position(index));
  l1_[index] = offset;
  if (offset != 0)
    by_offset_.insert(position(index), index); // `make_l1` has made room
}

/// The tables from `first` to before `end` may be anywhere, and the others are in their order.
void TableFollower::sort_by_offset(std::uint32_t first, std::uint32_t end) {
  std::erase_if(by_offset_, [=](std::uint32_t index) { return index >= first && index < end; });
  const auto others = static_cast<std::ptrdiff_t>(by_offset_.size());
  for (std::uint32_t index = first; index < end; ++index) {
    if (l1_[index] != 0)
      by_offset_.push_back(index); // `make_l1` has made room
  }
  const auto before = [this](std::uint32_t left, std::uint32_t right) {
    return is_before(left, right);
  };
  std::sort(by_offset_.begin() + others, by_offset_.end(), before);
  std::inplace_merge(by_offset_.begin(), by_offset_.begin() + others, by_offset_.end(), before);
}

// ---- Copies of L2 tables

TableFollower::Copy* TableFollower::copy_of(std::uint32_t index) noexcept {
  const auto found = copies_.find(index);
  return found == copies_.end() ? nullptr : &found->second;
}

const TableFollower::Copy* TableFollower::copy_of(std::uint32_t index) const noexcept {
  const auto found = copies_.find(index);
  return found == copies_.end() ? nullptr : &found->second;
}

/// Throws std::bad_alloc.
TableFollower::Copy& TableFollower::make_copy(std::uint32_t index) {
  return *with_room(sizeof(Copy),
                    [&] { return &copies_.try_emplace(index, memory_).first->second; });
}

/// Makes room for the entries of a copy that has work. Returns false when there is no memory.
bool TableFollower::allocate(Copy& copy) noexcept {
  if (!copy.entries.empty())
    return true;
  const std::size_t count = header_->l2_entries();
  try {
    with_room(count * (sizeof copy.entries[0]) + count / 8, [&] {
      copy.unchecked.resize((count + bits - 1) / bits);
      copy.entries.resize(count);
    });
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

void TableFollower::drop_checked_copies() noexcept {
  if (std::exchange(any_checked_, false))
    std::erase_if(copies_, [](const auto& item) { return !item.second.has_work(); });
}

void TableFollower::apply(Copy& copy, std::uint32_t l2_index, std::uint64_t value) noexcept {
  const std::uint64_t entry = is_compressed(value) ? value : 0;
  if (copy.entries[l2_index] == entry)
    return;
  copy.entries[l2_index] = entry;
  std::uint64_t& word = copy.unchecked[l2_index / bits];
  const std::uint64_t bit = std::uint64_t{1} << l2_index % bits;
  const bool was_unchecked = (word & bit) != 0;
  if (entry != 0 && !was_unchecked)
    ++copy.unchecked_count;
  else if (entry == 0 && was_unchecked)
    --copy.unchecked_count;
  word = entry != 0 ? word | bit : word & ~bit;
}

void TableFollower::Extent::extend(const CompressedCluster& cluster) noexcept {
  constexpr unsigned unit = 20;
  const auto in_units = [](std::uint64_t at) {
    return static_cast<std::uint32_t>(std::min<std::uint64_t>(at >> unit, UINT32_MAX));
  };
  first = std::min(first, in_units(cluster.offset));
  last = std::max(last, in_units(cluster.offset + cluster.length - 1));
}

ByteRange TableFollower::Extent::bytes() const noexcept {
  constexpr unsigned unit = 20;
  return {std::uint64_t{first} << unit,
          last == UINT32_MAX ? UINT64_MAX : (std::uint64_t{last} + 1) << unit};
}

void TableFollower::note_content(std::uint32_t l1_index,
                                 std::span<const std::byte> table) noexcept {
  if (lost_ || l1_index >= l1_.size())
    return;
  named_[l1_index] = Extent::none();
  for (std::uint32_t i = 0; i < header_->l2_entries(); ++i) {
    const std::uint64_t value = l2_entry(table, i, *header_);
    if (is_compressed(value))
      named_[l1_index].extend(compressed_cluster(value, *header_));
  }
}

std::optional<std::uint32_t> TableFollower::named_from(std::uint32_t l1_index,
                                                       const ByteRanges& ranges) const noexcept {
  if (lost_)
    return std::nullopt;
  for (std::uint32_t index = l1_index; index < l1_.size(); ++index) {
    if (l1_[index] != 0 && ranges.overlaps(named_[index].bytes()) &&
        (is_unread(index) || has_copy(index)))
      return index;
  }
  return std::nullopt;
}

void TableFollower::renew(std::uint32_t l1_index, const ByteRanges& ranges) noexcept {
  const Copy& copy = *copy_of(l1_index);
  for (std::uint32_t i = 0; i < copy.entries.size(); ++i) {
    const std::uint64_t value = copy.entries[i];
    if (value != 0 && ranges.overlaps(compressed_cluster(value, *header_).range()))
      uncheck({l1_index, i, value});
  }
}

bool TableFollower::names(std::span<const std::byte> table, const ByteRanges& ranges) const {
  for (std::uint32_t i = 0; i < header_->l2_entries(); ++i) {
    const std::uint64_t value = l2_entry(table, i, *header_);
    if (is_compressed(value) && ranges.overlaps(compressed_cluster(value, *header_).range()))
      return true;
  }
  return false;
}

void TableFollower::load_checked(std::uint32_t l1_index,
                                 std::span<const std::byte> table) noexcept {
  if (lost_ || l1_index >= l1_.size() || l1_[l1_index] == 0)
    return;
  try {
    const bool is_new = copy_of(l1_index) == nullptr;
    Copy& copy = make_copy(l1_index);
    const bool stale = !is_new && copy.stale;
    copy.stale = true; // so that it is not dropped to make room for itself
    copy.replaced = 0;
    if (copy.entries.empty() && allocate(copy)) {
      for (std::uint32_t i = 0; i < copy.entries.size(); ++i) {
        const std::uint64_t value = l2_entry(table, i, *header_);
        copy.entries[i] = is_compressed(value) ? value : 0;
      }
    }
    if (is_new) // else it is what stood here before
      note_content(l1_index, table);
    copy.stale = stale;
    any_checked_ = true;
    if (copy.entries.empty() && !stale)
      copies_.erase(l1_index);
  } catch (const std::bad_alloc&) {
    return; // it stays unread: then all of its entries will count as new
  }
}

std::optional<std::uint32_t> TableFollower::stale_from(std::uint32_t l1_index) const noexcept {
  for (auto it = copies_.lower_bound(l1_index); it != copies_.end(); ++it) {
    if (it->second.stale)
      return it->first;
  }
  return std::nullopt;
}

std::optional<std::uint64_t> TableFollower::replaced(std::uint32_t l1_index) const noexcept {
  const Copy* copy = copy_of(l1_index);
  if (copy == nullptr || copy->replaced == 0 || !copy->entries.empty())
    return std::nullopt;
  return copy->replaced;
}

void TableFollower::forget_replaced(const ByteRange& range) noexcept {
  if (!any_replaced_) // as with most writes
    return;
  any_replaced_ = false;
  for (auto& [index, copy] : copies_) {
    if (range.overlaps({copy.replaced, copy.replaced + header_->cluster_size()}))
      copy.replaced = 0;
    any_replaced_ = any_replaced_ || copy.replaced != 0;
  }
}

void TableFollower::begin_reading(std::uint32_t l1_index) noexcept {
  if (Copy* copy = copy_of(l1_index))
    copy->touched = false;
}

bool TableFollower::load(std::uint32_t l1_index, std::span<const std::byte> table) noexcept {
  Copy* copy = copy_of(l1_index);
  if (copy == nullptr || !copy->stale)
    return true;
  if (!allocate(*copy))
    return false;
  note_content(l1_index, table);
  for (std::uint32_t i = 0; i < copy->entries.size(); ++i)
    apply(*copy, i, l2_entry(table, i, *header_));
  copy->replaced = 0;
  copy->stale = copy->touched;
  any_checked_ = true;
  return true;
}

void TableFollower::looked_at_all(std::uint32_t l1_index, bool good) noexcept {
  const Copy* copy = copy_of(l1_index);
  if (copy != nullptr && good && !copy->touched)
    copies_.erase(l1_index);
}

std::optional<TableFollower::Entry>
TableFollower::unchecked_from(std::uint32_t l1_index, std::uint32_t l2_index) const noexcept {
  for (auto it = copies_.lower_bound(l1_index); it != copies_.end(); ++it) {
    const Copy& copy = it->second;
    const std::uint32_t first = it->first == l1_index ? l2_index : 0;
    if (copy.unchecked_count > 0) {
      for (std::size_t word = first / bits; word < copy.unchecked.size(); ++word) {
        std::uint64_t set = copy.unchecked[word];
        if (word == first / bits)
          set &= ~std::uint64_t{0} << first % bits;
        if (set != 0) {
          const auto found = static_cast<std::uint32_t>(
              word * bits + static_cast<std::size_t>(std::countr_zero(set)));
          return Entry{it->first, found, copy.entries[found]};
        }
      }
    }
  }
  return std::nullopt;
}

void TableFollower::checked(const Entry& entry) noexcept {
  Copy* copy = copy_of(entry.l1_index);
  if (copy == nullptr || copy->entries.empty() || copy->entries[entry.l2_index] != entry.value)
    return;
  std::uint64_t& word = copy->unchecked[entry.l2_index / bits];
  const std::uint64_t bit = std::uint64_t{1} << entry.l2_index % bits;
  if ((word & bit) != 0)
    --copy->unchecked_count;
  word &= ~bit;
  any_checked_ = true;
}

void TableFollower::uncheck(const Entry& entry) noexcept {
  Copy* copy = copy_of(entry.l1_index);
  if (copy == nullptr) {
    const std::uint64_t offset = l1_[entry.l1_index];
    changed({offset, offset + 1}); // without a copy all of its entries are looked at
  } else if (entry.l2_index < copy->entries.size() &&
             copy->entries[entry.l2_index] == entry.value) {
    copy->entries[entry.l2_index] = 0;
    apply(*copy, entry.l2_index, entry.value);
  }
}

bool TableFollower::has_work() const noexcept {
  return l1_stale_ || lost_touched_ ||
         std::ranges::any_of(copies_, [](const auto& item) { return item.second.has_work(); });
}

// ---- What is written

std::pmr::vector<std::uint32_t>::const_iterator
TableFollower::first_table(const ByteRange& range) const noexcept {
  if (!header_ || lost_)
    return by_offset_.end();
  const std::uint64_t size = header_->cluster_size();
  return std::partition_point(by_offset_.begin(), by_offset_.end(), [&](std::uint32_t index) {
    return l1_[index] + size <= range.begin;
  });
}

template <typename Function>
void TableFollower::for_each_table(const ByteRange& range, Function function) const {
  for (auto it = first_table(range); it != by_offset_.end() && l1_[*it] < range.end; ++it)
    function(*it);
}

std::optional<std::uint32_t>
TableFollower::unread_in(const ByteRange& range,
                         std::optional<std::uint32_t> before) const noexcept {
  auto it = first_table(range);
  if (before && has_table(*before) && it != by_offset_.end() && !is_before(*before, *it))
    it = std::partition_point(it, by_offset_.end(),
                              [&](std::uint32_t index) { return !is_before(*before, index); });
  for (; it != by_offset_.end() && l1_[*it] < range.end; ++it) {
    if (is_unread(*it))
      return *it;
  }
  return std::nullopt;
}

bool TableFollower::is_table(const ByteRange& range) const noexcept {
  const auto first = first_table(range);
  return range.overlaps(l1_range()) || (first != by_offset_.end() && l1_[*first] < range.end);
}

/// `entry_at` gives the entry that begins at an offset in the file; nothing: no entry is known.
void TableFollower::write_tables(const ByteRange& range, const EntryAt& entry_at) noexcept {
  lost_touched_ = lost_touched_ || lost_;
  forget_replaced(range);
  try {
    for_each_table(range, [&](std::uint32_t index) {
      Copy& copy = make_copy(index);
      const std::uint64_t offset = l1_[index];
      const std::uint64_t entry_size = header_->l2_entry_size();
      const ByteRange part = range.intersection({offset, offset + header_->cluster_size()});
      const bool whole_entries = part.begin % entry_size == 0 && part.end % entry_size == 0;
      if (copy.stale || copy.entries.empty() || !whole_entries || !entry_at) {
        copy.stale = true;
        copy.touched = true;
        named_[index] = {};
        return;
      }
      for (std::uint64_t at = part.begin; at < part.end; at += entry_size) {
        const std::uint64_t value = entry_at(at);
        if (is_compressed(value))
          named_[index].extend(compressed_cluster(value, *header_));
        apply(copy, static_cast<std::uint32_t>((at - offset) / entry_size), value);
      }
      any_checked_ = true;
    });
  } catch (const std::bad_alloc&) {
    lose();
  }
}

void TableFollower::note_zeros(const ByteRange& range, bool zeros) noexcept {
  try {
    if (zeros)
      zeros_.add(range);
    else
      zeros_.remove(range);
    if (zeros_.count() > most_zero_ranges)
      zeros_.clear();
  } catch (const std::bad_alloc&) {
    zeros_.clear();
  }
}

void TableFollower::wrote(std::uint64_t offset, std::span<const std::byte> data) noexcept {
  const ByteRange range{offset, offset + data.size()};
  note_zeros(range, all_zeros(data));
  write_tables(range, EntryAt([&](std::uint64_t at) {
                 return big_endian<std::uint64_t>(data, at - offset);
               }));
  const ByteRange l1 = range.intersection(l1_range());
  if (l1.empty())
    return;
  const bool whole_entries = l1.begin % l1_entry_size == 0 && l1.end % l1_entry_size == 0;
  if (l1_stale_ || !whole_entries) {
    l1_stale_ = !lost_;
    l1_touched_ = true;
    return;
  }
  l1_entries(static_cast<std::uint32_t>((l1.begin - header_->l1.offset) / l1_entry_size),
             data.subspan(l1.begin - offset, l1.size()), false);
}

void TableFollower::zeroed(const ByteRange& range) noexcept {
  note_zeros(range, true);
  write_tables(range, EntryAt([](std::uint64_t /*at*/) { return std::uint64_t{0}; }));
  if (range.overlaps(l1_range())) {
    l1_stale_ = !lost_;
    l1_touched_ = true;
  }
}

void TableFollower::changed(const ByteRange& range) noexcept {
  note_zeros(range, false);
  write_tables(range, EntryAt());
  if (range.overlaps(l1_range())) {
    l1_stale_ = !lost_;
    l1_touched_ = true;
  }
}

} // namespace qcowcache::qcow2
