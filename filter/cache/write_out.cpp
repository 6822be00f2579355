// The part of WriteCache that writes units to storage: who writes which, what has to be read first,
// and what follows from storage's answer.

#include "cache/write_cache.hpp"

#include "storage/readback_storage.hpp"

#include <algorithm>
#include <cerrno>
#include <exception>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace qcowcache {

namespace {

/// Known bytes between two pieces of a unit are written along when they are no more than this:
/// rewriting what storage has costs less than another request.
constexpr std::uint64_t worth_writing_over = std::uint64_t{16} * 1024;

} // namespace

/// A range of whole blocks that goes out in one piece, and the buffer that it goes out from.
struct WriteCache::Segment {
  Unit* unit = nullptr;
  std::shared_ptr<Unit::Buffer> snapshot;
  ByteRange range;
  /// What has to be read from storage before; empty: nothing.
  ByteRange hole;

  [[nodiscard]] std::span<const std::byte> bytes() const noexcept {
    return snapshot->bytes().subspan(range.begin - unit->range().begin, range.size());
  }
};

/// Ends the writers' turn at the units of a job, whatever happens: as refused unless told
/// otherwise.
class WriteCache::Claim {
public:
  Claim(WriteCache& cache, const Job& job) noexcept : cache_(cache), job_(job) {}
  Claim(const Claim&) = delete;
  Claim& operator=(const Claim&) = delete;
  ~Claim() { cache_.finish(job_, stored_, refusal_); }

  void stored() noexcept { stored_ = true; }
  void refused(const std::error_code& refusal) noexcept { refusal_ = refusal; }

private:
  WriteCache& cache_;
  const Job& job_;
  bool stored_ = false;
  std::error_code refusal_;
};

bool WriteCache::within_reach(const Lock& /*lock*/, const Unit& unit,
                              const Storage& storage) const {
  // A connection may see a smaller export than the one that wrote, or another disk, or not be
  // allowed to write.
  const Capabilities& capabilities = storage.capabilities();
  return capabilities.can_write && unit.dirty().hull().end <= capabilities.size &&
         !is_guest(storage);
}

/// Several units are worth one write only where storage gets it as one.
std::uint64_t WriteCache::largest_merged(const Storage& storage) const noexcept {
  return std::min<std::uint64_t>(settings_.max_write, storage.capabilities().maximum);
}

WriteCache::Job WriteCache::claim(const Lock& lock, Unit& unit, const Storage& storage) {
  const std::uint64_t most = std::max<std::uint64_t>(1, largest_merged(storage) / unit_size_);
  const auto joins = [&](Units::iterator it, std::uint64_t begin) {
    return it != units_.end() && it->first == begin && it->second.turn == Unit::Turn::queued &&
           it->second.full(size_) && within_reach(lock, it->second, storage);
  };
  auto first = units_.find(unit.range().begin);
  auto last = first;
  std::uint64_t count = 1;
  if (unit.full(size_)) {
    while (count < most && first != units_.begin() &&
           joins(std::prev(first), first->first - unit_size_)) {
      --first;
      ++count;
    }
    while (count < most && joins(std::next(last), last->first + unit_size_)) {
      ++last;
      ++count;
    }
  }
  Job job;
  job.reserve(count);
  for (auto it = first; job.size() < count; ++it)
    job.push_back(&it->second);
  for (Unit* claimed : job) {
    leave_queue(lock, *claimed, Unit::Turn::claimed);
    place(lock, *claimed);
  }
  budget_.write_began(account_);
  rate_.began(Unit::Clock::now());
  ++jobs_;
  return job;
}

Unit* WriteCache::find(const Lock& /*lock*/, std::uint64_t begin) {
  const auto found = units_.find(begin);
  return found == units_.end() ? nullptr : &found->second;
}

WriteCache::Next WriteCache::describe(const Lock& /*lock*/, const Unit& unit) {
  return {unit.last_writer, unit.range(), unit.dirty().hull().end, unit.was_refused};
}

/// Whether it is for this connection to see that the unit is written when it ends: it wrote to it,
/// or nobody is left who did.
bool WriteCache::wrote(const Lock& /*lock*/, const Storage& storage, const Unit& unit) const {
  return unit.last_writer == &storage || unit.several_writers ||
         std::ranges::find(users_, unit.last_writer) == users_.end();
}

/// Storage will not take the unit now: it stays, and goes behind all others.
void WriteCache::refuse(const Lock& lock, Unit& unit) noexcept {
  unit.refused();
  no_trust_ = true;
  unit.touched = Unit::Clock::now();
  refused_at_ = unit.touched;
  unit.completed_before = units_completed_;
  place(lock, unit);
}

/// What storage has said of one unit it would say of all that wait.
void WriteCache::give_up_queue(const Lock& lock) noexcept {
  while (!queue_.empty()) {
    Unit& unit = queue_.front();
    leave_queue(lock, unit, Unit::Turn::none);
    refuse(lock, unit);
  }
}

/// The lock is released meanwhile.
std::optional<Handle::Use> WriteCache::borrow(Lock& lock, const Unit& unit) const {
  const Next next = describe(lock, unit);
  lock.unlock();
  std::optional<Handle::Use> use = settings_.lend(next);
  lock.lock();
  return use;
}

/// Has the unit that begins there written out: to `own` where that wrote to it last, or is all that
/// there is, or else to whom `Settings::lend` names. The lock is released meanwhile.
WriteCache::Attempt WriteCache::write_unit(Lock& lock, std::uint64_t begin, Storage* own,
                                           Unit::Reason reason, std::uint64_t attempt,
                                           std::error_code* refusal) {
  const auto ready = [&]() -> Unit* {
    Unit* const found = find(lock, begin);
    const bool waits = found != nullptr && found->turn != Unit::Turn::claimed;
    return waits && !found->dirty().empty() ? found : nullptr;
  };
  Unit* unit = ready();
  if (unit == nullptr)
    return Attempt::gone;
  const bool is_own = own != nullptr && unit->last_writer == own && within_reach(lock, *unit, *own);
  const bool lends = settings_.lend && !is_own;
  const std::optional<Handle::Use> lent = lends ? borrow(lock, *unit) : std::nullopt;
  Storage* const storage = lends ? (lent ? &lent->storage() : nullptr) : own;
  unit = ready();
  // Who has become a guest meanwhile was lent for what is on storage by now.
  if (unit == nullptr || (lent && is_guest(*storage)))
    return Attempt::gone;
  if (storage == nullptr || !within_reach(lock, *unit, *storage))
    return Attempt::nobody;
  if (unit->turn == Unit::Turn::none)
    unit->reason = reason;
  const Job job = claim(lock, *unit, *storage);
  // Once written out, a unit may be gone.
  const ByteRange claimed{job.front()->range().begin, job.back()->range().end};
  const std::uint64_t step = job.front()->range().size();
  lock.unlock();
  std::error_code error;
  try {
    write_out(*storage, job);
  } catch (const std::system_error& refused) {
    error = refused.code();
  } catch (...) {
    lock.lock();
    throw;
  }
  lock.lock();
  if (!error)
    return Attempt::stored;
  for (std::uint64_t each = claimed.begin; each < claimed.end; each += step) {
    if (Unit* const refused = find(lock, each))
      refused->tried_in = attempt;
  }
  if (refusal != nullptr)
    *refusal = error;
  return Attempt::refused;
}

bool WriteCache::write_next(Storage& storage) {
  Lock lock(mutex_);
  // Behind those that nobody can reach now.
  const auto unit = std::find_if(queue_.begin(), queue_.end(), [&](const Unit& waiting) {
    return settings_.lend || within_reach(lock, waiting, storage);
  });
  if (unit == queue_.end())
    return false;
  const std::uint64_t begin = unit->range().begin; // the unit may be gone, and another one there
  const Attempt attempt = write_unit(lock, begin, &storage, unit->reason);
  if (attempt == Attempt::nobody)
    give_up(lock, begin);
  return attempt != Attempt::nobody;
}

void WriteCache::write_next() {
  if (reserve_ahead())
    return;
  Lock lock(mutex_);
  if (queue_.empty())
    return;
  const std::uint64_t begin = queue_.front().range().begin;
  if (write_unit(lock, begin, nullptr, queue_.front().reason) == Attempt::nobody)
    give_up(lock, begin);
}

/// Nobody can write that unit now: it is treated as one that storage refused.
void WriteCache::give_up(const Lock& lock, std::uint64_t begin) noexcept {
  Unit* const unit = find(lock, begin);
  if (unit == nullptr || unit->turn != Unit::Turn::queued)
    return;
  leave_queue(lock, *unit, Unit::Turn::none);
  refuse(lock, *unit);
  note_progress(lock);
}

std::error_code WriteCache::write_owed(Storage& storage, Unit::Reason reason) {
  Lock lock(mutex_);
  if (is_guest(storage))
    return {}; // all that was acknowledged when its request came is on storage
  const std::uint64_t moment = moment_; // what is acknowledged later delays nobody
  const std::uint64_t attempt = ++attempts_;
  const auto owed = [&](const Unit& unit) {
    return unit.owes(moment) && (reason != Unit::Reason::disconnect || wrote(lock, storage, unit));
  };
  // Units that storage has not refused yet come first, so that every one gets its chance.
  Begins begins;
  for_each_unclean(lock, [&](const Unit& unit) {
    if (owed(unit))
      begins.push_back(unit.range().begin);
  });
  // Others may write them meanwhile.
  for (const std::uint64_t begin : begins) {
    if (Unit* const unit = find(lock, begin); !unit->was_refused && !no_room_)
      enqueue(lock, *unit, reason);
  }

  std::error_code error;
  bool out_of_reach = false;
  bool full = false;
  // Whatever others refuse or leave is tried here, in the thread that has to report the error: each
  // unit once, and none once storage has said that it is full.
  const auto settled = [&](std::uint64_t begin) {
    Unit* const unit = find(lock, begin);
    if (unit == nullptr || !owed(*unit))
      return true;
    if (unit->turn == Unit::Turn::claimed)
      return false;
    if (full || unit->tried_in == attempt)
      return true;
    std::error_code refusal;
    switch (write_unit(lock, begin, &storage, reason, attempt, &refusal)) {
    case Attempt::gone:
      return false;
    case Attempt::nobody:
      out_of_reach = true;
      return true;
    case Attempt::refused:
      error = error ? error : refusal;
      full = full || no_room(refusal);
      return true;
    case Attempt::stored:
      break;
    }
    return true;
  };
  while (!begins.empty()) {
    const std::uint64_t seen = progressed_; // the lock is released in between
    std::erase_if(begins, settled);
    if (!begins.empty())
      progress_.wait(lock, [&] { return progressed_ != seen; });
  }
  tell_written(lock, reason);
  // Storage's own answer says more than that there was nobody to ask.
  return out_of_reach && !error ? std::error_code(EIO, std::generic_category()) : error;
}

void WriteCache::write_out(Storage& storage, const Job& job) {
  // Declared first: the claim has to end while the range is still owned.
  std::optional<RangeLock::Owned> owned;
  Claim claim(*this, job);
  try {
    write_claimed(storage, job, owned);
  } catch (const std::system_error& refusal) {
    claim.refused(refusal.code());
    throw;
  }
  claim.stored();
}

void WriteCache::write_claimed(Storage& storage, const Job& job,
                               std::optional<RangeLock::Owned>& owned) {
  const ByteRange whole{job.front()->range().begin, job.back()->range().end};
  const ByteRange within = whole.intersection({0, storage.capabilities().size});
  if (has_gaps(job, within))
    learn_zeros(storage, within);

  owned.emplace(ranges_.own(whole));
  const auto begun = Unit::Clock::now();
  std::uint64_t spared = 0;
  Segments segments = start(storage, job, spared);
  std::uint64_t requests = 0;
  for (Segment& segment : segments) {
    requests += segment.hole.empty() ? 0 : 1;
    fill_up(storage, segment);
  }
  try {
    requests += write_segments(storage, segments);
  } catch (const NotAsWritten& refusal) {
    owe_again(segments);
    tell_refusal(whole, refusal);
    throw;
  } catch (const std::exception& refusal) {
    for (const Segment& segment : segments)
      failed_on_storage(segment.range);
    tell_refusal(whole, refusal);
    throw;
  }
  {
    const Lock lock(mutex_);
    for (const Segment& segment : segments) {
      zero_map_.changed(segment.range);
      room_.wrote(segment.range);
      witnesses_.wrote(segment.range, segment.bytes(), begun);
    }
    savings_.wrote(spared, requests);
  }
  for (const Segment& segment : segments)
    changed_on_storage(segment.range);
}

/// Bytes that were written along with dirty ones may be what storage damaged, and nobody else has
/// them: a fill-up read would take the damage for the truth.
void WriteCache::owe_again(const Segments& segments) {
  {
    const Lock lock(mutex_);
    for (const Segment& segment : segments)
      segment.unit->owe_in_flight(segment.range);
  }
  for (const Segment& segment : segments)
    failed_on_storage(segment.range);
}

bool WriteCache::has_gaps(const Job& job, const ByteRange& within) const {
  const Lock lock(mutex_);
  return std::any_of(job.begin(), job.end(), [&](const Unit* unit) {
    return !unit->known().contains(unit->range().intersection(within));
  });
}

/// Adds to `spared` what storage would have been asked for without the cache.
WriteCache::Segments WriteCache::start(Storage& storage, const Job& job, std::uint64_t& spared) {
  const Capabilities& capabilities = storage.capabilities();
  const std::uint64_t alignment = capabilities.write_alignment();
  const std::uint64_t rewritten = capabilities.rewritten_block();
  const Lock lock(mutex_);
  Segments segments;
  for (Unit* unit : job) {
    // What storage would read and rewrite as a whole is completed here: once, whatever the number
    // of pieces, and then it is known. In a unit that is smaller at least the pieces are one.
    const bool has_whole = rewritten <= unit->range().size();
    const std::uint64_t written = has_whole ? rewritten : alignment;
    const ByteRange within = unit->range().intersection({0, capabilities.size});
    unit->written_whole = unit->full(size_);
    unit->started_whole = unit->written_whole;
    if (unit->was_refused)
      settings_.counters->add(Count::retries);
    if (unit->written_whole || unit->fragmented())
      unit->begin_anew();
    unit->start_writing(within);
    spared += std::exchange(unit->spared, 0);

    ByteRanges blocks;
    for (const ByteRange& range : unit->in_flight()) {
      const ByteRange extended = align_outward(range, written).intersection(within);
      const ByteRange gap{blocks.hull().end, extended.begin};
      if (!blocks.empty() && gap.size() <= worth_writing_over && unit->known().contains(gap))
        blocks.add(gap);
      blocks.add(extended);
    }
    if (!has_whole)
      blocks.add(blocks.hull());
    for (const ByteRange& range : blocks) {
      for (const ByteRange& zeros : zero_map_.zeros_in(range))
        unit->learn_zeros(zeros);
      const ByteRange hole = unit->known().missing(range).hull();
      segments.push_back(
          {unit, unit->buffer(), range,
           hole.empty() ? hole : align_outward(hole, alignment).intersection(range)});
    }
  }
  return segments;
}

void WriteCache::fill_up(Storage& storage, Segment& segment) {
  if (segment.hole.empty())
    return;
  std::vector<std::byte> data(segment.hole.size());
  storage.read(segment.hole.begin, data);
  count_fill_up(segment.hole);
  const Lock lock(mutex_);
  segment.unit->learn(segment.hole.begin, data, segment.snapshot.get());
}

/// Returns how many requests it took.
std::size_t WriteCache::write_segments(Storage& storage, const Segments& segments) const {
  std::size_t requests = 0;
  std::vector<std::byte> merged;
  for (auto first = segments.begin(); first != segments.end();) {
    auto behind = first + 1;
    std::uint64_t size = first->range.size();
    while (behind != segments.end() && behind->range.begin == (behind - 1)->range.end &&
           size + behind->range.size() <= largest_merged(storage)) {
      size += behind->range.size();
      ++behind;
    }
    tell(settings_.events.trace, [&] {
      return "writing " + to_string({first->range.begin, (behind - 1)->range.end}) + " of " +
             std::to_string(behind - first) + (behind == first + 1 ? " unit" : " units");
    });
    if (behind == first + 1) {
      storage.write(first->range.begin, first->bytes(), false);
    } else {
      merged.clear();
      merged.reserve(size);
      for (auto segment = first; segment != behind; ++segment)
        merged.insert(merged.end(), segment->bytes().begin(), segment->bytes().end());
      storage.write(first->range.begin, merged, false);
      settings_.counters->add(Count::merged_writes);
    }
    first = behind;
    ++requests;
  }
  return requests;
}

void WriteCache::finish(const Job& job, bool stored, const std::error_code& refusal) noexcept {
  const Lock lock(mutex_);
  last_refusal_ = stored ? last_refusal_ : refusal;
  if (!stored && no_room(refusal)) {
    no_room_ = true;
    give_up_queue(lock); // these come before the units of the job: each has its turn
  }
  rate_.ended(Unit::Clock::now(), stored ? job.size() * job.front()->range().size() : 0);
  for (Unit* unit : job) {
    leave_queue(lock, *unit, Unit::Turn::none);
    const bool was_refused = unit->was_refused;
    if (stored) {
      count_written(lock, *unit);
      unit->stored();
      no_room_ = no_room_ && !was_refused;
    } else {
      refuse(lock, *unit);
    }
    const bool wanted = unit->full(size_) || !has_layout_ || wanted_unit_size_ != unit_size_;
    if (unit->clean()) {
      settle(lock, *unit);
    } else if (stored) {
      place(lock, *unit); // a client has written to it meanwhile
      if (wanted)
        enqueue(lock, *unit, Unit::Reason::new_layout);
    }
    if (stored && was_refused)
      queue_one_refused(lock);
  }
  --jobs_;
  trust_again(lock);
  budget_.write_ended(account_, stored);
  keep_writers_busy(lock);
  note_progress(lock);
}

/// A unit's turn has ended, or its dirty bytes went another way.
void WriteCache::note_progress(const Lock& /*lock*/) noexcept {
  ++progressed_;
  progress_.notify_all();
  budget_.note_change();
}

} // namespace qcowcache
