#include "cache/group_flush.hpp"

#include <algorithm>
#include <new>

namespace qcowcache {

bool GroupFlush::flush(Storage& storage, bool shares, const std::function<void()>& still_wanted) {
  constexpr std::chrono::milliseconds between_questions{50};
  std::unique_lock lock(mutex_);
  const std::uint64_t needed = begun_ + 1;
  const auto enough = std::chrono::steady_clock::now() + patience_;
  while (shares && running_ && !has_failed_ && std::chrono::steady_clock::now() < enough) {
    ended_.wait_for(lock, std::min(between_questions, patience_));
    if (succeeded_ >= needed && !has_failed_)
      return false;
    lock.unlock();
    still_wanted();
    lock.lock();
  }
  if (shares && succeeded_ >= needed && !has_failed_)
    return false;
  const bool leads = shares && !running_;
  const std::uint64_t number = leads ? ++begun_ : 0;
  running_ = running_ || leads;
  lock.unlock();
  try {
    storage.flush();
  } catch (...) {
    lock.lock();
    has_failed_ = has_failed_ || shares;
    running_ = running_ && !leads;
    ended_.notify_all();
    throw;
  }
  lock.lock();
  if (leads) {
    running_ = false;
    succeeded_ = number;
    ended_.notify_all();
  }
  return true;
}

void GroupFlush::flushed(const Storage& storage, std::uint64_t moment) noexcept {
  const std::lock_guard lock(mutex_);
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

bool GroupFlush::is_flushed(const Storage& storage, std::uint64_t moment) const noexcept {
  const std::lock_guard lock(mutex_);
  return std::ranges::find(flushed_, std::pair(&storage, moment)) != flushed_.end();
}

void GroupFlush::forget(const Storage& storage) noexcept {
  const std::lock_guard lock(mutex_);
  std::erase_if(flushed_, [&](const auto& each) { return each.first == &storage; });
}

} // namespace qcowcache
