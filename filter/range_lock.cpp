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
  released_.wait(lock, [&] {
    return std::none_of(in_order_of_request_.begin(), mine,
                        [&](const ByteRange& earlier) { return earlier.overlaps(range); });
  });
  return {*this, mine};
}

void RangeLock::release(std::list<ByteRange>::iterator entry) noexcept {
  {
    const std::lock_guard lock(mutex_);
    in_order_of_request_.erase(entry);
  }
  released_.notify_all();
}

} // namespace qcowcache
