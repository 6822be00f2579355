// The part of WriteCache that sees to it that there is room on storage for what it acknowledges:
// asks for it before, and gives back what nobody needed.

#include "cache/write_cache.hpp"

#include "verify/qcow2/header.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <exception>
#include <new>
#include <system_error>
#include <utility>
#include <vector>

namespace qcowcache {

namespace {

/// Of what is given back so much is owned at a time: others may wait for it.
constexpr std::uint64_t most_at_once = std::uint64_t{32} * 1024 * 1024;
/// Who takes less at once is not asked: it would be many requests.
constexpr std::uint64_t least_at_once = std::uint64_t{1024} * 1024;
/// In so many pieces nobody reserves a window.
constexpr std::size_t most_holes = 16;
/// So long a window may keep those waiting that own parts of it, and those that came after it.
constexpr std::chrono::milliseconds window_patience{100};

struct Holes {
  /// What storage calls a hole that reads as zeros.
  ByteRanges ranges;
  /// So far it has spoken.
  std::uint64_t end = 0;
};

/// Throws std::system_error.
Holes holes_in(Storage& storage, const ByteRange& range) {
  Holes holes;
  ByteRange rest = range;
  // Storage may say little at a time.
  for (std::size_t answers = 0; !rest.empty() && answers < 4 * most_holes; ++answers) {
    for (const Storage::Extent& extent : storage.extents(rest, false)) {
      const ByteRange blocks = align_inward(extent.range, storage.capabilities().minimum);
      if (extent.type == Storage::ExtentType::hole_and_zero && !blocks.empty())
        holes.ranges.add(blocks);
      rest.begin = std::max(rest.begin, extent.range.end);
    }
    // Where the answer ends inside a block the block is asked about again, or not at all.
    rest.begin = align_up(rest.begin, storage.capabilities().minimum);
  }
  holes.end = std::min(rest.begin, range.end);
  return holes;
}

/// Storage that says so will say so again.
bool cannot(const std::error_code& error) {
  constexpr std::array answers{std::errc::not_supported, std::errc::operation_not_supported,
                               std::errc::function_not_supported, std::errc::invalid_argument,
                               std::errc::operation_not_permitted};
  return std::ranges::any_of(answers, [&](std::errc answer) { return error == answer; });
}

/// Makes holes of what was allocated and not written. Whether it succeeds concerns nobody but the
/// owner of the disk.
void deallocate(Storage& storage, const ByteRanges& holes) noexcept {
  Storage::ZeroOptions options;
  options.may_trim = true; // a trim might leave anything there
  try {
    for (const ByteRange& hole : holes)
      storage.zero(hole, options);
  } catch (const std::exception&) {
    // It stays allocated, and reads as zeros.
  }
}

} // namespace

/// Who asks storage for room; nobody else does meanwhile.
class WriteCache::Asking {
public:
  explicit Asking(WriteCache& cache) noexcept : cache_(cache) {}
  Asking(const Asking&) = delete;
  Asking& operator=(const Asking&) = delete;
  ~Asking() {
    const Lock lock(cache_.mutex_);
    cache_.asks_for_room_ = false;
    cache_.room_answered_.notify_all();
  }

private:
  WriteCache& cache_;
};

/// Nobody else does until `Asking` ends. REQUIRES: nobody does.
void WriteCache::asks_for_room(const Lock& /*lock*/) noexcept {
  asks_for_room_ = true;
  asks_since_ = Room::Clock::now();
}

/// Whether there is room for as much of a unit as this connection sees of the export.
bool WriteCache::has_room(const Lock& /*lock*/, const Storage& storage,
                          const ByteRange& unit) const noexcept {
  return room_.has(unit.intersection({0, storage.capabilities().size}));
}

/// A new image's header goes through, and the image follows: with room for its beginning before
/// anything is there a filesystem keeps it in one piece.
bool WriteCache::begins_without_room(const Storage& storage, std::uint64_t offset,
                                     std::span<const std::byte> data) const {
  if (offset != 0 || data.size() < qcow2::header_bytes ||
      !qcow2::parse_header(data.first(qcow2::header_bytes)))
    return false;
  const Lock lock(mutex_);
  return budget_.allows_two(unit_size_, bookkeeping()) && !has_room(lock, storage, {0, unit_size_});
}

/// Whether a client's write to `unit` finds room on storage, or nobody can tell. Waits for who asks
/// already, but not for ever, nor does each write wait anew: his storage may hang.
bool WriteCache::reserve(Storage& storage, const ByteRange& unit) {
  constexpr std::chrono::milliseconds between_questions{50};
  Lock lock(mutex_);
  while (asks_for_room_) {
    if (Room::Clock::now() - asks_since_ >= settings_.patience)
      return false;
    room_answered_.wait_for(lock, between_questions);
    lock.unlock();
    stay_connected();
    lock.lock();
  }
  if (has_room(lock, storage, unit) || is_guest(storage))
    return true;
  asks_for_room(lock);
  lock.unlock();
  const Asking asking(*this);
  return reserve_in_turn(storage, unit);
}

bool WriteCache::reserve_in_turn(Storage& storage, const ByteRange& unit) {
  std::uint64_t forgotten = 0;
  {
    const Lock lock(mutex_);
    forgotten = forgotten_;
  }
  try {
    return ask_for_room(storage, unit, forgotten);
  } catch (const std::system_error& refusal) {
    const Lock lock(mutex_);
    if (!still_sees(lock, storage, forgotten))
      return true;
    if (cannot(refusal.code()))
      room_.give_up(); // whatever else it can do
    else
      room_.pause(Room::Clock::now() + settings_.retry);
    tell(settings_.events.decision,
         [&] { return std::string("storage cannot reserve room: ") + refusal.what(); });
    return true;
  } catch (const std::bad_alloc&) {
    return false; // going through takes less
  }
}

/// Whether `storage` is the disk that the cache is about, as it was when so much had been
/// forgotten. Another one may have taken its place meanwhile: whoever writes to that asks again.
bool WriteCache::still_sees(const Lock& /*lock*/, const Storage& storage,
                            std::uint64_t forgotten) const noexcept {
  return forgotten == forgotten_ && !is_guest(storage);
}

/// What is in memory and needs room on storage.
ByteRanges WriteCache::owed_in(const Lock& lock, const ByteRange& range) {
  ByteRanges owed;
  for (auto it = first_overlapping(lock, range); it != units_.end() && it->first < range.end; ++it)
    if (!it->second.clean())
      owed.add(it->second.range());
  return owed;
}

/// Throws what storage says, but for a lack of room.
bool WriteCache::ask_for_room(Storage& storage, const ByteRange& unit, std::uint64_t forgotten) {
  const Capabilities& capabilities = storage.capabilities();
  if (!capabilities.can_zero || !capabilities.can_extents || capabilities.maximum < least_at_once)
    throw std::system_error(ENOTSUP, std::generic_category(), "large zeros, and extents");
  const ByteRange whole = unit.intersection({0, capabilities.size});
  bool one_unit = false;
  bool from_unit = false;
  for (;;) {
    ByteRange window = whole;
    {
      const Lock lock(mutex_);
      if (!still_sees(lock, storage, forgotten))
        return true;
      if (!one_unit)
        window = room_.window(unit, capabilities.size);
      if (from_unit)
        window.begin = whole.begin;
    }
    const bool least = window.size() <= unit.size();
    const std::optional<RangeLock::Owned> owned = ranges_.own_until(
        window, Room::Clock::now() + (least ? settings_.patience : window_patience));
    if (!owned && least)
      return false;
    if (!owned) { // somebody takes long: in a smaller one he may not be
      const Lock lock(mutex_);
      room_.smaller(unit.size());
      continue;
    }
    if (settings_.alone && !settings_.alone())
      throw std::system_error(EBUSY, std::generic_category(), "others use another cache");
    Holes holes = holes_in(storage, window);
    if (holes.end < whole.end && !std::exchange(from_unit, true))
      continue; // storage did not come so far
    // Of a unit of which it does not speak nobody can tell.
    window.end = std::max(holes.end, whole.end);
    {
      const Lock lock(mutex_);
      holes.ranges.remove(room_.known_in(window));
    }
    if (!least && holes.ranges.count() > most_holes) {
      one_unit = true;
      continue;
    }
    try {
      allocate_proven(storage, holes.ranges, unit.size(), forgotten);
    } catch (const std::system_error& refusal) {
      if (!no_room(refusal.code()))
        throw;
      {
        const Lock lock(mutex_);
        holes.ranges.remove(owed_in(lock, window));
      }
      // Some of it may have been allocated, which others need now.
      deallocate(storage, holes.ranges);
      const Lock lock(mutex_);
      if (!still_sees(lock, storage, forgotten))
        return true;
      room_.smaller(unit.size());
      if (!least)
        continue;
      settings_.counters->add(Count::refused_reservations);
      return false;
    }
    const Lock lock(mutex_);
    if (!still_sees(lock, storage, forgotten))
      return true;
    for (const ByteRange& hole : holes.ranges) {
      room_.reserved(hole);
      zero_map_.zeroed(hole);
    }
    room_.found(window);
    if (!holes.ranges.empty()) {
      room_.larger();
      settings_.counters->add(Count::reservations);
      settings_.counters->add(Count::reserved_bytes, holes.ranges.bytes());
    }
    return true;
  }
}

/// Has storage allocate `holes`: a little first where nobody knows yet whether that is a hole still
/// then, or else storage writes zeros there, and would do so with all.
void WriteCache::allocate_proven(Storage& storage, ByteRanges holes, std::uint64_t unit,
                                 std::uint64_t forgotten) {
  bool proven = false;
  {
    const Lock lock(mutex_);
    proven = room_.proven();
  }
  if (!proven && !holes.empty()) {
    const std::uint64_t begin = holes.hull().begin;
    const ByteRanges little = holes.inside({begin, begin + std::max(unit, Room::beginning)});
    Storage::ZeroOptions options;
    options.fast = storage.capabilities().can_fast_zero;
    for (const ByteRange& hole : little)
      storage.zero(hole, options);
    ByteRanges still = holes_in(storage, little.hull()).ranges;
    {
      const Lock lock(mutex_);
      still.remove(room_.known_in(little.hull())); // what clients zeroed may look like a hole, too
    }
    if (still != little)
      throw std::system_error(ENOTSUP, std::generic_category(), "it writes zeros");
    holes.remove(little);
    const Lock lock(mutex_);
    if (still_sees(lock, storage, forgotten))
      room_.prove();
  }
  for (const ByteRange& hole : holes)
    storage.allocate(hole);
}

/// Clients will come to that unit soon. Returns whether there was one to see to.
bool WriteCache::reserve_ahead() noexcept {
  Next described;
  ByteRange unit;
  {
    const Lock lock(mutex_);
    const std::optional<ByteRange> next = std::exchange(next_to_reserve_, std::nullopt);
    if (!next || asks_for_room_)
      return false;
    described.range = *next;
    described.dirty_end = next->end;
    unit = {next->begin, next->begin + unit_size_};
    asks_for_room(lock);
  }
  const Asking asking(*this);
  try {
    const std::optional<Handle::Use> use = settings_.lend(described);
    if (use && !is_guest(use->storage()))
      static_cast<void>(reserve_in_turn(use->storage(), unit));
  } catch (const std::exception&) {
    // Whoever comes to it asks for it himself.
  }
  return true;
}

/// The room in `range` may be gone: somebody trimmed it, or may have.
void WriteCache::lose_room(const Lock& lock, const ByteRange& range) noexcept {
  room_.gone(range);
  for (auto it = first_overlapping(lock, range); it != units_.end() && it->first < range.end; ++it)
    it->second.has_room = false;
}

bool WriteCache::may_have_reserved() const {
  const Lock lock(mutex_);
  return !room_.reserved().empty() || asks_for_room_ || next_to_reserve_;
}

void WriteCache::give_back_room(Storage& storage) {
  ByteRanges back;
  std::uint64_t forgotten = 0;
  {
    Lock lock(mutex_);
    next_to_reserve_.reset();
    if (!room_answered_.wait_for(lock, settings_.patience, [this] { return !asks_for_room_; }))
      return;
    if (is_guest(storage) || room_.reserved().empty())
      return;
    back = room_.reserved();
    forgotten = forgotten_;
    asks_for_room(lock); // whoever comes meanwhile asks after this
  }
  const Asking asking(*this);
  for (const ByteRange& range : back) {
    for (ByteRange rest = range.intersection({0, storage.capabilities().size}); !rest.empty();) {
      const ByteRange piece{rest.begin, std::min(rest.end, rest.begin + most_at_once)};
      give_back_room(storage, piece, forgotten);
      rest.begin = piece.end;
    }
  }
  // A filesystem may use it for what follows only when it has been told to keep what there is. An
  // error must not be for bytes that a client is still to hear of: storage may say it only once.
  std::shared_ptr<GroupFlush> flushes;
  {
    const Lock lock(mutex_);
    if (!all_flushed(lock))
      return;
    flushes = flushes_;
  }
  flushes->flush(storage, false, std::nullopt, {});
}

/// Throws storage's error.
void WriteCache::give_back_room(Storage& storage, const ByteRange& piece, std::uint64_t forgotten) {
  const auto owned = ranges_.own_until(piece, Room::Clock::now() + settings_.patience);
  if (!owned)
    return; // it stays reserved
  // Where others have another cache their bytes may look like a hole.
  if (settings_.alone && !settings_.alone())
    return;
  const ByteRanges holes = holes_in(storage, piece).ranges;
  ByteRanges unused;
  {
    const Lock lock(mutex_);
    if (!still_sees(lock, storage, forgotten))
      return;
    unused = room_.reserved_in(piece); // clients may have come to some of it meanwhile
    unused.remove(owed_in(lock, piece));
    ByteRanges back;
    for (const ByteRange& range : unused) {
      back.add(holes.inside(range));
      lose_room(lock, range);
    }
    unused = std::move(back);
  }
  deallocate(storage, unused);
  changed_on_storage(piece);
}

} // namespace qcowcache
