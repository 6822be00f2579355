// The part of WriteCache that writes units to storage: who writes which, what has to be read first,
// and what follows from storage's answer.

#include "write_cache.hpp"

#include "readback_storage.hpp"

#include <boost/container/flat_set.hpp>

#include <algorithm>
#include <cerrno>
#include <exception>
#include <optional>
#include <string>
#include <vector>

namespace qcowcache {

namespace {

/// Known bytes between two pieces of a unit are written along when they are no more than this:
/// rewriting what storage has costs less than another request.
constexpr std::uint64_t worth_writing_over = std::uint64_t{16} * 1024;

/// What storage that is full says of one unit it will most likely say of the next.
bool no_room(const std::error_code& error) {
  return error == std::errc::no_space_on_device || error.value() == EDQUOT;
}

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
  ~Claim() { cache_.finish(job_, stored_); }

  void stored() noexcept { stored_ = true; }

private:
  WriteCache& cache_;
  const Job& job_;
  bool stored_ = false;
};

bool WriteCache::within_reach(const Lock& /*lock*/, const Unit& unit, const Storage& storage) {
  // A connection may see a smaller export than the one that wrote, or not be allowed to write.
  const Capabilities& capabilities = storage.capabilities();
  return capabilities.can_write && unit.dirty().hull().end <= capabilities.size;
}

WriteCache::Job WriteCache::claim(const Lock& lock, Unit& unit, const Storage& storage) {
  const std::uint64_t most = std::max<std::uint64_t>(1, settings_.max_write / unit_size_);
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
  for (Unit* claimed : job)
    leave_queue(lock, *claimed, Unit::Turn::claimed);
  return job;
}

std::optional<WriteCache::Next> WriteCache::next() const {
  const Lock lock(mutex_);
  if (queue_.empty())
    return std::nullopt;
  const Unit& first = queue_.front();
  return Next{first.last_writer, first.range(), first.dirty().hull().end, first.was_refused};
}

void WriteCache::give_up(const Next& next) {
  const Lock lock(mutex_);
  const auto found = units_.find(next.range.begin);
  if (found == units_.end() || found->second.turn != Unit::Turn::queued)
    return;
  leave_queue(lock, found->second, Unit::Turn::none);
  refuse(lock, found->second);
  progress_.notify_all();
  budget_.note_change();
}

/// Storage will not take the unit now: it stays, and goes behind all others.
void WriteCache::refuse(const Lock& /*lock*/, Unit& unit) noexcept {
  unit.refused();
  unit.touched = Unit::Clock::now();
  refused_at_ = unit.touched;
  unit.completed_before = units_completed_;
  unit.hook.unlink();
  unclean_.push_back(unit);
}

bool WriteCache::write_next(Storage& storage) {
  Lock lock(mutex_);
  const auto unit = std::find_if(queue_.begin(), queue_.end(), [&](const Unit& waiting) {
    return within_reach(lock, waiting, storage);
  });
  if (unit == queue_.end())
    return false;
  const Job job = claim(lock, *unit, storage);
  lock.unlock();
  try {
    write_out(storage, job);
  } catch (const std::system_error&) {
    // The units are dirty again; a flush will tell the client.
  }
  return true;
}

std::error_code WriteCache::write_owed(Storage& storage, Unit::Reason reason) {
  Lock lock(mutex_);
  const std::uint64_t moment = moment_; // what is acknowledged later delays nobody
  for (Unit& unit : unclean_) {
    if (unit.owes(moment) && !unit.was_refused)
      enqueue(lock, unit, reason);
  }
  // Whatever others refuse or leave is tried here, in the thread that has to report the error: each
  // unit once.
  boost::container::flat_set<std::uint64_t> tried;
  std::error_code error;
  bool out_of_reach = false;
  bool full = false;
  for (;;) {
    // Units that storage has not refused yet come first, so that every one gets its chance.
    Unit* ready = nullptr;
    bool others_write = false;
    for (auto it = unclean_.begin();
         it != unclean_.end() && (ready == nullptr || ready->was_refused); ++it) {
      if (it->owes(moment) && !tried.contains(it->range().begin)) {
        // What this connection cannot reach a background writer may, through another one.
        const bool for_others = it->turn == Unit::Turn::queued && settings_.wake_writer &&
                                !within_reach(lock, *it, storage);
        if (it->turn == Unit::Turn::claimed || for_others)
          others_write = true;
        else if (!it->was_refused || (ready == nullptr && !full))
          ready = &*it;
      }
    }
    if (ready != nullptr && !within_reach(lock, *ready, storage)) {
      tried.insert(ready->range().begin);
      out_of_reach = true;
    } else if (ready != nullptr) {
      if (ready->turn == Unit::Turn::none)
        ready->reason = reason;
      const Job job = claim(lock, *ready, storage);
      // Once written out, a unit may be gone.
      const ByteRange claimed{job.front()->range().begin, job.back()->range().end};
      const std::uint64_t step = job.front()->range().size();
      lock.unlock();
      try {
        write_out(storage, job);
        lock.lock();
      } catch (const std::system_error& refusal) {
        lock.lock();
        for (std::uint64_t begin = claimed.begin; begin < claimed.end; begin += step)
          tried.insert(begin);
        error = error ? error : refusal.code();
        full = full || (reason == Unit::Reason::flush && no_room(refusal.code()));
      }
    } else if (others_write) {
      progress_.wait(lock);
    } else {
      tell_written(lock, reason);
      // Storage's own answer says more than that there was nobody to ask.
      return out_of_reach && !error ? std::error_code(EIO, std::generic_category()) : error;
    }
  }
}

void WriteCache::write_out(Storage& storage, const Job& job) {
  const ByteRange whole{job.front()->range().begin, job.back()->range().end};
  const ByteRange within = whole.intersection({0, storage.capabilities().size});
  // Declared first: the claim has to end while the range is still owned.
  std::optional<RangeLock::Owned> owned;
  Claim claim(*this, job);
  if (has_gaps(job, within))
    learn_zeros(storage, within);

  owned.emplace(ranges_.own(whole));
  Segments segments = start(storage, job);
  for (Segment& segment : segments)
    fill_up(storage, segment);
  try {
    write_segments(storage, segments);
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
    for (const Segment& segment : segments)
      zero_map_.changed(segment.range);
  }
  for (const Segment& segment : segments)
    changed_on_storage(segment.range);
  claim.stored();
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

WriteCache::Segments WriteCache::start(Storage& storage, const Job& job) {
  const Capabilities& capabilities = storage.capabilities();
  const std::uint64_t alignment = capabilities.write_alignment();
  const Lock lock(mutex_);
  Segments segments;
  for (Unit* unit : job) {
    const ByteRange within = unit->range().intersection({0, capabilities.size});
    unit->written_whole = unit->full(size_);
    unit->started_whole = unit->written_whole;
    if (unit->was_refused)
      settings_.counters->add_guarded(Count::retries);
    if (unit->written_whole || unit->fragmented())
      unit->begin_anew();
    unit->start_writing(within);

    ByteRanges blocks;
    for (const ByteRange& range : unit->in_flight()) {
      const ByteRange extended = align_outward(range, alignment).intersection(within);
      const ByteRange gap{blocks.hull().end, extended.begin};
      if (!blocks.empty() && gap.size() <= worth_writing_over && unit->known().contains(gap))
        blocks.add(gap);
      blocks.add(extended);
    }
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

void WriteCache::write_segments(Storage& storage, const Segments& segments) const {
  std::vector<std::byte> merged;
  for (auto first = segments.begin(); first != segments.end();) {
    auto behind = first + 1;
    std::uint64_t size = first->range.size();
    while (behind != segments.end() && behind->range.begin == (behind - 1)->range.end &&
           size + behind->range.size() <= settings_.max_write) {
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
  }
}

void WriteCache::finish(const Job& job, bool stored) noexcept {
  const Lock lock(mutex_);
  for (Unit* unit : job) {
    leave_queue(lock, *unit, Unit::Turn::none);
    const bool was_refused = unit->was_refused;
    if (stored) {
      count_written(lock, *unit);
      unit->stored();
    } else {
      refuse(lock, *unit);
    }
    const bool wanted = unit->full(size_) || !has_layout_ || wanted_unit_size_ != unit_size_;
    if (unit->clean())
      settle(lock, *unit);
    else if (stored && wanted)
      enqueue(lock, *unit, Unit::Reason::new_layout); // a client has written to it meanwhile
    if (stored && was_refused)
      queue_one_refused(lock);
  }
  progress_.notify_all();
  budget_.note_change();
}

} // namespace qcowcache
