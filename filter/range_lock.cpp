#include "range_lock.hpp"

#include <algorithm>
#include <utility>

namespace qcowcache {

RangeLock::Owned::Owned(Owned&& other) noexcept
    : lock_(std::exchange(other.lock_, nullptr)), entry_(other.entry_) {}

RangeLock::Owned::~Owned() {
  if (lock_ != nullptr)
    lock_->release(entry_);
}

RangeLock::Owned RangeLock::own(const ByteRange& range) {
  std::unique_lock lock(mutex_);
  const auto mine = in_order_of_request_.insert(in_order_of_request_.end(), range);
  released_.wait(lock, [&] { return granted(mine); });
  return {*this, mine};
}

std::optional<RangeLock::Owned>
RangeLock::own_until(const ByteRange& range, std::chrono::steady_clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  const auto mine = in_order_of_request_.insert(in_order_of_request_.end(), range);
  if (released_.wait_until(lock, deadline, [&] { return granted(mine); }))
    return Owned(*this, mine);
  in_order_of_request_.erase(mine);
  lock.unlock();
  released_.notify_all();
  return std::nullopt;
}

bool RangeLock::granted(std::list<ByteRange>::iterator mine) const noexcept {
  return std::none_of(in_order_of_request_.begin(), std::list<ByteRange>::const_iterator(mine),
                      [&](const ByteRange& earlier) { return earlier.overlaps(*mine); });
}

void RangeLock::release(std::list<ByteRange>::iterator entry) noexcept {
  {
    const std::lock_guard lock(mutex_);
    in_order_of_request_.erase(entry);
  }
  released_.notify_all();
}

} // namespace qcowcache
