#include "cache/range_lock.hpp"

#include <algorithm>
#include <utility>

namespace qcowcache {

RangeLock::Owned::Owned(Owned&& other) noexcept
    : lock_(std::exchange(other.lock_, nullptr)), entry_(other.entry_) {}

RangeLock::Owned::~Owned() {
  if (lock_ != nullptr)
    lock_->release(entry_);
}

bool RangeLock::Owned::wait_until(std::chrono::steady_clock::time_point deadline) const {
  std::unique_lock lock(lock_->mutex_);
  return lock_->released_.wait_until(lock, deadline, [this] { return lock_->granted(entry_); });
}

/// REQUIRES: the mutex is held.
std::list<ByteRange>::iterator RangeLock::enter(const ByteRange& range) {
  const auto entry = in_order_of_request_.insert(in_order_of_request_.end(), range);
  ++asked_for_;
  return entry;
}

RangeLock::Owned RangeLock::ask(const ByteRange& range) {
  const std::lock_guard lock(mutex_);
  return {*this, enter(range)};
}

RangeLock::Owned RangeLock::own(const ByteRange& range) {
  std::unique_lock lock(mutex_);
  const auto mine = enter(range);
  released_.wait(lock, [&] { return granted(mine); });
  return {*this, mine};
}

std::optional<RangeLock::Owned>
RangeLock::own_until(const ByteRange& range, std::chrono::steady_clock::time_point deadline) {
  Owned asked = ask(range);
  if (!asked.wait_until(deadline))
    return std::nullopt;
  return asked;
}

bool RangeLock::granted(std::list<ByteRange>::iterator mine) const noexcept {
  return std::none_of(in_order_of_request_.begin(), std::list<ByteRange>::const_iterator(mine),
                      [&](const ByteRange& earlier) { return earlier.overlaps(*mine); });
}

void RangeLock::release(std::list<ByteRange>::iterator entry) noexcept {
  {
    const std::lock_guard lock(mutex_);
    in_order_of_request_.erase(entry);
    --asked_for_;
  }
  released_.notify_all();
}

} // namespace qcowcache
