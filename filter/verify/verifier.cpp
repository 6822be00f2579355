#include "verify/verifier.hpp"

#include "util/all_zeros.hpp"

#include <algorithm>
#include <new>
#include <set>
#include <system_error>

namespace qcowcache {

namespace {

using qcow2::Compression;
using qcow2::Decoding;
using qcow2::Decompressor;
using qcow2::Header;

/// Writers that are slower than clients are not helped by more.
constexpr std::size_t most_waiting = 64;
constexpr std::size_t most_failures = 256;
constexpr std::size_t most_reported = 4;
constexpr std::size_t batch = 4096;
/// Clusters that lie side by side are read together, in bytes.
constexpr std::uint64_t largest_read = std::uint64_t{1024} * 1024;
/// A read takes hardly longer for so many bytes more.
constexpr std::uint64_t small_read = std::uint64_t{64} * 1024;
constexpr unsigned most_tries = 3;
/// Tables that may turn out to be named once more.
constexpr std::size_t most_looked = 2048;
constexpr std::chrono::milliseconds between_questions{10};
constexpr std::size_t most_rewritten = 4096;

/// The ranges with the smallest gaps between them made one, so that no more than half are left.
ByteRanges coarser(const ByteRanges& ranges) {
  ByteRanges result = ranges;
  for (std::uint64_t gap = small_read; result.count() > ranges.count() / 2; gap *= 2) {
    ByteRanges merged;
    ByteRange last = *result.begin();
    for (const ByteRange& range : result) {
      if (range.begin > last.end && range.begin - last.end > gap) {
        merged.add(last);
        last.begin = range.begin;
      }
      last.end = range.end;
    }
    merged.add(last);
    result = std::move(merged);
  }
  return result;
}

/// Reads a part of the image, with zeros for what lies past its end.
void read_padded(Verifier::Image& image, std::uint64_t offset, std::span<std::byte> data) {
  const ByteRange inside = ByteRange{offset, offset + data.size()}.intersection({0, image.size()});
  std::fill(data.begin() + static_cast<std::ptrdiff_t>(inside.size()), data.end(), std::byte{0});
  if (!inside.empty())
    image.read(offset, data.first(inside.size()));
}

/// Whether this caller can read all that the file has of the range.
bool sees(const Verifier::Image& image, const ByteRange& range) {
  return std::min(range.end, image.largest_size()) <= image.size();
}

/// Throws std::system_error when it cannot.
void require_seen(const Verifier::Image& image, const ByteRange& range) {
  if (!sees(image, range))
    throw std::system_error(std::make_error_code(std::errc::result_out_of_range),
                            to_string(range) + " lies behind what this client sees");
}

/// The header of an image whose tables can be followed.
std::optional<Header> known_header(Verifier::Image& image) {
  std::optional<Header> header = image.header();
  if (header && header->unknown_features)
    header.reset();
  return header;
}

/// The lock's mutex is free while this lives.
class Unlocked {
public:
  explicit Unlocked(std::unique_lock<std::mutex>& lock) : lock_(lock) { lock_.unlock(); }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;
  ~Unlocked() { lock_.lock(); }

private:
  std::unique_lock<std::mutex>& lock_;
};

} // namespace

Verifier::Interruption::Interruption(const std::function<bool()>& interrupted)
    : interrupted_(interrupted), asked_(std::chrono::steady_clock::now()) {}

bool Verifier::Interruption::due() const {
  return interrupted_ && std::chrono::steady_clock::now() - asked_ >= between_questions;
}

void Verifier::Interruption::confirm() {
  if (!due())
    return;
  if (interrupted_())
    throw Interrupted();
  asked_ = std::chrono::steady_clock::now();
}

/// One check at a time, first come, first served.
class Verifier::Turn {
public:
  Turn(Verifier& verifier, Lock& lock)
      : verifier_(verifier), own_(verifier.turns_.insert(verifier.turns_.end(), '\0')) {
    try {
      Interruption interruption(verifier_.settings_.interrupted);
      while (own_ != verifier_.turns_.begin())
        verifier_.wait_for_change(lock, interruption);
      verifier_.interruption_.emplace(verifier_.settings_.interrupted);
    } catch (...) {
      end();
      throw;
    }
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  /// REQUIRES: the mutex is held.
  ~Turn() {
    verifier_.verdicts_.clear();
    verifier_.looked_.clear();
    end();
  }

private:
  void end() noexcept {
    verifier_.turns_.erase(own_);
    verifier_.changed_.notify_all();
  }

  Verifier& verifier_;
  const std::list<char>::iterator own_;
};

Verifier::Verifier(Settings settings, MemoryBudget& budget)
    : settings_(std::move(settings)), memory_(budget, settings_.memory), streams_(&memory_),
      tables_(&memory_,
              [this](std::size_t bytes) {
                return memory_.could_have(bytes) && streams_.drop_lowest();
              }),
      counted_(settings_.left.counted) {}

Verifier::~Verifier() = default;

// ---- Changes

void Verifier::Change::begin(Image& image, const ByteRange& range) noexcept {
  try {
    entry_ = verifier_->begin(image, range);
  } catch (const std::exception&) {
    unnoted_ = true;
    verifier_->begin_unnoted();
  }
}

void Verifier::Change::end_unless_told() noexcept {
  try {
    if (entry_)
      verifier_->end_changed(*entry_);
    else if (unnoted_)
      verifier_->end_unnoted();
  } catch (const std::exception&) {
    verifier_->give_up();
  }
}

void Verifier::Change::end_written(std::span<const std::byte> data) noexcept {
  try {
    verifier_->end(*std::exchange(entry_, std::nullopt), data);
  } catch (const std::exception&) {
    verifier_->give_up();
  }
}

void Verifier::Change::zeroed() noexcept {
  if (!entry_)
    return;
  try {
    verifier_->end_zeroed(*std::exchange(entry_, std::nullopt));
  } catch (const std::exception&) {
    verifier_->give_up();
  }
}

void Verifier::begin_unnoted() noexcept {
  const Lock lock(mutex_);
  ++unnoted_;
  give_up(lock);
}

void Verifier::end_unnoted() noexcept {
  const Lock lock(mutex_);
  --unnoted_;
  give_up(lock); // a check may have come to its end since this began
}

void Verifier::give_up() noexcept {
  give_up(Lock(mutex_));
}

/// Something was not noted for want of memory: nothing is known any more.
void Verifier::give_up(const Lock& lock) noexcept {
  for (Progress& each : in_progress_)
    each.crossed = true; // maybe: nobody knows where that change is
  forget_streams(lock);
  opened_ = true;
  header_stale_ = true;
  tables_.lose();
  tables_changed_ = true;
  changed_.notify_all();
}

Verifier::InProgress::iterator Verifier::begin(Image& image, const ByteRange& range) {
  Lock lock(mutex_);
  open(lock, image);
  shrink(lock);
  keep_old_tables(lock, image, range);
  outdate(lock, range);
  arrived(lock, range);
  bool crossed = false;
  for (Progress& other : in_progress_) {
    if (other.range.overlaps(range))
      crossed = other.crossed = true;
  }
  return in_progress_.insert(in_progress_.end(), {range, ++last_change_, image.client(), crossed});
}

Verifier::Progress Verifier::end_progress(const Lock& lock, InProgress::iterator entry) {
  const Progress ended = *entry;
  const ByteRange& range = ended.range;
  in_progress_.erase(entry);
  outdate(lock, range);
  header_stale_ = header_stale_ || range.begin < qcow2::header_bytes;
  tables_changed_ = tables_changed_ || header_stale_ || tables_.is_table(range);
  note_rewritten(lock, range);
  arrived(lock, range);
  changed_.notify_all();
  return ended;
}

void Verifier::end(InProgress::iterator entry, std::span<const std::byte> data) {
  Lock lock(mutex_);
  const auto [range, number, client, crossed] = end_progress(lock, entry);
  upload_.wrote(range, client);
  if (crossed) {
    tables_.changed(range);
    return;
  }
  tables_.wrote(range.begin, data);
  if (!may_be_stream(lock, range, data))
    return;
  const Header& header = *tables_.header();
  const auto job =
      jobs_.insert(jobs_.end(), Job{++last_job_, range, header.compression, header.cluster_size(),
                                    std::pmr::vector<std::byte>(&memory_)});
  if (settings_.wake && waiting_ < most_waiting) {
    try {
      job->data.assign(data.begin(), data.end());
      settings_.wake(waiting_ + 1);
      ++waiting_;
      return;
    } catch (const std::bad_alloc&) {
      job->data.clear(); // decoded here and now, from where it is
    }
  }
  job->taken = true;
  decode(lock, job, data, Decoder::writer);
}

void Verifier::end_zeroed(InProgress::iterator entry) {
  const Lock lock(mutex_);
  const auto [range, number, client, crossed] = end_progress(lock, entry);
  upload_.zeroed(range);
  if (crossed)
    tables_.changed(range);
  else
    tables_.zeroed(range);
}

void Verifier::end_changed(InProgress::iterator entry) {
  const Lock lock(mutex_);
  tables_.changed(end_progress(lock, entry).range);
}

void Verifier::forget(const ByteRange& range) noexcept {
  const Lock lock(mutex_);
  for (Progress& each : in_progress_)
    each.crossed = each.crossed || each.range.overlaps(range);
  outdate(lock, range);
  arrived(lock, range);
  header_stale_ = header_stale_ || range.begin < qcow2::header_bytes;
  tables_.changed(range);
  tables_changed_ = true;
  early_range_ = {};
  others_change_ = true;
  changed_.notify_all();
}

void Verifier::client_read(const std::function<std::optional<Header>()>& header,
                           std::uint64_t offset, std::span<const std::byte> data) noexcept {
  // Somebody may have changed it since it was read.
  const auto too_late = [this](const Lock& /*lock*/) {
    return opened_ || opening_ || others_change_;
  };
  if (too_late(Lock(mutex_)))
    return;
  try {
    const std::optional<Header> known = header();
    if (!known)
      return;
    const ByteRange l1 = qcow2::l1_range(*known);
    if (l1.empty() || l1.size() > small_read ||
        !ByteRange{offset, offset + data.size()}.contains(l1))
      return;
    const std::span<const std::byte> table = data.subspan(l1.begin - offset, l1.size());
    std::vector<std::byte> copy(table.begin(), table.end());
    const Lock lock(mutex_);
    if (too_late(lock))
      return;
    early_range_ = l1;
    early_ = std::move(copy);
  } catch (const std::exception&) {
    // It will be read.
  }
}

void Verifier::shrink() noexcept {
  const Lock lock(mutex_);
  shrink(lock);
}

void Verifier::shrink(const Lock& /*lock*/) noexcept {
  if (!memory_.too_much())
    return;
  tables_.drop_checked_copies();
  bool dropped = true;
  while (dropped && memory_.too_much())
    dropped = streams_.drop_lowest();
}

void Verifier::forget_streams(const Lock& /*lock*/) noexcept {
  streams_.clear();
  verdicts_.clear();
  looked_.clear();
  for (Job& job : jobs_)
    job.outdated = true;
  for (auto& [place, failure] : failures_)
    failure.touched = true; // no verdict of another codec's decoder
  for (auto& [index, kept] : being_kept_)
    kept.changed = true; // another image's, as it may be
}

/// Remembered streams in the range are no longer what they were.
void Verifier::outdate(const Lock& lock, const ByteRange& range) noexcept {
  streams_.forget(range);
  verdicts_.forget(range);
  forget_looked(lock, range);
  for (Job& job : jobs_)
    job.outdated = job.outdated || job.range.overlaps(range);
}

/// Whoever waits for bytes in the range should look again.
void Verifier::arrived(const Lock& /*lock*/, const ByteRange& range) noexcept {
  for (auto& [place, failure] : failures_)
    failure.touched = failure.touched || failure.data.overlaps(range);
  for (auto& [index, kept] : being_kept_)
    kept.changed = kept.changed || kept.range.overlaps(range);
  if (!watched_.overlaps(range))
    return;
  try {
    written_while_watched_.add(range);
  } catch (const std::bad_alloc&) {
    written_while_watched_.clear(); // one range takes no memory
    written_while_watched_.add(watched_);
  }
}

/// Reads a part of a table, unless it was written with zeros.
void Verifier::read_table(Lock& lock, Image& image, std::uint64_t offset,
                          std::span<std::byte> bytes) {
  if (tables_.reads_zeros({offset, offset + bytes.size()})) {
    std::ranges::fill(bytes, std::byte{0});
    return;
  }
  const Unlocked unlocked(lock);
  read_padded(image, offset, bytes);
}

/// At the first change: what the image has already is not new, but for what is left to look at.
void Verifier::open(Lock& lock, Image& image) {
  changed_.wait(lock, [this] { return !opening_; });
  if (opened_)
    return;
  opening_ = true;
  try {
    std::optional<Header> header;
    const char* fault = nullptr;
    {
      const Unlocked unlocked(lock);
      header = known_header(image);
      if (!header && (settings_.everything || settings_.left.more))
        fault = image.header_fault();
    }
    header_fault_ = fault;
    if (header) {
      tables_.set_header(*header);
      const ByteRange l1 = tables_.l1_range();
      require_seen(image, l1);
      tables_.begin_reading_l1();
      std::vector<std::byte> bytes;
      for (ByteRange rest = l1; !rest.empty();) {
        if (early_range_ == l1) {
          bytes = early_;
        } else {
          bytes.resize(std::min(rest.size(), small_read));
          read_table(lock, image, rest.begin, bytes);
        }
        tables_.l1_entries(
            static_cast<std::uint32_t>((rest.begin - l1.begin) / qcow2::l1_entry_size), bytes,
            !settings_.left.more && !settings_.everything);
        rest.begin += bytes.size();
      }
      tables_.end_reading_l1();
      take_over_failing(lock, image);
    }
  } catch (const std::system_error&) {
    // What cannot be read now is looked at by the next check, all of it.
    tables_.clear();
    header_stale_ = true;
  } catch (...) {
    opening_ = false;
    changed_.notify_all();
    throw;
  }
  opening_ = false;
  opened_ = true;
  early_range_ = {};
  early_ = {};
  changed_.notify_all();
}

void Verifier::take_over_failing(Lock& lock, Image& image) {
  const std::uint32_t cluster_size = tables_.header()->cluster_size();
  for (const Entry& entry : settings_.left.failing) {
    if (tables_.has_table(entry.l1_index)) {
      const std::uint64_t offset = tables_.table_offset(entry.l1_index);
      if (tables_.unread_in({offset, offset + 1})) {
        std::vector<std::byte> table(cluster_size);
        require_seen(image, {offset, offset + cluster_size});
        read_table(lock, image, offset, table);
        tables_.load_checked(entry.l1_index, table);
      }
      if (tables_.has_table(entry.l1_index)) // they may have been lost meanwhile
        tables_.uncheck(entry);
    }
  }
}

bool Verifier::being_changed(const Lock& /*lock*/, const ByteRange& range) const {
  return std::ranges::any_of(in_progress_,
                             [&](const Progress& each) { return each.range.overlaps(range); });
}

/// Reads the tables that the range is going to change, unless they are in memory.
void Verifier::keep_old_tables(Lock& lock, Image& image, const ByteRange& range) {
  Interruption interruption(settings_.interrupted);
  std::optional<std::uint32_t> index = tables_.unread_in(range);
  while (index) {
    const std::uint64_t offset = tables_.table_offset(*index);
    const auto is_there = [&] {
      return tables_.has_table(*index) && tables_.table_offset(*index) == offset;
    };
    const ByteRange whole{offset, offset + tables_.header()->cluster_size()};
    if (being_kept_.contains(*index)) {
      changed_.wait(lock);
      index = tables_.unread_in(range);
    } else {
      if (!being_changed(lock, whole))
        keep_old_table(lock, image, *index, whole);
      if (is_there() && tables_.is_unread(*index)) {
        // There is no memory for it, or it cannot be read, or somebody is changing it. So all of
        // its entries are new: nobody must take for old what may have changed by now.
        tables_.changed({offset, offset + 1});
      }
      if (interruption.due()) {
        try {
          const Unlocked unlocked(lock);
          interruption.confirm();
        } catch (const Interrupted&) {
          tables_.changed(range); // the same for all that are left
          return;
        }
      }
      index = is_there() ? tables_.unread_in(range, index) : tables_.unread_in(range);
    }
  }
}

void Verifier::keep_old_table(Lock& lock, Image& image, std::uint32_t index,
                              const ByteRange& whole) {
  std::vector<std::byte> table(whole.size());
  bool known = true;
  const auto kept = being_kept_.insert_or_assign(index, Kept{whole, false}).first;
  const auto done = [this, kept] {
    being_kept_.erase(kept);
    changed_.notify_all();
  };
  try {
    require_seen(image, whole);
    read_table(lock, image, whole.begin, table);
  } catch (const std::system_error&) {
    known = false;
  } catch (...) {
    done();
    throw;
  }
  known = known && !kept->second.changed && tables_.has_table(index) &&
          tables_.table_offset(index) == whole.begin;
  done();
  if (known)
    tables_.load_checked(index, table);
}

// ---- Decoding as data arrives

bool Verifier::may_be_stream(const Lock& /*lock*/, const ByteRange& range,
                             std::span<const std::byte> data) const {
  const std::optional<Header>& header = tables_.header();
  return header && !header_stale_ && data.size() < header->cluster_size() &&
         range.begin >= header->cluster_size() &&
         Decompressor::may_begin(header->compression, data) && !tables_.is_table(range);
}

/// A write does not wait for those who decode: what it cannot decode at once is left to the check.
void Verifier::decode(Lock& lock, Jobs::iterator job, std::span<const std::byte> data,
                      Decoder decoder) {
  Decoding decoding;
  try {
    const Unlocked unlocked(lock);
    DecompressorPool& pool = *settings_.decompressors;
    std::optional<DecompressorPool::Loan> loan =
        decoder == Decoder::writer ? pool.try_borrow(account_) : pool.borrow(account_);
    if (decoder == Decoder::check)
      interruption_->confirm();
    if (loan)
      decoding = std::move(*loan).decode(job->compression, data, job->cluster_size);
  } catch (const std::bad_alloc&) {
    decoding = {}; // the check will try again
  } catch (const Interrupted&) {
    jobs_.erase(job);
    changed_.notify_all();
    throw;
  }
  if (decoding.whole() && !job->outdated)
    streams_.remember(job->range.begin, static_cast<std::uint32_t>(decoding.stream_size));
  jobs_.erase(job);
  changed_.notify_all();
}

bool Verifier::decode_one() {
  Lock lock(mutex_);
  const auto job = std::ranges::find_if(jobs_, [](const Job& each) { return !each.taken; });
  if (job == jobs_.end())
    return false;
  job->taken = true;
  --waiting_;
  decode(lock, job, job->data, Decoder::background);
  return true;
}

std::size_t Verifier::waiting() const {
  const Lock lock(mutex_);
  return waiting_;
}

void Verifier::finish_decoding(Lock& lock) {
  const std::uint64_t last = last_job_;
  const auto is_due = [last](const Job& job) { return job.number <= last; };
  while (std::ranges::any_of(jobs_, is_due)) {
    const auto waits =
        std::ranges::find_if(jobs_, [&](const Job& job) { return is_due(job) && !job.taken; });
    if (waits == jobs_.end()) {
      wait_for_change(lock, *interruption_);
    } else {
      waits->taken = true;
      --waiting_;
      decode(lock, waits, waits->data, Decoder::check);
    }
  }
}

// ---- Waiting

/// Waits until somebody has changed something, or until then.
void Verifier::wait_for_change(Lock& lock, Interruption& interruption, std::optional<Time> until) {
  constexpr std::chrono::milliseconds between_looks{50};
  if (settings_.interrupted) {
    const Time look = std::chrono::steady_clock::now() + between_looks;
    changed_.wait_until(lock, until ? std::min(*until, look) : look);
    const Unlocked unlocked(lock);
    interruption.confirm();
  } else if (until) {
    changed_.wait_until(lock, *until);
  } else {
    changed_.wait(lock);
  }
}

/// Throws Interrupted if nobody needs the check that is running any more.
void Verifier::confirm(Lock& lock) {
  if (!interruption_->due())
    return;
  const Unlocked unlocked(lock);
  interruption_->confirm();
}

// ---- Checks

bool Verifier::has_work() const {
  return has_work(Lock(mutex_));
}

bool Verifier::has_work_at_end() const {
  const Lock lock(mutex_);
  return has_work(lock) && (opened_ || !settings_.left.empty());
}

bool Verifier::has_work(const Lock& lock) const {
  const bool to_open = !opened_ && (!settings_.left.empty() || settings_.everything);
  return to_open || header_stale_ || header_fault_ != nullptr || tables_.has_work() ||
         !failures_.empty() || more_failures_ > 0 || has_rewritten(lock);
}

std::size_t Verifier::failing() const {
  const Lock lock(mutex_);
  return failures_.size() + more_failures_ + (header_fault_ != nullptr ? 1U : 0U);
}

void Verifier::ends(const void* client) noexcept {
  const Lock lock(mutex_);
  upload_.left(client);
}

Verifier::Left Verifier::left() const {
  const Lock lock(mutex_);
  if (round_ == 0)
    return settings_.left;
  Left left;
  left.counted = counted_;
  left.more = more_failures_ > 0 || awaited_ > 0 || cut_off_ || left_out_ ||
              header_fault_ != nullptr || has_rewritten(lock);
  for (const auto& [place, failure] : failures_)
    left.failing.push_back({place.first, place.second, failure.value});
  return left;
}

void Verifier::report_unchecked(const std::string& why) {
  {
    const Lock lock(mutex_);
    if (why == told_why_)
      return;
    told_why_ = why;
  }
  settings_.report("compressed clusters could not be checked: " + why);
}

Verifier::Outcome Verifier::check(Image& image) {
  const Time deadline = std::chrono::steady_clock::now() + settings_.patience;
  Lock lock(mutex_);
  const std::uint64_t last_before = last_change_;
  const Turn turn(*this, lock);
  if (!has_work(lock))
    return Outcome::clean;
  last_before_ = last_before;
  finish_decoding(lock);
  open(lock, image);
  looked_last_ = false;
  cut_off_ = true;
  do {
    look(lock, image);
  } while (wait_for_late(lock, deadline));
  cut_off_ = false;
  settle_and_report(lock);
  if (unread_) {
    cut_off_ = true;
    std::rethrow_exception(std::exchange(unread_, nullptr));
  }
  told_why_.clear();
  return failures_.empty() && more_failures_ == 0 && header_fault_ == nullptr ? Outcome::clean
                                                                              : Outcome::damaged;
}

void Verifier::look(Lock& lock, Image& image) {
  ++round_;
  more_failures_ = 0;
  awaited_ = 0;
  unread_ = nullptr;
  left_out_ = false;
  tables_changed_ = false;
  looked_.clear();
  refresh_header(lock, image);
  if (!tables_.header()) {
    rewritten_.clear();
    renewing_.clear();
  } else if (awaits(lock, image, tables_.l1_range())) {
    ++awaited_; // no table is known
  } else {
    refresh_l1(lock, image);
    renew(lock, image);
    refresh_tables(lock, image);
    look_at_unchecked(lock, image);
    if (tables_.lost() && tables_.has_work())
      look_at_everything(lock, image);
  }
  // Entries that are gone, or stand for something else now, fail no more.
  std::erase_if(failures_, [this](const auto& item) { return item.second.round != round_; });
}

void Verifier::refresh_header(Lock& lock, Image& image) {
  if (!header_stale_)
    return;
  std::optional<Header> header;
  const char* fault = nullptr;
  try {
    header_stale_ = false;
    const Unlocked unlocked(lock);
    header = known_header(image);
    if (!header)
      fault = image.header_fault();
  } catch (...) {
    header_stale_ = true;
    throw;
  }
  header_fault_ = fault;
  const std::optional<Header>& before = tables_.header();
  if (!header || !before || header->compression != before->compression ||
      header->cluster_size() != before->cluster_size() ||
      header->extended_l2 != before->extended_l2)
    forget_streams(lock); // what another image calls one
  if (header)
    tables_.set_header(*header);
  else
    tables_.clear();
}

void Verifier::refresh_l1(Lock& lock, Image& image) {
  std::vector<std::byte> bytes;
  for (unsigned tries = 0; tables_.l1_is_stale() && tries < most_tries; ++tries) {
    const ByteRange l1 = tables_.l1_range();
    if (!sees(image, l1)) {
      left_out_ = true;
      return;
    }
    tables_.begin_reading_l1();
    for (ByteRange rest = l1; !rest.empty();) {
      bytes.resize(std::min(rest.size(), small_read));
      read_table(lock, image, rest.begin, bytes);
      tables_.l1_entries(static_cast<std::uint32_t>((rest.begin - l1.begin) / qcow2::l1_entry_size),
                         bytes, false);
      rest.begin += bytes.size();
      confirm(lock);
    }
    tables_.end_reading_l1();
  }
}

/// Something that entries may name was changed.
void Verifier::note_rewritten(const Lock& /*lock*/, const ByteRange& range) noexcept {
  if (range.empty() || tables_.lost() || !(tables_.header() || header_stale_))
    return;
  try {
    rewritten_.add(range);
    if (rewritten_.count() > most_rewritten)
      rewritten_ = coarser(rewritten_);
  } catch (const std::bad_alloc&) {
    const ByteRange hull = rewritten_.empty() ? range : rewritten_.hull();
    rewritten_.clear(); // one range takes no memory
    rewritten_.add({std::min(hull.begin, range.begin), std::max(hull.end, range.end)});
  }
}

bool Verifier::has_rewritten(const Lock& /*lock*/) const noexcept {
  return tables_.header() && !tables_.lost() && !(rewritten_.empty() && renewing_.empty());
}

/// Whether an upload has still to come there.
bool Verifier::awaits(const Lock& /*lock*/, const Image& image, const ByteRange& range) const {
  return upload_.awaits(range.intersection({0, image.largest_size()}));
}

/// REQUIRES: the L1 table names one with this index.
bool Verifier::awaits_table(const Lock& lock, const Image& image, std::uint32_t index) const {
  const std::uint64_t offset = tables_.table_offset(index);
  return awaits(lock, image, {offset, offset + tables_.header()->cluster_size()});
}

/// Entries that name what was written, zeroed or trimmed are new again.
void Verifier::renew(Lock& lock, Image& image) {
  renewing_.add(rewritten_);
  rewritten_.clear();
  std::vector<std::byte> table;
  bool all = true;
  for (auto index = tables_.named_from(0, renewing_); index;
       index = tables_.named_from(*index + 1, renewing_)) {
    if (tables_.has_copy(*index)) {
      tables_.renew(*index, renewing_);
    } else {
      table.resize(tables_.header()->cluster_size());
      all = renew_unread(lock, image, *index, table) && all;
    }
    confirm(lock);
  }
  if (all || tables_.lost())
    renewing_.clear();
}

/// The same for a table that has to be read, into `table`. Returns false when it cannot be seen.
bool Verifier::renew_unread(Lock& lock, Image& image, std::uint32_t index,
                            std::span<std::byte> table) {
  const std::uint64_t offset = tables_.table_offset(index);
  if (!sees(image, {offset, offset + table.size()})) {
    left_out_ = true;
    return false;
  }
  read_table(lock, image, offset, table);
  const auto is_unread = [&] {
    return tables_.has_table(index) && tables_.table_offset(index) == offset &&
           tables_.is_unread(index);
  };
  if (is_unread()) {
    tables_.note_content(index, table);
    if (tables_.names(table, renewing_)) {
      tables_.load_checked(index, table);
      if (is_unread())
        tables_.changed({offset, offset + 1}); // without a copy all of its entries are looked at
    }
  }
  // Or whoever changed it meanwhile has made one.
  if (tables_.has_copy(index))
    tables_.renew(index, renewing_);
  return true;
}

void Verifier::refresh_tables(Lock& lock, Image& image) {
  std::vector<std::byte> table(tables_.header()->cluster_size());
  for (std::optional<std::uint32_t> index = tables_.stale_from(0); index;
       index = tables_.stale_from(*index + 1)) {
    read_replaced(lock, image, *index, table);
    if (tables_.has_table(*index)) // it may have been lost meanwhile
      refresh_table(lock, image, *index, table);
    confirm(lock);
  }
}

/// Reads, into `table`, what stood where this table stands now, if that counts as checked.
void Verifier::read_replaced(Lock& lock, Image& image, std::uint32_t index,
                             std::span<std::byte> table) {
  const std::optional<std::uint64_t> replaced = tables_.replaced(index);
  if (!replaced)
    return;
  const ByteRange old{*replaced, *replaced + table.size()};
  read_table(lock, image, old.begin, table);
  if (being_changed(lock, old) || !sees(image, old))
    tables_.forget_replaced(old);
  if (tables_.replaced(index) == replaced) // else it has changed since
    tables_.load_checked(index, table);
}

/// Reads a table into `table`, and gives it a copy, or looks at it.
void Verifier::refresh_table(Lock& lock, Image& image, std::uint32_t index,
                             std::span<std::byte> table) {
  const std::uint64_t offset = tables_.table_offset(index);
  if (!sees(image, {offset, offset + table.size()})) {
    left_out_ = true;
    return;
  }
  const auto looked = looked_.find(offset);
  const bool again = looked != looked_.end() && tables_.all_new(index);
  tables_.begin_reading(index);
  if (again && looked->second.tally) {
    tables_.looked_at_all(index, look_at_twin(lock, image, index, *looked->second.tally) == 0);
    return;
  }
  note_table(lock, offset);
  read_table(lock, image, offset, table);
  if (again || !tables_.load(index, table)) {
    const std::size_t failed = look_at_table(lock, image, index, offset, table);
    tables_.note_content(index, table);
    tables_.looked_at_all(index, failed == 0);
  }
}

void Verifier::look_at_unchecked(Lock& lock, Image& image) {
  std::vector<Entry> entries;
  Tally tally;
  std::optional<Entry> next = tables_.unchecked_from(0, 0);
  while (next) {
    entries.clear();
    while (next && entries.size() < batch) {
      entries.push_back(*next);
      next = tables_.unchecked_from(next->l1_index, next->l2_index + 1);
    }
    look_at(lock, image, entries, tally);
    next = tables_.unchecked_from(entries.back().l1_index, entries.back().l2_index + 1);
    confirm(lock);
  }
}

/// This table is going to be read, should it be named once more.
void Verifier::note_table(const Lock& /*lock*/, std::uint64_t offset) {
  if (looked_.size() < most_looked)
    looked_.try_emplace(offset);
}

void Verifier::forget_looked(const Lock& /*lock*/, const ByteRange& range) noexcept {
  if (looked_.empty())
    return;
  const std::uint64_t size = tables_.header() ? tables_.header()->cluster_size() : 0;
  const std::uint64_t first = range.begin - std::min(range.begin, size);
  looked_.erase(looked_.lower_bound(first), looked_.lower_bound(range.end));
}

/// `table` is what is at `offset`, for this entry of the L1 table and others. Returns how many of
/// its entries are not good.
std::size_t Verifier::look_at_table(Lock& lock, Image& image, std::uint32_t l1_index,
                                    std::uint64_t offset, std::span<const std::byte> table) {
  const Header header = *tables_.header();
  std::vector<Entry> entries;
  Tally tally;
  for (std::uint32_t i = 0; i < header.l2_entries(); ++i) {
    const std::uint64_t value = qcow2::l2_entry(table, i, header);
    if (qcow2::is_compressed(value))
      entries.push_back({l1_index, i, value});
    if (entries.size() == batch || i + 1 == header.l2_entries()) {
      look_at(lock, image, entries, tally);
      entries.clear();
      confirm(lock);
    }
  }
  const std::size_t failed = tally.failed;
  if (failures_.size() >= most_failures)
    tally.some_bad = {}; // no more than their number will be remembered
  const auto looked = looked_.find(offset);
  if (looked != looked_.end() && failed == tally.bad + tally.awaited)
    looked->second.tally = std::move(tally);
  return failed;
}

/// The same for a table that was looked at for another entry of the L1 table.
std::size_t Verifier::look_at_twin(Lock& lock, Image& image, std::uint32_t l1_index,
                                   const Tally& twin) {
  count_good(lock, twin.good, twin.good_bytes);
  const std::size_t failed = twin.failed;
  const auto known = failures_.lower_bound({l1_index, 0});
  awaited_ += twin.awaited;
  if (failures_.size() >= most_failures &&
      (known == failures_.end() || known->first.first != l1_index)) {
    more_failures_ += twin.bad; // as each of them would say
    return failed;
  }
  std::vector<Entry> entries = twin.some_bad;
  const std::size_t others = twin.bad - entries.size();
  const std::size_t awaited = twin.awaited;
  for (Entry& entry : entries)
    entry.l1_index = l1_index;
  Tally tally;
  look_at(lock, image, entries, tally);
  more_failures_ += others;
  return tally.failed + others + awaited;
}

void Verifier::look_at_everything(Lock& lock, Image& image) {
  const Header header = *tables_.header();
  const ByteRange l1 = tables_.l1_range();
  std::vector<std::byte> bytes;
  std::vector<std::byte> table(header.cluster_size());
  std::size_t failed = 0;
  const auto leaves_out = [&](std::uint64_t offset, std::size_t size) {
    const ByteRange range{offset, offset + size};
    const bool is_awaited = awaits(lock, image, range);
    if (!is_awaited && sees(image, range))
      return false;
    awaited_ += is_awaited ? 1U : 0U;
    left_out_ = left_out_ || !is_awaited;
    ++failed;
    return true;
  };
  tables_.begin_looking_at_everything();
  try {
    for (ByteRange rest = l1; !rest.empty(); rest.begin += bytes.size()) {
      bytes.resize(std::min(rest.size(), small_read));
      if (leaves_out(rest.begin, bytes.size()))
        continue;
      read_table(lock, image, rest.begin, bytes);
      for (std::size_t at = 0; at < bytes.size(); at += qcow2::l1_entry_size) {
        const auto offset = qcow2::l2_table_offset(qcow2::l1_entry(bytes, at), header);
        if (offset && !leaves_out(*offset, table.size())) {
          const auto index =
              static_cast<std::uint32_t>((rest.begin - l1.begin + at) / qcow2::l1_entry_size);
          const auto looked = looked_.find(*offset);
          if (looked != looked_.end() && looked->second.tally) {
            failed += look_at_twin(lock, image, index, *looked->second.tally);
          } else {
            note_table(lock, *offset);
            read_table(lock, image, *offset, table);
            failed += look_at_table(lock, image, index, *offset, table);
          }
          tables_.looked_at_table(index, *offset);
        }
      }
      confirm(lock);
    }
  } catch (...) {
    tables_.look_at_everything_again();
    throw;
  }
  if (failed > 0)
    tables_.look_at_everything_again();
  else if (in_progress_.empty() && unnoted_ == 0) // else tables are changing that nobody has kept
    tables_.follow_again();
}

void Verifier::look_at(Lock& lock, Image& image, std::span<const Entry> entries, Tally& tally) {
  if (!tables_.header())
    return;
  const Header header = *tables_.header();
  const ByteRange readable{0, image.size()};
  const ByteRange whole{0, image.largest_size()};
  std::vector<Candidate> candidates;
  for (const Entry& entry : entries) {
    const qcow2::CompressedCluster cluster = qcow2::compressed_cluster(entry.value, header);
    const ByteRange data = cluster.range().intersection(whole);
    const std::uint32_t remembered = streams_.size_at(cluster.offset);
    const auto known = failures_.find({entry.l1_index, entry.l2_index});
    if (remembered > 0 && remembered <= data.size()) {
      good(lock, entry, remembered, tally);
    } else if (upload_.awaits(data) ||
               (tables_.has_table(entry.l1_index) && awaits_table(lock, image, entry.l1_index))) {
      ++awaited_;
      ++tally.awaited;
      ++tally.failed;
    } else if (known != failures_.end() && known->second.value == entry.value &&
               known->second.end == data.end && !known->second.touched) {
      known->second.round = round_;
      note_bad(entry, tally);
    } else if (!data.empty() && data.end > readable.end) {
      left_out_ = true; // for somebody who sees it to check
      ++tally.failed;
    } else {
      const std::optional<Decoding> decoding = verdicts_.find(cluster, data.end);
      if (!decoding)
        candidates.push_back({entry, cluster, data});
      else if (decoding->whole())
        good(lock, entry, decoding->stream_size, tally);
      else
        bad(lock, {entry, cluster, data}, decoding->reason, false, tally);
    }
  }
  std::ranges::sort(candidates, {}, [](const Candidate& each) {
    return std::pair(each.cluster.offset, each.cluster.length);
  });
  for (auto first = candidates.begin(); first != candidates.end();) {
    auto behind = first + 1;
    std::uint64_t end = first->data.end;
    while (behind != candidates.end() && !behind->data.empty() &&
           behind->data.begin <= end + small_read &&
           behind->data.end - first->data.begin <= largest_read) {
      end = std::max(end, behind->data.end);
      ++behind;
    }
    const std::span group(first, behind);
    try {
      read_and_decode(lock, image, group, tally);
    } catch (const Interrupted&) {
      throw;
    } catch (const std::system_error&) {
      // The others are looked at all the same.
      if (!unread_)
        unread_ = std::current_exception();
      tally.failed += group.size();
    }
    first = behind;
  }
}

void Verifier::read_and_decode(Lock& lock, Image& image, std::span<const Candidate> candidates,
                               Tally& tally) {
  const Header header = *tables_.header();
  ByteRange all = candidates.front().data;
  for (const Candidate& candidate : candidates)
    all.end = std::max(all.end, candidate.data.end);

  watched_ = all;
  for (const Candidate& candidate : candidates)
    watched_.end = std::max(watched_.end, candidate.cluster.range().end);
  written_while_watched_.clear();
  std::vector<Decoding> decodings(candidates.size());
  try {
    const Unlocked unlocked(lock);
    std::vector<std::byte> bytes(all.size());
    if (!bytes.empty())
      image.read(all.begin, bytes);
    for (std::size_t i = 0; i < candidates.size(); ++i) {
      const Candidate& candidate = candidates[i];
      const std::span<const std::byte> data =
          candidate.data.empty() ? std::span<const std::byte>()
                                 : std::span<const std::byte>(bytes).subspan(
                                       candidate.data.begin - all.begin, candidate.data.size());
      Decoding& decoding = decodings[i];
      const bool twin =
          i > 0 && candidates[i - 1].cluster.offset == candidate.cluster.offset &&
          (decodings[i - 1].whole() ? decodings[i - 1].stream_size <= data.size()
                                    : candidates[i - 1].cluster.length == candidate.cluster.length);
      if (twin) {
        decoding = decodings[i - 1];
      } else {
        // Only now: storage may take its time, and others need it, too.
        DecompressorPool::Loan loan = settings_.decompressors->borrow(account_);
        interruption_->confirm();
        decoding = std::move(loan).decode(header.compression, data, header.cluster_size());
      }
      const bool past_end = candidate.data.size() < candidate.cluster.length;
      if (!twin && !decoding.whole() && past_end &&
          (data.empty() || decoding.result == Decoding::Result::too_short))
        decoding.reason = "past the end of the file";
      else if (!twin && !decoding.whole() && all_zeros(data))
        decoding.reason = "never written";
    }
  } catch (const Interrupted&) {
    watched_ = {};
    throw;
  } catch (const std::system_error& refusal) {
    // No verdict: the bytes may be read next time, and be good.
    watched_ = {};
    throw std::system_error(refusal.code(), "reading compressed clusters at " + to_string(all));
  } catch (...) {
    watched_ = {};
    throw;
  }
  watched_ = {};

  for (std::size_t i = 0; i < candidates.size(); ++i) {
    const Candidate& candidate = candidates[i];
    const bool touched = written_while_watched_.overlaps(candidate.cluster.range());
    if (!touched)
      verdicts_.note(candidate.cluster, candidate.data.end, decodings[i]);
    if (!decodings[i].whole())
      bad(lock, candidate, decodings[i].reason, touched, tally);
    else if (!touched)
      good(lock, candidate.entry, decodings[i].stream_size, tally);
    else
      ++tally.failed; // other bytes now: for the check that comes after that write
  }
}

/// The cluster can be read.
void Verifier::good(const Lock& lock, const Entry& entry, std::uint64_t size, Tally& tally) {
  ++tally.good;
  tally.good_bytes += size;
  count_good(lock, 1, size);
  tables_.checked(entry);
  failures_.erase({entry.l1_index, entry.l2_index});
}

void Verifier::count_good(const Lock& /*lock*/, std::uint64_t clusters, std::uint64_t bytes) {
  const bool zstd = tables_.header() && tables_.header()->compression == Compression::zstd;
  settings_.counters->add(zstd ? Count::verified_zstd_clusters : Count::verified_deflate_clusters,
                          clusters);
  settings_.counters->add(zstd ? Count::verified_zstd_bytes : Count::verified_deflate_bytes, bytes);
}

void Verifier::note_bad(const Entry& entry, Tally& tally) {
  ++tally.failed;
  ++tally.bad;
  if (tally.some_bad.size() < most_failures)
    tally.some_bad.push_back(entry);
}

/// The cluster cannot be read.
void Verifier::bad(const Lock& /*lock*/, const Candidate& candidate, const char* reason,
                   bool touched, Tally& tally) {
  note_bad(candidate.entry, tally);
  const Place place{candidate.entry.l1_index, candidate.entry.l2_index};
  const auto known = failures_.find(place);
  if (known == failures_.end() && failures_.size() >= most_failures) {
    ++more_failures_;
    return;
  }
  const bool same = known != failures_.end() && known->second.value == candidate.entry.value;
  Failure& failure = failures_[place];
  // Reasons are constants, of which each decoder has one copy.
  failure.reported = same && failure.reported && failure.reason == reason;
  failure.value = candidate.entry.value;
  failure.data = candidate.cluster.range();
  failure.end = candidate.data.end;
  failure.reason = reason;
  failure.round = round_;
  failure.touched = touched;
  failure.settled = false;
}

/// Returns whether it is worth looking again.
bool Verifier::wait_for_late(Lock& lock, std::chrono::steady_clock::time_point deadline) {
  const auto waits = [](const auto& item) { return !item.second.settled; };
  bool has_waited = false; // for a write that had begun before the check
  for (;;) {
    if (settings_.patience.count() == 0 || std::ranges::none_of(failures_, waits))
      return false;
    bool touched = tables_changed_;
    bool earlier = false;
    bool later = false;
    for (const auto& [place, failure] : failures_) {
      if (!failure.settled) {
        touched = touched || failure.touched;
        for (const Progress& change : in_progress_) {
          const bool here = change.range.overlaps(failure.data);
          earlier = earlier || (here && change.number <= last_before_);
          later = later || (here && change.number > last_before_);
        }
      }
    }
    const bool late = std::chrono::steady_clock::now() >= deadline;
    if (earlier) {
      has_waited = true;
      wait_for_change(lock, *interruption_);
    } else if (late) {
      return touched && (!std::exchange(looked_last_, true) || has_waited);
    } else if (touched && !later) {
      return true;
    } else {
      wait_for_change(lock, *interruption_, deadline);
    }
  }
}

/// The count rises and falls: what it wraps around when it falls is made up for where all are
/// added.
void Verifier::count_unreadable(const Lock& /*lock*/) {
  const std::uint64_t now = failures_.size() + more_failures_;
  settings_.counters->add(Count::unreadable_clusters, now - std::exchange(counted_, now));
}

void Verifier::settle_and_report(const Lock& lock) {
  std::size_t fresh = 0;
  for (auto& [place, failure] : failures_) {
    failure.settled = true;
    if (!failure.reported) {
      failure.reported = true;
      ++fresh;
      if (fresh <= most_reported) {
        const std::uint64_t host =
            qcow2::compressed_cluster(failure.value, *tables_.header()).offset;
        settings_.report("the compressed cluster at host offset " + std::to_string(host) +
                         ", guest offset " +
                         std::to_string(tables_.header()->guest_offset(place.first, place.second)) +
                         ", cannot be read: " + failure.reason);
      }
    }
  }
  fresh += more_failures_ - std::min(more_failures_, more_reported_);
  more_reported_ = more_failures_;
  settings_.counters->add(Count::unreadable_alarms, fresh);
  count_unreadable(lock);
  if (header_fault_ != std::exchange(told_fault_, header_fault_) && header_fault_ != nullptr)
    settings_.report(std::string("nobody can open the image: ") + header_fault_);
  if (fresh > most_reported)
    settings_.report(std::to_string(fresh - most_reported) +
                     " more compressed clusters cannot be read");
}

} // namespace qcowcache
