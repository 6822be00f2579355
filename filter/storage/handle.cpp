#include "storage/handle.hpp"

namespace qcowcache {

std::optional<Handle::Use> Handle::use() {
  const std::lock_guard lock(mutex_);
  if (retired_)
    return std::nullopt;
  ++users_;
  return Use(*this);
}

void Handle::end_use() noexcept {
  const std::lock_guard lock(mutex_);
  --users_;
  if (users_ == 0)
    unused_.notify_all(); // under the mutex: whoever waits may destroy the handle next
}

void Handle::retire() noexcept {
  std::unique_lock lock(mutex_);
  retired_ = true;
  unused_.wait(lock, [this] { return users_ == 0; });
}

} // namespace qcowcache
