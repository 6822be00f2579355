// The part of WriteCache that sees to it that there is room on storage for what it acknowledges:
// asks for it before, and gives back what nobody needed.

#include "write_cache.hpp"

#include <algorithm>
#include <cerrno>
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

/// What storage calls a hole that reads as zeros. Throws std::system_error.
ByteRanges holes_in(Storage& storage, const ByteRange& range) {
  ByteRanges holes;
  ByteRange rest = range;
  // Storage may say little at a time; what it has not spoken of counts as written.
  for (std::size_t answers = 0; !rest.empty() && answers < 4 * most_holes; ++answers) {
    for (const Storage::Extent& extent : storage.extents(rest, false)) {
      const ByteRange blocks = align_inward(extent.range, storage.capabilities().minimum);
      if (extent.type == Storage::ExtentType::hole_and_zero && !blocks.empty())
        holes.add(blocks);
      rest.begin = std::max(rest.begin, extent.range.end);
    }
    // Where the answer ends inside a block the block is asked about again, or not at all.
    rest.begin = align_up(rest.begin, storage.capabilities().minimum);
  }
  return holes;
}

/// Has storage allocate what are holes, without writing anything there. Throws std::system_error.
void allocate(Storage& storage, const ByteRanges& holes) {
  Storage::ZeroOptions options;
  options.fast = storage.capabilities().can_fast_zero;
  for (const ByteRange& hole : holes)
    storage.zero(hole, options);
}

/// The contrary. Whether it succeeds concerns nobody but the owner of the disk.
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

/// Whether there is room for as much of a unit as this connection sees of the export.
bool WriteCache::has_room(const Lock& /*lock*/, const Storage& storage,
                          const ByteRange& unit) const noexcept {
  return room_.has(unit.intersection({0, storage.capabilities().size}));
}

/// Whether a client's write to `unit` finds room on storage, or nobody can tell. Waits for who asks
/// already.
bool WriteCache::reserve(Storage& storage, const ByteRange& unit) {
  constexpr std::chrono::milliseconds between_questions{50};
  Lock lock(mutex_);
  while (asks_for_room_) {
    room_answered_.wait_for(lock, between_questions);
    lock.unlock();
    stay_connected();
    lock.lock();
  }
  if (has_room(lock, storage, unit) || is_guest(storage))
    return true;
  asks_for_room_ = true;
  lock.unlock();
  const Asking asking(*this);
  return reserve_in_turn(storage, unit);
}

bool WriteCache::reserve_in_turn(Storage& storage, const ByteRange& unit) {
  try {
    return ask_for_room(storage, unit);
  } catch (const std::system_error& refusal) {
    // It cannot do this, whatever else it can do.
    const Lock lock(mutex_);
    room_.give_up();
    tell(settings_.events.decision,
         [&] { return std::string("storage cannot reserve room: ") + refusal.what(); });
    return true;
  } catch (const std::bad_alloc&) {
    return false; // going through takes less
  }
}

/// Throws what storage says, but for a lack of room.
bool WriteCache::ask_for_room(Storage& storage, const ByteRange& unit) {
  const Capabilities& capabilities = storage.capabilities();
  if (!capabilities.can_zero || !capabilities.can_extents || capabilities.maximum < least_at_once)
    throw std::system_error(ENOTSUP, std::generic_category(), "large zeros, and extents");
  bool one_unit = false;
  for (;;) {
    ByteRange window = unit.intersection({0, capabilities.size});
    bool proven = false;
    std::uint64_t forgotten = 0;
    {
      const Lock lock(mutex_);
      forgotten = forgotten_;
      proven = room_.proven();
      if (!one_unit)
        window = room_.window(unit, capabilities.size);
    }
    const bool least = window.size() <= unit.size();
    const RangeLock::Owned owned = ranges_.own(window);
    if (settings_.alone && !settings_.alone())
      throw std::system_error(ENOTSUP, std::generic_category(), "others use another cache");
    ByteRanges holes = holes_in(storage, window);
    {
      const Lock lock(mutex_);
      holes.remove(room_.known_in(window));
    }
    if (!least && holes.count() > most_holes) {
      one_unit = true;
      continue;
    }
    try {
      if (!proven && !holes.empty())
        prove_room(storage, {holes.begin()->begin, holes.begin()->begin + unit.size()}, holes);
      allocate(storage, holes);
    } catch (const std::system_error& refusal) {
      if (!no_room(refusal.code()))
        throw;
      // Some of it may have been allocated, which others need now.
      deallocate(storage, holes);
      const Lock lock(mutex_);
      room_.smaller(unit.size());
      if (!least)
        continue;
      settings_.counters->add_guarded(Count::refused_reservations);
      return false;
    }
    const Lock lock(mutex_);
    if (forgotten != forgotten_)
      return true; // another disk has taken this one's place: whoever writes to it asks again
    for (const ByteRange& hole : holes) {
      room_.reserved(hole);
      zero_map_.zeroed(hole);
    }
    room_.found(window);
    if (!holes.empty()) {
      room_.larger();
      settings_.counters->add_guarded(Count::reservations);
      settings_.counters->add_guarded(Count::reserved_bytes, holes.bytes());
    }
    return true;
  }
}

/// Has storage allocate a little, `first` as far as it is in `holes`, and looks whether that is a
/// hole still: or else storage has written zeros there, and would do so with all.
void WriteCache::prove_room(Storage& storage, const ByteRange& first, const ByteRanges& holes) {
  const ByteRanges little = holes.inside(first);
  allocate(storage, little);
  if (holes_in(storage, little.hull()) != little)
    throw std::system_error(ENOTSUP, std::generic_category(), "it writes zeros");
  const Lock lock(mutex_);
  room_.prove();
}

/// Clients will come to that window soon. Returns whether there was one to see to.
bool WriteCache::reserve_ahead() noexcept {
  Next described;
  ByteRange unit;
  {
    const Lock lock(mutex_);
    const std::optional<ByteRange> next = std::exchange(next_window_, std::nullopt);
    if (!next || asks_for_room_)
      return false;
    described.range = *next;
    described.dirty_end = next->end;
    unit = {next->begin, next->begin + unit_size_};
    asks_for_room_ = true;
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
  if (!room_.asks())
    return;
  room_.gone(range);
  for (auto it = first_overlapping(lock, range); it != units_.end() && it->first < range.end; ++it)
    it->second.has_room = false;
}

bool WriteCache::has_reserved() const {
  const Lock lock(mutex_);
  return room_.has_reserved();
}

void WriteCache::give_back_room(Storage& storage) {
  ByteRanges back;
  {
    Lock lock(mutex_);
    room_answered_.wait(lock, [this] { return !asks_for_room_; });
    next_window_.reset();
    if (is_guest(storage) || !room_.has_reserved())
      return;
    asks_for_room_ = true; // whoever comes meanwhile asks after this
  }
  const Asking asking(*this);
  {
    const Lock lock(mutex_);
    ByteRanges unclean;
    for_each_unclean(lock, [&](const Unit& unit) { unclean.add(unit.range()); });
    back = room_.give_back(unclean);
    for (const ByteRange& range : back)
      lose_room(lock, range);
  }
  for (const ByteRange& range : back) {
    for (ByteRange rest = range.intersection({0, storage.capabilities().size}); !rest.empty();) {
      const ByteRange piece{rest.begin, std::min(rest.end, rest.begin + most_at_once)};
      const RangeLock::Owned owned = ranges_.own(piece);
      deallocate(storage, holes_in(storage, piece));
      changed_on_storage(piece);
      rest.begin = piece.end;
    }
  }
}

} // namespace qcowcache
