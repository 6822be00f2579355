#include "decompressor_pool.hpp"

#include <utility>

namespace qcowcache {

DecompressorPool::Loan::~Loan() {
  if (!decompressor_)
    return; // moved to another loan
  {
    const std::lock_guard lock(pool_.mutex_);
    pool_.idle_.push_back(std::move(decompressor_)); // there is room for all that were made
  }
  pool_.returned_.notify_one();
}

DecompressorPool::Loan DecompressorPool::borrow() {
  std::unique_lock lock(mutex_);
  returned_.wait(lock, [this] { return !idle_.empty() || made_ < most_; });
  if (idle_.empty()) {
    idle_.reserve(most_);
    auto fresh = std::make_unique<qcow2::Decompressor>();
    ++made_;
    return {*this, std::move(fresh)};
  }
  std::unique_ptr<qcow2::Decompressor> decompressor = std::move(idle_.back());
  idle_.pop_back();
  return {*this, std::move(decompressor)};
}

} // namespace qcowcache
