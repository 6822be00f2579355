#include "cache/group_flush.hpp"

#include <algorithm>
#include <new>

namespace qcowcache {

void GroupFlush::flush(Storage& storage, bool shares, std::optional<std::uint64_t> moment,
                       const std::function<void()>& still_wanted) {
  constexpr std::chrono::milliseconds between_questions{50};
  std::unique_lock lock(mutex_);
  const std::uint64_t needed = begun_ + 1;
  const auto may_share = [&] { return shares && failures_ == 0; };
  const auto answered = [&] { return may_share() && succeeded_ >= needed; };
  const auto enough = std::chrono::steady_clock::now() + patience_;
  while (may_share() && running_ && std::chrono::steady_clock::now() < enough) {
    ended_.wait_for(lock, std::min(between_questions, patience_));
    if (answered())
      return;
    lock.unlock();
    still_wanted();
    lock.lock();
  }
  if (answered())
    return;
  const bool leads = shares && !running_;
  const std::uint64_t number = leads ? ++begun_ : 0;
  const std::uint64_t failures = failures_;
  running_ = running_ || leads;
  lock.unlock();
  try {
    storage.flush();
  } catch (...) {
    lock.lock();
    note_failed();
    running_ = running_ && !leads;
    throw;
  }
  lock.lock();
  if (moment && failures_ == failures)
    note_flushed(storage, *moment);
  if (leads) {
    running_ = false;
    succeeded_ = number;
    ended_.notify_all();
  }
}

/// REQUIRES: the mutex is held.
void GroupFlush::note_flushed(const Storage& storage, std::uint64_t moment) noexcept {
  for (auto& [each, last] : flushed_) {
    if (each == &storage) {
      last = std::max(last, moment);
      return;
    }
  }
  try {
    flushed_.emplace_back(&storage, moment);
  } catch (const std::bad_alloc&) { // it is flushed once more than needed
  }
}

/// REQUIRES: the mutex is held.
void GroupFlush::note_failed() noexcept {
  ++failures_;
  flushed_.clear();
  ended_.notify_all();
}

bool GroupFlush::is_flushed(const Storage& storage, std::uint64_t moment) const noexcept {
  const std::lock_guard lock(mutex_);
  return std::ranges::find(flushed_, std::pair(&storage, moment)) != flushed_.end();
}

void GroupFlush::failed() noexcept {
  const std::lock_guard lock(mutex_);
  note_failed();
}

void GroupFlush::forget(const Storage& storage) noexcept {
  const std::lock_guard lock(mutex_);
  std::erase_if(flushed_, [&](const auto& each) { return each.first == &storage; });
}

} // namespace qcowcache
