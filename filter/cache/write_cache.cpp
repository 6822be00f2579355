#include "cache/write_cache.hpp"

#include "storage/readback_storage.hpp"
#include "util/copy_bytes.hpp"

#include <algorithm>
#include <bit>
#include <new>
#include <string>
#include <utility>
#include <vector>

namespace qcowcache {

namespace {

/// Gaps that a client's read has to fetch from storage are fetched together when they are no
/// farther apart than this: a longer read is cheaper than another request.
constexpr std::uint64_t worth_reading_over = std::uint64_t{64} * 1024;
/// Storage that cannot be read may take long to say so, and makes a request wait for it: where this
/// many reads of the header have failed in a row the next waits for a client who can read it.
constexpr unsigned most_header_reads = 3;
/// Memory for what a request reads or completes beside the client's own buffer, at most.
constexpr std::uint64_t largest_bounce = std::uint64_t{1024} * 1024;

/// Adds an extent, whose bytes that are in `others` have another type.
void overlay(Storage::Extents& extents, const Storage::Extent& extent, const ByteRanges& others,
             Storage::ExtentType type) {
  ByteRange rest = extent.range;
  for (const ByteRange& other : others.inside(extent.range)) {
    if (rest.begin < other.begin)
      extents.push_back({{rest.begin, other.begin}, extent.type});
    extents.push_back({other, type});
    rest.begin = other.end;
  }
  if (!rest.empty())
    extents.push_back({rest, extent.type});
}

} // namespace

WriteCache::WriteCache(Settings settings, const Capabilities& capabilities, RangeLock& ranges,
                       MemoryBudget& budget)
    : settings_(std::move(settings)),
      preferred_(std::min<std::uint64_t>(capabilities.preferred, largest_unit_size)),
      completed_block_(capabilities.rewritten_block()), ranges_(ranges), budget_(budget),
      account_(budget), room_(settings_.reserve), size_(capabilities.size),
      affordable_(affordable_block()),
      unit_size_(unit_size_for(settings_.cluster_size.value_or(0))), wanted_unit_size_(unit_size_),
      has_layout_(settings_.cluster_size.has_value()) {
  if (!settings_.cluster_size)
    return;
  layout_was_read_ = true; // there is nothing to read
  const Lock lock(mutex_);
  relayout(lock);
  tell_layout(lock);
}

WriteCache::~WriteCache() = default;

// ---- Looking up

WriteCache::Units::iterator WriteCache::first_overlapping(const Lock& /*lock*/,
                                                          const ByteRange& range) {
  auto it = units_.upper_bound(range.begin);
  if (it != units_.begin() && std::prev(it)->second.range().end > range.begin)
    --it;
  return it;
}

template <typename Function>
void WriteCache::for_each_unit(const Lock& lock, const ByteRange& range, Function function) {
  auto it = first_overlapping(lock, range);
  while (it != units_.end() && it->first < range.end) {
    Unit& unit = it->second;
    ++it; // `function` may drop the unit
    function(unit);
  }
}

bool WriteCache::caching(const Lock& /*lock*/) const {
  return has_layout_ && budget_.allows_two(unit_size_, bookkeeping());
}

bool WriteCache::caching() const {
  const Lock lock(mutex_);
  return caching(lock);
}

std::uint64_t WriteCache::unit_size() const {
  return unit_size_;
}

std::size_t WriteCache::most_fragments() const noexcept {
  // More than the blocks of a unit that can be known with gaps between them.
  return 24 + unit_size_ / 8192;
}

std::size_t WriteCache::bookkeeping() const noexcept {
  // Four sets of ranges, with room to grow by a little over a half.
  return sizeof(Unit) + 128 + most_fragments() * sizeof(ByteRange) * 4 * 8 / 5;
}

/// `but` is what the caller is about to use: clean units elsewhere make room.
std::shared_ptr<Unit::Buffer> WriteCache::take_buffer(const Lock& lock, const ByteRange& but) {
  std::shared_ptr<Unit::Buffer> buffer = budget_.try_take(unit_size_, bookkeeping());
  while (!buffer && !clean_.empty() && !clean_.front().range().overlaps(but)) {
    const bool last = units_.size() == 1; // units of another size may follow it
    drop(lock, clean_.front());
    if (last)
      break;
    buffer = budget_.try_take(unit_size_, bookkeeping());
  }
  return buffer;
}

Unit& WriteCache::add_unit(const Lock& /*lock*/, std::uint64_t begin,
                           std::shared_ptr<Unit::Buffer>&& buffer) {
  Unit& unit = units_
                   .try_emplace(begin, ByteRange{begin, begin + unit_size_}, std::move(buffer),
                                most_fragments())
                   .first->second;
  clean_.push_back(unit);
  return unit;
}

// ---- The state of a unit

/// Puts a unit into the list that it belongs to, as the one used last.
void WriteCache::place(const Lock& /*lock*/, Unit& unit) noexcept {
  unit.hook.unlink();
  if (unit.turn != Unit::Turn::none)
    busy_.push_back(unit);
  else if (unit.clean())
    clean_.push_back(unit);
  else if (unit.was_refused)
    refused_.push_back(unit);
  else
    filling_.push_back(unit);
}

bool WriteCache::all_stored(const Lock& /*lock*/) const noexcept {
  return filling_.empty() && busy_.empty() && refused_.empty();
}

bool WriteCache::join_queue(const Lock& lock, Unit& unit, Unit::Reason reason) noexcept {
  if (unit.turn != Unit::Turn::none || unit.dirty().empty())
    return false;
  unit.reason = reason;
  if (no_room_ && !unit.was_refused) {
    unit.was_refused = true; // what storage said of others
    no_trust_ = true;
    if (!refused_at_)
      refused_at_ = Unit::Clock::now();
    place(lock, unit);
    return false;
  }
  unit.turn = Unit::Turn::queued;
  unit.queued_whole = unit.full(size_);
  ++queued_;
  queued_partial_ += unit.queued_whole ? 0 : 1;
  queue_.push_back(unit);
  place(lock, unit);
  return true;
}

void WriteCache::enqueue(const Lock& lock, Unit& unit, Unit::Reason reason) {
  if (join_queue(lock, unit, reason) && settings_.wake_writer)
    settings_.wake_writer(queued_);
}

void WriteCache::count_unclean(const Lock& /*lock*/, Unit& unit, bool unclean) noexcept {
  if (unit.counted == unclean)
    return;
  unit.counted = unclean;
  unclean_units_ += unclean ? 1 : 0;
  unclean_units_ -= unclean ? 0 : 1;
  const auto bytes = static_cast<std::ptrdiff_t>(unit_size_ + bookkeeping());
  budget_.add_unclean(account_, unclean ? bytes : -bytes);
}

/// Storage that hangs, or is slow, gives no memory back: each export must leave some for others.
bool WriteCache::beyond_share(const Lock& /*lock*/) const {
  return !budget_.may_have(account_, unit_size_ + bookkeeping());
}

/// A flush must not take for ever where storage is slow.
bool WriteCache::beyond_delay(const Lock& /*lock*/) const {
  if (!settings_.max_delay)
    return false;
  // So much any storage can be asked to write.
  const std::uint64_t least = std::max(2 * settings_.max_write, 4 * unit_size_.load());
  const std::optional<std::uint64_t> most = rate_.bytes_in(*settings_.max_delay);
  return most && (unclean_units_ + 1) * unit_size_ > std::max(*most, least);
}

/// With so many units unclean the writers begin with those that are still being filled: as many as
/// that no writer of images fills at once, and no more than leave some memory before clients have
/// to wait for it.
std::size_t WriteCache::enough_unclean(const Lock& /*lock*/) const {
  // Where holding does not pay, what is held is what a flush has to write in the end, and the few
  // writers of many exports may not come to it before.
  const std::size_t most = !savings_.pays() ? 16 : savings_.known() ? 128 : 32;
  return std::min(most, budget_.limit() / 8 * 3 / (unit_size_ + bookkeeping()));
}

/// Whether storage has enough to do, and holding more would only put off what it has to do anyway.
bool WriteCache::holds_in_vain(const Lock& lock) const {
  if (unclean_units_ <= enough_unclean(lock))
    return false;
  if (!savings_.pays())
    return true;
  // Storage may not have said yet what holding spares it, but those who have waited longest show.
  constexpr std::uint32_t one_write = 2;
  constexpr std::ptrdiff_t sample = 4;
  if (unclean_units_ - queued_ - claimed_ <= enough_unclean(lock))
    return false;
  auto oldest = filling_.begin();
  std::ptrdiff_t alone = 0;
  while (oldest != filling_.end() && oldest->spared <= one_write && alone < sample) {
    ++oldest;
    ++alone;
  }
  return alone == sample;
}

/// Storage is given something to do before memory is used up.
void WriteCache::keep_writers_busy(const Lock& lock) {
  constexpr std::size_t depth = 16;
  if (!settings_.wake_writer || queued_ >= depth)
    return;
  // Those that have been completed the writers have already.
  std::size_t filling = unclean_units_ - queued_ - claimed_;
  if (filling < depth / 4)
    return;
  const std::size_t enough = enough_unclean(lock);
  for (; filling > enough && queued_ < depth && !filling_.empty(); --filling)
    enqueue(lock, filling_.front(), Unit::Reason::memory);
}

/// Without background writers the client waits for each write. So what it completes is held until
/// there is enough for a large one: where a request costs a round trip, as it does with ssh, that
/// is one for every sixteen clusters. Nobody waits for it.
bool WriteCache::holds_back() const {
  const Lock lock(mutex_);
  const bool little = queued_ * unit_size_ < settings_.max_write;
  if (!little || queued_partial_ > 0 || !caching(lock) || budget_.excess() > 0 ||
      wanted_unit_size_ != unit_size_)
    return false;
  if (!settings_.expire || queue_.empty())
    return true;
  const auto now = Unit::Clock::now();
  return std::none_of(queue_.begin(), queue_.end(),
                      [&](const Unit& unit) { return now - unit.touched >= *settings_.expire; });
}

/// Puts a unit, after something about it has changed, where it belongs.
void WriteCache::settle(const Lock& lock, Unit& unit) {
  if (!unit.clean() || unit.turn == Unit::Turn::claimed)
    return;
  leave_queue(lock, unit, Unit::Turn::none);
  count_unclean(lock, unit, false);
  unit.was_refused = false;
  note_progress(lock);
  if (unit.fragmented())
    unit.forget_clean();
  unit.several_writers = false;
  // A unit that clients wrote whole they will hardly come back to, but for the header. Its buffer
  // is still warm for the next one.
  const bool done_with = unit.written_whole && unit.range().begin != 0;
  const bool worthless = done_with || unit.known().empty() || budget_.excess() > 0 ||
                         wanted_unit_size_ != unit_size_ || !has_layout_;
  if (worthless)
    drop(lock, unit);
  else
    place(lock, unit);
  if (refused_.empty())
    no_room_ = false;
  trust_again(lock);
}

/// If storage has all that it refused.
void WriteCache::trust_again(const Lock& /*lock*/) noexcept {
  no_trust_ = no_trust_ && (!refused_.empty() || std::ranges::any_of(busy_, &Unit::was_refused));
}

void WriteCache::leave_queue(const Lock& /*lock*/, Unit& unit, Unit::Turn turn) noexcept {
  queued_ -= unit.turn == Unit::Turn::queued ? 1 : 0;
  queued_partial_ -= unit.turn == Unit::Turn::queued && !unit.queued_whole ? 1 : 0;
  claimed_ -= unit.turn == Unit::Turn::claimed ? 1 : 0;
  claimed_ += turn == Unit::Turn::claimed ? 1 : 0;
  unit.queue_hook.unlink();
  unit.turn = turn;
}

/// Follows a budget that has become smaller: what is clean goes, the oldest of the rest is queued.
void WriteCache::shrink(const Lock& lock) {
  std::size_t excess = budget_.excess();
  const std::size_t each = unit_size_ + bookkeeping();
  while (excess > 0 && !clean_.empty()) {
    excess -= std::min(excess, each);
    drop(lock, clean_.front());
  }
  while (excess > 0 && !filling_.empty()) {
    enqueue(lock, filling_.front(), Unit::Reason::memory);
    excess -= std::min(excess, each);
  }
}

/// The one rule for partial units that their writer will most likely not come back to.
void WriteCache::queue_left_behind(const Lock& lock, Unit::Clock::time_point now) {
  while (!filling_.empty()) {
    Unit& unit = filling_.front();
    const bool others_followed = units_completed_ - unit.completed_before >= left_behind_after;
    const bool idle = settings_.expire && now - unit.touched >= *settings_.expire;
    if (!others_followed && !idle)
      return; // those behind it were used later
    enqueue(lock, unit, others_followed ? Unit::Reason::cluster_end : Unit::Reason::expiry);
  }
}

bool WriteCache::may_retry(const Lock& /*lock*/, Unit::Clock::time_point now) const {
  return refused_at_ && now - *refused_at_ >= settings_.retry;
}

/// Only one: what storage says of it, it would most likely say of all, and each time it says so
/// costs time, and a line in somebody's log.
void WriteCache::queue_one_refused(const Lock& lock) {
  if (refused_.empty()) {
    refused_at_.reset();
  } else {
    refused_at_ = Unit::Clock::now();
    enqueue(lock, refused_.front(), refused_.front().reason);
  }
}

void WriteCache::tick() {
  const Lock lock(mutex_);
  const auto now = Unit::Clock::now();
  const bool changed = std::exchange(shared_at_, moment_) != moment_;
  share_memory(lock, !all_stored(lock) || (changed && caching(lock)));
  follow_memory(lock);
  shrink(lock);
  queue_left_behind(lock, now);
  if (may_retry(lock, now))
    queue_one_refused(lock);
  if (has_layout_ && !caching(lock))
    queue_filling(lock, Unit::Reason::memory);
  tell_layout(lock);
}

void WriteCache::queue_filling(const Lock& lock, Unit::Reason reason) {
  while (!filling_.empty())
    enqueue(lock, filling_.front(), reason);
}

/// Whether a request has to call `tick`, because nobody else does.
bool WriteCache::due() const {
  const Lock lock(mutex_);
  return budget_.excess() > 0 || may_retry(lock, Unit::Clock::now()) ||
         affordable_block() != affordable_;
}

bool WriteCache::writing() const {
  const Lock lock(mutex_);
  return queued_ + claimed_ > 0;
}

std::size_t WriteCache::waiting() const {
  return waiting(Lock(mutex_));
}

std::size_t WriteCache::waiting(const Lock& /*lock*/) const {
  return queued_ + (next_to_reserve_ ? 1 : 0);
}

std::optional<WriteCache::Clock::time_point> WriteCache::oldest() const {
  const Lock lock(mutex_);
  if (!settings_.wake_writer)
    return std::nullopt; // nobody would write it
  return filling_.empty() ? std::nullopt : std::optional(filling_.front().touched);
}

void WriteCache::queue_oldest() {
  const Lock lock(mutex_);
  if (!filling_.empty())
    enqueue(lock, filling_.front(), Unit::Reason::memory);
}

void WriteCache::drop_clean(const Lock& lock) {
  while (!clean_.empty())
    drop(lock, clean_.front());
}

void WriteCache::drop(const Lock& /*lock*/, Unit& unit) {
  units_.erase(unit.range().begin);
  if (units_.empty())
    unit_size_ = wanted_unit_size_;
}

std::size_t WriteCache::release_clean(std::size_t bytes) {
  const Lock lock(mutex_);
  std::size_t released = 0;
  while (released < bytes && !clean_.empty()) {
    released += unit_size_ + bookkeeping();
    drop(lock, clean_.front());
  }
  return released;
}

// ---- The layout

std::uint64_t WriteCache::unit_size_for(std::uint64_t cluster_size) const noexcept {
  return std::bit_ceil(std::max({cluster_size, least_unit_size, affordable_}));
}

std::uint64_t WriteCache::affordable_block() const {
  if (preferred_ <= least_unit_size)
    return preferred_;
  const std::size_t units = std::max(least_units, least_units_each * budget_.sharers());
  return std::min(preferred_, std::bit_floor<std::uint64_t>(budget_.limit() / units));
}

void WriteCache::share_memory(const Lock& /*lock*/, bool shares) {
  if (shares_ != shares)
    budget_.set_shares(account_, shares);
  shares_ = shares;
}

/// Units become smaller at once where there is less memory, or more who share it; and larger when
/// nothing has to be written in pieces for that.
void WriteCache::follow_memory(const Lock& lock) {
  const std::uint64_t block = affordable_block();
  if (block == affordable_ || (block > affordable_ && !all_stored(lock)))
    return;
  affordable_ = block;
  relayout(lock);
  tell_layout(lock);
}

void WriteCache::relayout(const Lock& lock) {
  std::optional<std::uint64_t> cluster_size = settings_.cluster_size;
  if (const auto header = header_.header(size_); header && !cluster_size)
    cluster_size = header->cluster_size();
  has_layout_ = cluster_size.has_value();
  if (cluster_size)
    wanted_unit_size_ = unit_size_for(*cluster_size);
  if (has_layout_ && wanted_unit_size_ < preferred_ && settings_.short_of_memory &&
      budget_.allows_two(wanted_unit_size_, bookkeeping()))
    settings_.short_of_memory(preferred_, wanted_unit_size_);
  if (has_layout_ && wanted_unit_size_ == unit_size_)
    return;
  // Units of another size, or of an image that is gone, are written as they are, and soon.
  drop_clean(lock);
  if (units_.empty())
    unit_size_ = wanted_unit_size_;
  queue_filling(lock, Unit::Reason::new_layout);
}

void WriteCache::header_changed(const Lock& lock, const ByteRange& range) {
  if (!range.overlaps(HeaderWatch::watched(size_)))
    return;
  if (header_.complete(size_))
    header_unread_ = 0;
  else
    layout_was_read_ = settings_.cluster_size || header_unread_ >= most_header_reads;
  relayout(lock);
  tell_layout(lock);
}

/// Whether the header is not known, and there is memory to do something about it.
bool WriteCache::header_wanted(const Lock& /*lock*/) const noexcept {
  return budget_.allows_two(unit_size_, bookkeeping()) && !header_.complete(size_);
}

void WriteCache::learn_layout(Storage& storage) {
  const Capabilities& capabilities = storage.capabilities();
  const ByteRange watched = HeaderWatch::watched(capabilities.size);
  if (settings_.cluster_size || watched.empty())
    return;
  std::uint64_t forgotten = 0;
  {
    const Lock lock(mutex_);
    if (is_guest(storage))
      return; // what it reads may be another disk's
    if (!header_wanted(lock)) {
      layout_was_read_ = header_.complete(size_);
      tell_layout(lock);
      return;
    }
    layout_was_read_ = true;
    forgotten = forgotten_;
  }
  try {
    // A whole block: what the client reads of the header next is in it.
    const ByteRange block{
        0, std::min(align_up(watched.end, capabilities.write_alignment()), capabilities.size)};
    const RangeLock::Owned owned = ranges_.own(block);
    std::vector<std::byte> data(block.size());
    storage.read(block.begin, data);
    const Lock lock(mutex_);
    if (forgotten != forgotten_)
      return; // whose disk this was read from is no longer known: the next request reads again
    ByteRanges gaps;
    std::vector<std::byte> current = data;
    copy_cached(lock, block.begin, current, gaps);
    header_.learn(block.begin, current);
    header_unread_ = 0;
    relayout(lock);
    tell_layout(lock);
    witnesses_.read({block.begin, block.begin + data.size()}, data);
    keep_header(lock, data);
  } catch (const std::exception&) {
    // Storage has said why. No layout is known, so nothing is cached for now.
    const Lock lock(mutex_);
    if (forgotten != forgotten_)
      return;
    ++header_unread_;
    layout_was_read_ = header_unread_ >= most_header_reads;
    tell_layout(lock);
  }
}

/// A client has read where the header is: so can the cache.
void WriteCache::header_can_be_read() {
  const Lock lock(mutex_);
  if (std::exchange(header_unread_, 0) > 0 && !header_.complete(size_))
    layout_was_read_ = false;
}

/// The client comes back to the header at once: `data`, with which storage begins, is kept.
void WriteCache::keep_header(const Lock& lock, std::span<const std::byte> data) noexcept {
  if (!caching(lock) || wanted_unit_size_ != unit_size_ || units_.contains(0))
    return;
  try {
    if (std::shared_ptr<Unit::Buffer> buffer = take_buffer(lock, {}))
      add_unit(lock, 0, std::move(buffer))
          .learn(0, data.first(std::min<std::size_t>(data.size(), unit_size_)), nullptr);
  } catch (const std::bad_alloc&) {
    // Nothing is kept: storage has it.
  }
}

WriteCache::KnownHeader WriteCache::header() const {
  const Lock lock(mutex_);
  return {header_.complete(size_), header_.header(size_)};
}

void WriteCache::learn_zeros(Storage& storage, const ByteRange& range) {
  // Large, but not so large that the answer for a fragmented file takes megabytes.
  constexpr std::uint64_t window = std::uint64_t{128} * 1024 * 1024;
  const Capabilities& capabilities = storage.capabilities();
  if (!capabilities.can_extents)
    return;
  // From here to the end of the window: clients mostly write forward.
  ByteRange rest{align_down(range.begin, least_unit_size),
                 std::min(align_up(range.end, window), capabilities.size)};
  while (!rest.empty()) {
    ZeroMap::Question question;
    {
      const Lock lock(mutex_);
      if (is_guest(storage) || zero_map_.asked(range))
        return;
      question = zero_map_.ask();
    }
    ByteRange answered{rest.begin, rest.begin};
    ByteRanges zeros;
    try {
      for (const Storage::Extent& extent : storage.extents(rest, false)) {
        const bool reads_zero = extent.type == Storage::ExtentType::zero ||
                                extent.type == Storage::ExtentType::hole_and_zero;
        if (reads_zero && zeros.count() < ZeroMap::most_ranges)
          zeros.add(extent.range);
        answered.end = extent.range.end;
      }
    } catch (const std::system_error&) {
      answered = rest; // nothing was learned, but asking again would not help
    } catch (...) {
      const Lock lock(mutex_);
      zero_map_.withdraw(question);
      throw;
    }
    // Where storage's answer ends inside a block, the block is asked about again. When that was all
    // it said, what follows is taken for data.
    const std::uint64_t whole = align_down(answered.end, capabilities.minimum);
    const bool progress = whole > rest.begin;
    answered.end = std::min(progress ? whole : rest.begin + least_unit_size, rest.end);
    if (!progress)
      zeros.clear();
    zeros.remove({answered.end, UINT64_MAX});
    const Lock lock(mutex_);
    zero_map_.learn(question, answered, zeros);
    rest.begin = answered.end;
  }
}

void WriteCache::set_size(std::uint64_t size) {
  const Lock lock(mutex_);
  if (size > size_) {
    const std::uint64_t last = align_down(size_, unit_size_);
    for_each_unit(lock, {last, size}, [](Unit& unit) { unit.has_room = false; });
  }
  size_ = size;
}

std::uint64_t WriteCache::size() const {
  const Lock lock(mutex_);
  return size_;
}

void WriteCache::forget_all() {
  const Lock lock(mutex_);
  share_memory(lock, !all_stored(lock));
  forget_learned(lock);
}

void WriteCache::forget_learned(const Lock& lock) {
  drop_clean(lock);
  for_each_unclean(lock, [](Unit& unit) { unit.forget(unit.range()); });
  zero_map_.clear();
  room_.clear();
  next_to_reserve_.reset();
  for_each_unclean(lock, [](Unit& unit) { unit.has_room = false; });
  header_.forget({0, qcow2::header_bytes});
  layout_was_read_ = settings_.cluster_size.has_value();
  header_unread_ = 0;
  ++forgotten_;
  relayout(lock);
}

// ---- Who uses the cache

void WriteCache::admit(Storage& user) {
  const Lock lock(mutex_);
  users_.push_back(&user);
  user.set_trusted_by(nullptr);
}

void WriteCache::trust(Storage& user) {
  const Lock lock(mutex_);
  user.set_trusted_by(this);
}

void WriteCache::leave(const Storage& user) noexcept {
  const Lock lock(mutex_);
  std::erase(users_, &user);
  flushes_->forget(user);
}

bool WriteCache::found_anew(const Storage& founder) {
  auto flushes = std::make_shared<GroupFlush>();
  const Lock lock(mutex_);
  if (!all_stored(lock))
    return false;
  flushes_ = std::move(flushes);
  for (Storage* const user : users_)
    user->set_trusted_by(user == &founder ? this : nullptr);
  witnesses_.clear();
  forget_learned(lock);
  return true;
}

bool WriteCache::passes_through(const Lock& lock) const {
  return header_.complete(size_) && !caching(lock) && all_stored(lock);
}

bool WriteCache::passes_through() const {
  return passes_through(Lock(mutex_));
}

bool WriteCache::clean(const Lock& lock, const ByteRange& range) const {
  if (all_stored(lock))
    return true;
  for (auto it = units_.lower_bound(align_down(range.begin, unit_size_));
       it != units_.end() && it->first < range.end; ++it) {
    const Unit& unit = it->second;
    if (unit.dirty().overlaps(range) || unit.in_flight().overlaps(range))
      return false;
  }
  return true;
}

bool WriteCache::clean(const ByteRange& range) const {
  return clean(Lock(mutex_), range);
}

bool WriteCache::admits_guest(bool changes, const ByteRange& range) const {
  const Lock lock(mutex_);
  return passes_through(lock) || (!changes && clean(lock, range));
}

WriteCache::Likeness WriteCache::compare(Storage& storage, Unit::Clock::time_point opened) {
  const Capabilities& capabilities = storage.capabilities();
  Witnesses::All known;
  {
    const Lock lock(mutex_);
    known = witnesses_.all();
  }
  std::vector<std::byte> data;
  Likeness likeness = Likeness::unknown;
  for (const Witnesses::Witness& witness : known) {
    const ByteRange blocks = align_outward(witness.block, capabilities.write_alignment())
                                 .intersection({0, capabilities.size});
    if (blocks.contains(witness.block)) {
      const RangeLock::Owned owned = ranges_.own(blocks); // so that nobody changes it meanwhile
      const auto still_true = [&] {
        const Lock lock(mutex_);
        return std::ranges::find(witnesses_.all(), witness) != witnesses_.all().end();
      };
      if (still_true()) {
        data.resize(blocks.size());
        storage.read(blocks.begin, data);
        const auto block =
            std::span(data).subspan(witness.block.begin - blocks.begin, witness.block.size());
        if (Witnesses::checksum(block) != witness.checksum)
          return Likeness::other_disk;
        if (witness.written && *witness.written > opened)
          return Likeness::same_disk;
        if (witness.written || likeness == Likeness::unknown)
          likeness = witness.written ? Likeness::alike : Likeness::begins_alike;
      }
    }
  }
  return likeness;
}

bool WriteCache::has_news(Unit::Clock::time_point opened) const {
  const Lock lock(mutex_);
  return std::ranges::any_of(witnesses_.all(), [&](const Witnesses::Witness& witness) {
    return witness.written && *witness.written > opened;
  });
}

bool WriteCache::store_some() {
  Lock lock(mutex_);
  // Where a few are all zeros more would hardly show more.
  constexpr std::size_t most = 4;
  boost::container::small_vector<std::uint64_t, most> oldest;
  for (UseOrder* const list : {&filling_, &busy_}) {
    for (auto unit = list->begin(); unit != list->end() && oldest.size() < most; ++unit)
      oldest.push_back(unit->range().begin);
  }
  bool stored = false;
  for (const std::uint64_t begin : oldest) {
    const Witnesses::All before = witnesses_.all();
    const Attempt attempt = write_unit(lock, begin, nullptr, Unit::Reason::comparison);
    stored = stored || attempt == Attempt::stored;
    if (attempt == Attempt::gone) {
      if (const Unit* const unit = find(lock, begin);
          unit != nullptr && unit->turn == Unit::Turn::claimed)
        progress_.wait(lock); // somebody else writes it
      stored = true;
    }
    if (witnesses_.all() != before)
      return true;
  }
  return stored;
}

// ---- Writing

/// A place in the line of those who could not be served at once, as long as it lives.
class WriteCache::InLine {
public:
  explicit InLine(WriteCache& cache) noexcept : cache_(cache), place_(cache.line_.behind_all()) {}
  InLine(const InLine&) = delete;
  InLine& operator=(const InLine&) = delete;
  ~InLine() {
    if (!joined_)
      return;
    const Lock lock(cache_.mutex_);
    forgo_memory(lock);
    cache_.line_.leave(place_);
    cache_.line_moved_.notify_all();
  }

  /// Unless it has one already.
  void join(const Lock& /*lock*/, const ByteRange& range) {
    if (!joined_)
      place_ = cache_.line_.join(range);
    joined_ = true;
  }
  /// REQUIRES: it has joined.
  void wait_for_memory(const Lock& /*lock*/) { cache_.line_.wait_for_memory(place_, true); }
  void forgo_memory(const Lock& /*lock*/) noexcept {
    if (joined_ && place_->waits_for_memory) {
      cache_.line_.wait_for_memory(place_, false);
      cache_.budget_.note_change(); // who comes after may take some now
    }
  }
  [[nodiscard]] bool joined() const noexcept { return joined_; }
  [[nodiscard]] WriteLine::Place place() const noexcept { return place_; }

private:
  WriteCache& cache_;
  WriteLine::Place place_;
  bool joined_ = false;
};

void WriteCache::wake(std::size_t waiting) const {
  if (waiting > 0 && settings_.wake_writer)
    settings_.wake_writer(waiting);
}

WriteCache::Taken WriteCache::absorb(Lock& lock, WriteLine::Place place, const Storage& writer,
                                     std::uint64_t offset, std::span<const std::byte> data,
                                     const ByteRange* request, std::span<std::byte> refreshed) {
  if (request != nullptr)
    count_write(lock, *request);
  if (!caching(lock) || is_guest(writer))
    return {Absorbed::off};
  if (!shares_) {
    share_memory(lock, true);
    follow_memory(lock);
  }
  // What completes the blocks of a write was on storage already, and older than whatever anybody in
  // the line asks for.
  const bool completes = !refreshed.empty();
  if (completes) {
    ByteRanges gaps;
    copy_cached(lock, offset, refreshed, gaps);
  }
  if (no_trust_ && !completes)
    return {Absorbed::no_trust};
  if (!recorded_ && settings_.hold)
    return {Absorbed::unrecorded};

  // First everything that can fail, so that a write is taken whole or not at all.
  const ByteRange range{offset, offset + data.size()};
  if (!completes && !line_.empty() && line_.is_behind(place, range))
    return {Absorbed::behind_others};
  for (ByteRange rest = range; !rest.empty();) {
    const std::uint64_t begin = align_down(rest.begin, unit_size_);
    const auto found = units_.find(begin);
    if (found == units_.end()) {
      const bool is_next = completes || line_.may_take_memory(place);
      if (!is_next || beyond_share(lock) || beyond_delay(lock))
        return {Absorbed::no_memory};
      if (!completes && holds_in_vain(lock))
        return {Absorbed::no_gain};
      if (!completes && !has_room(lock, writer, {begin, begin + unit_size_}))
        return {Absorbed::unreserved};
      std::shared_ptr<Unit::Buffer> buffer = take_buffer(lock, range);
      if (!buffer)
        return {Absorbed::no_memory};
      add_unit(lock, begin, std::move(buffer));
      if (settings_.wake_writer && !next_to_reserve_ && !asks_for_room_)
        next_to_reserve_ = room_.next_unit({begin, begin + unit_size_}, size_);
    } else if (!completes && !found->second.has_room &&
               !has_room(lock, writer, found->second.range())) {
      return {Absorbed::unreserved};
    } else if (found->second.fragmented()) {
      enqueue(lock, found->second, Unit::Reason::many_pieces);
      return {Absorbed::unit_busy};
    } else if (found->second.pinned()) {
      std::shared_ptr<Unit::Buffer> second = take_buffer(lock, range);
      if (!second)
        return {Absorbed::unit_busy};
      found->second.replace_buffer(std::move(second));
    }
    rest.begin = begin + unit_size_;
  }

  const auto now = Unit::Clock::now();
  bool completed = false;
  const std::size_t unclean = unclean_units_;
  // A write with ragged ends has storage read what completes its blocks.
  const bool ragged = ((range.begin | range.end) & (completed_block_ - 1)) != 0;
  last_held_ = ++moment_;
  for_each_unit(lock, range, [&](Unit& unit) {
    const ByteRange part = range.intersection(unit.range());
    unit.absorb(part.begin, data.subspan(part.begin - offset, part.size()), moment_);
    unit.touched = now;
    unit.written_whole = false;
    unit.completed_before = units_completed_;
    unit.several_writers = unit.several_writers || (unit.counted && unit.last_writer != &writer);
    unit.last_writer = &writer;
    unit.spared += ragged ? 2 : 1;
    unit.has_room = unit.has_room || room_.has(unit.range().intersection({0, size_}));
    this->place(lock, unit);
    count_unclean(lock, unit, true);
    if (unit.full(size_) && !unit.was_refused &&
        join_queue(lock, unit, Unit::Reason::cluster_end)) {
      completed = true;
      ++units_completed_;
    }
  });
  queue_left_behind(lock, now);
  if (unclean_units_ > unclean)
    keep_writers_busy(lock);
  header_.wrote(offset, data);
  header_changed(lock, range);
  const std::size_t to_wake_for = completed || next_to_reserve_ ? waiting(lock) : 0;
  lock.unlock(); // a writer that is called would only run into it
  tell(settings_.events.trace, [&] { return "absorbed " + to_string(range); });
  return {Absorbed::held, to_wake_for};
}

void WriteCache::write(Storage& storage, std::uint64_t offset, std::span<const std::byte> data,
                       bool fua) {
  const ByteRange request{offset, offset + data.size()};
  InLine place(*this);
  take(place, storage, offset, data, fua, &request);
}

/// Whether storage shall have a write as the client sent it: it is as large as any that units are
/// merged into, or memory would hardly hold it, and has nothing to be completed. One that is no
/// larger than a unit is held: alone or with others it is one request.
bool WriteCache::passes_as_it_came(const Storage& storage, const ByteRange& range) const {
  if (range.size() <= unit_size())
    return false;
  const Capabilities& capabilities = storage.capabilities();
  const std::uint64_t large = std::min<std::uint64_t>(settings_.max_write, budget_.limit() / 4);
  return range.size() >= large && align_outward(range, capabilities.rewritten_block())
                                          .intersection({0, capabilities.size}) == range;
}

/// The whole of `write`, from `place` in the line; `request`, if any, is a client's, to be counted.
void WriteCache::take(InLine& place, Storage& storage, std::uint64_t offset,
                      std::span<const std::byte> data, bool fua, const ByteRange* request) {
  ByteRange rest{offset, offset + data.size()};
  if (!layout_was_read_) {
    if (const Lock lock(mutex_); header_wanted(lock))
      place.join(lock, rest); // storage may take long to answer
    learn_layout(storage);
  }
  if (fua || passes_as_it_came(storage, rest)) {
    if (request != nullptr)
      count_write(Lock(mutex_), *request);
    write_through(place, storage, offset, data, fua);
    return;
  }
  // Writers are called once for all that the request completes: they merge it then.
  std::size_t to_wake_for = 0;
  const auto absorbs = [&](const ByteRange& piece) {
    try {
      Lock lock(mutex_);
      const Taken taken = absorb(lock, place.place(), storage, piece.begin,
                                 data.subspan(piece.begin - offset, piece.size()),
                                 std::exchange(request, nullptr), {});
      if (taken.absorbed != Absorbed::held)
        place.join(lock, rest); // nobody who comes from now on is served before it
      to_wake_for = std::max(to_wake_for, taken.to_wake_for);
      return taken.absorbed;
    } catch (const std::bad_alloc&) {
      return Absorbed::off; // going through takes less
    }
  };
  while (!rest.empty()) {
    const std::uint64_t size = unit_size(); // once: it may change at any time
    const std::uint64_t border = align_down(rest.begin, size) + size;
    const ByteRange piece{rest.begin, std::min(rest.end, border)};
    if (place.joined())
      stay_connected();
    const Absorbed absorbed = absorbs(piece);
    if (absorbed == Absorbed::held) {
      rest.begin = piece.end;
      continue;
    }
    wake(std::exchange(to_wake_for, 0));
    bool goes_through = false;
    switch (absorbed) {
    case Absorbed::off:
      place.join(Lock(mutex_), rest); // memory may have failed it before it had
      tick(); // what is still cached has nobody else to write it, without background writers
      if (begins_without_room(storage, rest.begin, data.subspan(rest.begin - offset))) {
        // Whether it fits storage says itself.
        static_cast<void>(reserve(storage, {0, least_unit_size}));
      }
      goes_through = true;
      break;
    case Absorbed::no_memory:
      place.wait_for_memory(Lock(mutex_));
      goes_through = !make_room(storage, place);
      break;
    case Absorbed::unit_busy:
      place.forgo_memory(Lock(mutex_)); // who has that unit may take long
      goes_through = !write_busy_units(storage, piece);
      break;
    case Absorbed::behind_others:
      place.forgo_memory(Lock(mutex_));
      wait_turn(place, piece);
      break;
    case Absorbed::no_gain:
    case Absorbed::no_trust:
      goes_through = true;
      break;
    case Absorbed::unrecorded:
      goes_through = !record();
      break;
    case Absorbed::unreserved:
      // Storage may take long to answer.
      place.forgo_memory(Lock(mutex_));
      goes_through = !reserve(storage, {border - size, border});
      break;
    case Absorbed::held:
      break;
    }
    if (goes_through) {
      place.forgo_memory(Lock(mutex_));
      write_through(place, storage, rest.begin, data.subspan(rest.begin - offset), false);
      rest.begin = rest.end;
    }
  }
  wake(to_wake_for);
  if (!settings_.wake_writer) {
    if (due())
      tick();
    // Its own share, and one more so that nothing waits for ever: others pay for theirs.
    const std::uint64_t each = std::max(unit_size(), largest_merged(storage));
    for (std::uint64_t writes = 2 + data.size() / each;
         writes > 0 && !holds_back() && write_next(storage); --writes) {
    }
  }
}

/// Returns whether it is written down that something is held here.
bool WriteCache::record() {
  if (!settings_.hold())
    return false;
  bool already = false;
  {
    const Lock lock(mutex_);
    already = std::exchange(recorded_, true);
  }
  if (already)
    settings_.release(); // another request was as quick
  return true;
}

bool WriteCache::recorded() const {
  const Lock lock(mutex_);
  return recorded_;
}

/// Flushes storage: where it had everything before, and nothing was held meanwhile, there is
/// nothing then that a crash could take.
void WriteCache::flush_storage(Storage& storage, bool may_share) {
  // A guest's may be another disk.
  const auto held_if_stored = [&](const Lock& lock) {
    return all_stored(lock) && !is_guest(storage) ? std::optional(last_held_) : std::nullopt;
  };
  std::optional<std::uint64_t> held;
  std::uint64_t changed = 0;
  // Those who share it are trusted together: who founds the cache anew shares with nobody before.
  std::shared_ptr<GroupFlush> flushes;
  bool shares = false;
  {
    const Lock lock(mutex_);
    held = held_if_stored(lock);
    changed = moment_;
    flushes = flushes_;
    const Capabilities& capabilities = storage.capabilities();
    // Where nothing is cached storage gets the requests that clients send.
    const bool as_it_came = !caching(lock);
    shares = may_share && capabilities.can_multi_conn && capabilities.can_flush &&
             !is_guest(storage) && !as_it_came;
    if (held && !recorded_ && !as_it_came && flushes->is_flushed(storage, changed))
      return;
  }
  flushes->flush(storage, shares, held ? std::optional(changed) : std::nullopt,
                 [this] { stay_connected(); });
  {
    const Lock lock(mutex_);
    if (flushes != flushes_)
      held.reset(); // of a disk that is another's by now
    if (held && !is_guest(storage))
      flushed_ = std::max(flushed_, changed);
    const bool settled = held && held_if_stored(lock) == held;
    if (!settled || !std::exchange(recorded_, false))
      return;
  }
  settings_.release();
}

/// Whether storage has been flushed since a client last changed something.
bool WriteCache::all_flushed(const Lock& lock) const {
  return all_stored(lock) && flushed_ == moment_;
}

void WriteCache::abandon() noexcept {
  bool recorded = false;
  {
    const Lock lock(mutex_);
    recorded = std::exchange(recorded_, false);
  }
  if (recorded)
    settings_.release();
}

/// Who sent the request may be gone: it is not for a client that nobody can ask any more.
void WriteCache::stay_connected() const {
  if (settings_.interrupted && settings_.interrupted())
    throw std::system_error(ESHUTDOWN, std::generic_category(), "the connection has ended");
}

/// Until those who came before have been answered as far as they asked for `range`.
void WriteCache::wait_turn(InLine& place, const ByteRange& range) {
  constexpr std::chrono::milliseconds between_questions{50};
  Lock lock(mutex_);
  place.join(lock, range);
  while (line_.is_behind(place.place(), range)) {
    line_moved_.wait_for(lock, between_questions);
    lock.unlock();
    stay_connected();
    lock.lock();
  }
}

void WriteCache::write_through(InLine& place, Storage& storage, std::uint64_t offset,
                               std::span<const std::byte> data, bool fua) {
  const Capabilities& capabilities = storage.capabilities();
  const ByteRange range{offset, offset + data.size()};
  wait_turn(place, range);
  if (!layout_was_read_)
    learn_layout(storage); // whoever knew it may have left since this began
  const std::uint64_t alignment = caching() ? capabilities.write_alignment() : capabilities.minimum;
  const ByteRange blocks = align_outward(range, alignment).intersection({0, capabilities.size});
  settings_.counters->add(Count::writes_through);
  tell(settings_.events.trace, [&] { return "writing through " + to_string(range); });
  if (blocks != range)
    learn_zeros(storage, blocks);

  const RangeLock::Owned owned = ranges_.own(blocks);
  const auto begun = Unit::Clock::now();
  try {
    if (blocks == range || blocks.size() <= largest_bounce) {
      write_piece_through(storage, offset, data, blocks, fua);
    } else {
      // The middle needs no copy; only a block at either end may have to be completed.
      const ByteRange middle = align_inward(range, alignment);
      const bool each = fua && capabilities.fua == Fua::native;
      const auto part = [&](const ByteRange& piece) {
        return data.subspan(piece.begin - offset, piece.size());
      };
      const ByteRange head{range.begin, middle.begin};
      const ByteRange tail{middle.end, range.end};
      if (!head.empty())
        write_piece_through(storage, head.begin, part(head), {blocks.begin, middle.begin}, each);
      write_piece_through(storage, middle.begin, part(middle), middle, tail.empty() ? fua : each);
      if (!tail.empty())
        write_piece_through(storage, tail.begin, part(tail), {middle.end, blocks.end}, fua);
    }
  } catch (...) {
    failed_on_storage(blocks);
    budget_.answered(account_, false);
    throw;
  }
  budget_.answered(account_, true);

  {
    const Lock lock(mutex_);
    ++moment_;
    if (is_guest(storage)) {
      changed_by_guest(lock, blocks);
    } else {
      zero_map_.changed(blocks);
      room_.wrote(blocks);
      witnesses_.changed(blocks);
      for_each_unit(lock, range, [&](Unit& unit) {
        const ByteRange piece = range.intersection(unit.range());
        unit.wrote_through(piece.begin, data.subspan(piece.begin - offset, piece.size()));
        settle(lock, unit);
      });
      witnesses_.wrote(range, data, begun);
      header_.wrote(offset, data);
      header_changed(lock, range);
      if (range.begin == 0)
        keep_header(lock, data);
    }
  }
  changed_on_storage(blocks);
}

void WriteCache::write_piece_through(Storage& storage, std::uint64_t offset,
                                     std::span<const std::byte> data, const ByteRange& blocks,
                                     bool fua) {
  if (blocks.size() == data.size()) {
    storage.write(offset, data, fua);
    return;
  }
  std::vector<std::byte> whole(blocks.size());
  ByteRanges gaps;
  {
    const Lock lock(mutex_);
    if (is_guest(storage)) {
      gaps.add(blocks); // what is known here may be known of another disk
    } else {
      copy_cached(lock, blocks.begin, whole, gaps);
      gaps.remove(zero_map_.zeros_in(blocks)); // `whole` is zeros where nothing was copied
    }
  }
  gaps.remove({offset, offset + data.size()});
  if (!gaps.empty()) {
    const ByteRange hull =
        align_outward(gaps.hull(), storage.capabilities().write_alignment()).intersection(blocks);
    std::vector<std::byte> read(hull.size());
    storage.read(hull.begin, read);
    count_fill_up(hull);
    for (const ByteRange& gap : gaps)
      copy_bytes(std::span(read).subspan(gap.begin - hull.begin, gap.size()),
                 whole.begin() + static_cast<std::ptrdiff_t>(gap.begin - blocks.begin));
  }
  copy_bytes(data, whole.begin() + static_cast<std::ptrdiff_t>(offset - blocks.begin));
  try {
    storage.write(blocks.begin, whole, fua);
  } catch (const NotAsWritten&) {
    // The client has its own bytes; those around them nobody else has, if it was these that storage
    // damaged. Where they cannot be cached storage gets a second chance; after that the error is
    // all that is left to say.
    if (absorb_around(storage, blocks, {offset, offset + data.size()}, whole))
      throw;
    storage.write(blocks.begin, whole, fua);
  }
}

/// Takes what `whole`, the bytes of `blocks`, has outside `range` for dirty, where no client has
/// written newer bytes meanwhile. Returns whether all of it is in memory now.
bool WriteCache::absorb_around(const Storage& writer, const ByteRange& blocks,
                               const ByteRange& range, std::span<std::byte> whole) noexcept {
  const auto absorbs = [&](const ByteRange& part) {
    const std::span<std::byte> around = whole.subspan(part.begin - blocks.begin, part.size());
    if (part.empty())
      return true;
    Taken taken;
    do {
      Lock lock(mutex_);
      taken = absorb(lock, line_.behind_all(), writer, part.begin, around, nullptr, around);
    } while (taken.absorbed == Absorbed::unrecorded && record());
    wake(taken.to_wake_for);
    return taken.absorbed == Absorbed::held;
  };
  try {
    return absorbs({blocks.begin, range.begin}) && absorbs({range.end, blocks.end});
  } catch (const std::bad_alloc&) {
    return false;
  }
}

/// Memory is used up, or what this export may have of it. Returns whether it is worth trying again:
/// not where only others could give some back, for their storage may hang.
bool WriteCache::make_room(Storage& storage, InLine& place) {
  const std::uint64_t seen = budget_.changes();
  std::size_t needed = 0;
  bool is_next = false;
  bool greedy = false;
  bool owes = false;
  bool pays = false;
  bool more_at_once = false;
  {
    const Lock lock(mutex_);
    needed = unit_size_ + bookkeeping();
    is_next = line_.may_take_memory(place.place());
    greedy = beyond_share(lock) || beyond_delay(lock);
    owes = !filling_.empty() || !busy_.empty();
    pays = savings_.pays();
    more_at_once = jobs_ < line_.waiting_for_memory();
  }
  if (is_next && !greedy && budget_.reclaim(needed))
    return true;
  if (!pays)
    return false;
  const Counters::Stopwatch waiting(*settings_.counters, Count::memory_wait);
  // Should the background writers all be busy elsewhere requests write units themselves.
  constexpr std::chrono::milliseconds patience{20};
  if (is_next) {
    if (!settings_.wake_writer)
      return write_oldest(storage);
    if (!budget_.press(*this) || !owes)
      return false;
  }
  // Storage has as many requests at once as clients would have under way without the cache. Where
  // there is memory for who is next that one may hang, and need not be joined.
  const bool free = budget_.used() + needed <= budget_.limit();
  if (more_at_once && !free && write_oldest(storage))
    return true;
  return budget_.wait_for_change(seen, patience) || !is_next || write_oldest(storage);
}

bool WriteCache::write_oldest(Storage& storage) {
  Lock lock(mutex_);
  // Only so many: what cannot be written now may be at the front for long.
  constexpr std::size_t most_tries = 4;
  boost::container::small_vector<std::uint64_t, most_tries> oldest;
  for (UseOrder* const list : {&busy_, &filling_}) {
    for (auto unit = list->begin(); unit != list->end() && oldest.size() < most_tries; ++unit) {
      if (unit->turn != Unit::Turn::claimed)
        oldest.push_back(unit->range().begin);
    }
  }
  for (const std::uint64_t begin : oldest) {
    if (write_unit(lock, begin, &storage, Unit::Reason::memory) != Attempt::nobody)
      return true; // one that was refused stays where it is; the next round finds another, or none
  }
  const bool others_write = claimed_ > 0;
  if (others_write)
    progress_.wait(lock);
  return others_write;
}

bool WriteCache::write_busy_units(Storage& storage, const ByteRange& range) {
  Lock lock(mutex_);
  Unit* busy = nullptr;
  for_each_unit(lock, range, [&](Unit& unit) {
    if (unit.pinned() || unit.fragmented())
      busy = &unit;
  });
  if (busy == nullptr)
    return true;
  if (busy->clean() && busy->turn != Unit::Turn::claimed) {
    busy->forget_clean();
    return true;
  }
  if (busy->turn == Unit::Turn::claimed) {
    progress_.wait(lock);
    return true;
  }
  const Attempt attempt =
      write_unit(lock, busy->range().begin, &storage, Unit::Reason::many_pieces);
  return attempt == Attempt::stored || attempt == Attempt::gone;
}

// ---- Reading

void WriteCache::copy_cached(const Lock& lock, std::uint64_t offset, std::span<std::byte> data,
                             ByteRanges& gaps) {
  const ByteRange range{offset, offset + data.size()};
  gaps.add(range);
  for_each_unit(lock, range, [&](Unit& unit) {
    const ByteRanges known = unit.known().inside(range);
    for (const ByteRange& part : known)
      copy_bytes(unit.bytes(part), data.begin() + static_cast<std::ptrdiff_t>(part.begin - offset));
    gaps.remove(known);
  });
}

void WriteCache::read(Storage& storage, std::uint64_t offset, std::span<std::byte> data) {
  // Who reads the header begins to work on the image, and reads more of it soon.
  const bool begins = offset < HeaderWatch::watched(storage.capabilities().size).end;
  if (!layout_was_read_ && begins)
    learn_layout(storage);
  // The cache first and storage after: a unit may be written and dropped in between, but then
  // storage has it. The other way round a read could see bytes from before.
  ByteRanges gaps;
  {
    const Lock lock(mutex_);
    // A guest is asked to compare before it reads what is not on storage; what is it has itself.
    if (is_guest(storage))
      gaps.add({offset, offset + data.size()});
    else
      copy_cached(lock, offset, data, gaps);
    settings_.counters->add(Count::client_reads);
    settings_.counters->add(Count::client_read_bytes, data.size());
  }
  const Capabilities& capabilities = storage.capabilities();
  std::vector<std::byte> bounce;
  for (auto gap = gaps.begin(); gap != gaps.end();) {
    ByteRange together = *gap;
    auto behind = gap + 1;
    while (behind != gaps.end() && behind->begin - together.end < worth_reading_over &&
           behind->end - together.begin <= largest_bounce) {
      together.end = behind->end;
      ++behind;
    }
    const ByteRange blocks = align_outward(together, capabilities.minimum);
    if (behind == gap + 1 && blocks == together) {
      storage.read(together.begin, data.subspan(together.begin - offset, together.size()));
      ++gap;
    } else {
      // Pieces keep the memory for it small; their ends are multiples of any minimum.
      for (ByteRange rest = blocks; !rest.empty();) {
        const ByteRange piece{
            rest.begin,
            std::min(rest.end, align_down(rest.begin, largest_bounce) + largest_bounce)};
        bounce.resize(piece.size());
        storage.read(piece.begin, bounce);
        for (auto part = gap; part != behind; ++part) {
          const ByteRange wanted = part->intersection(piece);
          if (!wanted.empty())
            copy_bytes(std::span(bounce).subspan(wanted.begin - piece.begin, wanted.size()),
                       data.begin() + static_cast<std::ptrdiff_t>(wanted.begin - offset));
        }
        rest.begin = piece.end;
      }
      gap = behind;
    }
  }
  if (begins && !gaps.empty())
    header_can_be_read();
}

Storage::Extents WriteCache::extents(Storage& storage, const ByteRange& range, bool only_first) {
  ByteRanges owed;
  ByteRanges reserved;
  if (!is_guest(storage)) {
    const Lock lock(mutex_);
    reserved = room_.reserved_in(range);
    for_each_unit(lock, range, [&](Unit& unit) {
      owed.add(unit.dirty().inside(range));
      owed.add(unit.in_flight().inside(range));
    });
  }
  const ByteRange blocks = align_outward(range, storage.capabilities().minimum);
  // What was reserved storage may call data, and clients would not have seen it allocated.
  Storage::Extents without_reserved;
  for (const Storage::Extent& extent : storage.extents(blocks, only_first))
    overlay(without_reserved, {extent.range.intersection(range), extent.type}, reserved,
            Storage::ExtentType::hole_and_zero);
  Storage::Extents overlaid;
  for (const Storage::Extent& extent : without_reserved)
    overlay(overlaid, extent, owed, Storage::ExtentType::data);
  if (overlaid.empty()) {
    // Storage spoke only of bytes before the range, in the block that it begins in.
    const std::uint64_t block_end = align_up(range.begin + 1, storage.capabilities().minimum);
    overlaid.push_back({{range.begin, std::min(block_end, range.end)}, Storage::ExtentType::data});
  }
  return overlaid;
}

// ---- Zero and trim

void WriteCache::zero(Storage& storage, const ByteRange& range,
                      const Storage::ZeroOptions& options) {
  settings_.counters->add(Count::client_zeros);
  const ByteRange blocks = align_inward(range, storage.capabilities().minimum);
  if (options.fast && (blocks != range || storage.pieces(blocks) != 1))
    throw std::system_error(ENOTSUP, std::generic_category(), "fast zero");
  InLine place(*this); // until the ragged ends are done as well
  if (!blocks.empty()) {
    wait_turn(place, range);
    const RangeLock::Owned owned = ranges_.own(blocks);
    try {
      storage.zero(blocks, options);
    } catch (const std::system_error& refusal) {
      // Where a fast zero is not supported nothing was done, and there is nothing to forget.
      if (!options.fast || refusal.code() != std::errc::not_supported)
        failed_on_storage(blocks);
      throw;
    } catch (...) {
      failed_on_storage(blocks);
      throw;
    }
    {
      const Lock lock(mutex_);
      ++moment_;
      if (is_guest(storage)) {
        changed_by_guest(lock, blocks);
      } else {
        if (options.may_trim)
          lose_room(lock, blocks);
        else
          room_.wrote(blocks); // a client wants to have it, whether it writes there or not
        witnesses_.changed(blocks);
        for_each_unit(lock, blocks, [&](Unit& unit) {
          unit.zeroed(blocks);
          settle(lock, unit);
        });
        zero_map_.zeroed(blocks);
        header_.zeroed(blocks);
        header_changed(lock, blocks);
      }
    }
    changed_on_storage(blocks);
  }
  const ByteRange head{range.begin, blocks.empty() ? range.end : blocks.begin};
  const ByteRange tail{blocks.empty() ? range.end : blocks.end, range.end};
  for (const ByteRange& ragged : {head, tail}) {
    if (!ragged.empty())
      take(place, storage, ragged.begin, std::vector<std::byte>(ragged.size()), options.fua,
           nullptr);
  }
}

void WriteCache::trim(Storage& storage, const ByteRange& range, bool fua) {
  settings_.counters->add(Count::client_trims);
  const ByteRange blocks = align_inward(range, storage.capabilities().minimum);
  if (blocks.empty())
    return;
  InLine place(*this);
  wait_turn(place, blocks);
  // Cutting a piece out of a unit that is in very many pieces would make one more.
  write_busy_units(storage, {blocks.begin, blocks.begin + 1});
  write_busy_units(storage, {blocks.end - 1, blocks.end});
  const RangeLock::Owned owned = ranges_.own(blocks);
  try {
    storage.trim(blocks, fua);
  } catch (...) {
    failed_on_storage(blocks);
    throw;
  }
  {
    const Lock lock(mutex_);
    if (is_guest(storage))
      changed_by_guest(lock, blocks);
    else
      discard(lock, blocks);
  }
  changed_on_storage(blocks);
}

void WriteCache::discard(const ByteRange& range) {
  discard(Lock(mutex_), range);
}

void WriteCache::discard(const Lock& lock, const ByteRange& range) {
  ++moment_;
  lose_room(lock, range);
  zero_map_.changed(range);
  witnesses_.changed(range);
  for_each_unit(lock, range, [&](Unit& unit) {
    unit.discard(range);
    settle(lock, unit);
  });
  header_.forget(range);
  header_changed(lock, range);
}

void WriteCache::forget(const ByteRange& range) {
  const Lock lock(mutex_);
  ++moment_; // by a connection, maybe, that uses this cache by now
  // Witnesses stay: the other cache may be another's because its disk was found to differ in them.
  forget(lock, range);
}

void WriteCache::forget_witnesses(const ByteRange& range) {
  const Lock lock(mutex_);
  witnesses_.changed(range);
}

void WriteCache::forget(const Lock& lock, const ByteRange& range) {
  for_each_unit(lock, range, [&](Unit& unit) {
    unit.forget(range);
    settle(lock, unit);
  });
  lose_room(lock, range);
  zero_map_.changed(range);
  header_.forget(range);
  for_each_unit(lock, HeaderWatch::watched(size_), [&](Unit& unit) {
    for (const ByteRange& known : unit.known())
      header_.learn(known.begin, unit.bytes(known));
  });
  header_changed(lock, range);
}

/// Maybe on another disk: what others wrote there stays.
void WriteCache::changed_by_guest(const Lock& lock, const ByteRange& range) {
  ++moment_;
  for_each_unit(lock, range, [&](Unit& unit) {
    unit.forget(range);
    settle(lock, unit);
  });
  lose_room(lock, range);
  zero_map_.changed(range);
  witnesses_.changed(range);
  header_.forget(range); // whose it is finds out who is trusted
  header_changed(lock, range);
}

void WriteCache::changed_on_storage(const ByteRange& range) {
  if (settings_.changed_storage)
    settings_.changed_storage(range);
}

void WriteCache::failed_on_storage(const ByteRange& range) {
  // Storage may have changed some of it. Bytes that are dirty will be written once more.
  {
    const Lock lock(mutex_);
    ++moment_;          // a flush makes what was changed durable for those who have read it
    flushes_->failed(); // it may have been one of FUA
    forget(lock, range);
    witnesses_.changed(range);
  }
  changed_on_storage(range);
}

// ---- Flush

bool WriteCache::clean() const {
  const Lock lock(mutex_);
  return all_stored(lock);
}

Unsaved WriteCache::unsaved() const {
  const Lock lock(mutex_);
  Unsaved found;
  if (all_stored(lock))
    return found;
  for (const auto& [begin, unit] : units_) { // in the order of the file, which makes `add` quick
    found.ranges.add(unit.dirty());
    found.ranges.add(unit.in_flight());
  }
  found.bytes = found.ranges.bytes();
  found.error = last_refusal_;
  return found;
}

void WriteCache::flush(Storage& storage) {
  settings_.counters->add(Count::client_flushes);
  if (const std::error_code error = write_owed(storage, Unit::Reason::flush))
    throw std::system_error(error, "not everything could be stored");
  flush_storage(storage, true);
}

std::error_code WriteCache::drain(Storage& storage) {
  std::error_code error = write_owed(storage, Unit::Reason::disconnect);
  // Others may have had stored what was refused here.
  if (recorded() && clean()) {
    try {
      flush_storage(storage, false); // it may be the last chance, and the server about to end
    } catch (const std::system_error& refusal) {
      error = error ? error : refusal.code();
    }
  }
  if (!clean())
    look_at_disk(storage); // what is left may wait for another connection, to be recognised by this
  return error;
}

void WriteCache::look_at_disk(Storage& storage) {
  const std::uint64_t alignment = storage.capabilities().write_alignment();
  const ByteRange block = ByteRange{0, align_up(Witnesses::largest_block, alignment)}.intersection(
      {0, storage.capabilities().size});
  std::uint64_t forgotten = 0;
  {
    const Lock lock(mutex_);
    if (!witnesses_.all().empty())
      return;
    forgotten = forgotten_;
  }
  try {
    const RangeLock::Owned owned = ranges_.own(block);
    std::vector<std::byte> data(block.size());
    storage.read(block.begin, data);
    const Lock lock(mutex_);
    if (forgotten == forgotten_) // or else it may be a guest's by now
      witnesses_.read(block, data);
  } catch (const std::system_error&) {
    // Without it what is left counts as that of a disk that is gone.
  }
}

} // namespace qcowcache
