#include "export.hpp"

#include <algorithm>

namespace qcowcache {

std::optional<std::uint64_t> Export::shared_size() const {
  std::optional<std::uint64_t> largest;
  for (const std::shared_ptr<Handle>& handle : handles_) {
    if (handle->capabilities().can_multi_conn)
      largest = std::max(largest.value_or(0), handle->capabilities().size);
  }
  return largest;
}

std::shared_ptr<WriteCache> Export::make_cache(const Capabilities& capabilities) {
  // The cache's address identifies it to the others; it is set before anybody can use the cache.
  const auto self = std::make_shared<const WriteCache*>(nullptr);
  WriteCache::Settings settings;
  settings.cluster_size = settings_.cluster_size;
  settings.changed_storage = [this, self](const ByteRange& range) {
    changed_storage(*self, range);
  };
  auto cache = std::make_shared<WriteCache>(std::move(settings), capabilities, ranges_, budget_);
  *self = cache.get();
  caches_.push_back(cache);
  budget_.add_holder(cache);
  return cache;
}

std::shared_ptr<WriteCache> Export::attach(const std::shared_ptr<Handle>& handle) {
  const std::lock_guard lock(mutex_);
  const Capabilities& capabilities = handle->capabilities();
  std::shared_ptr<WriteCache> cache;
  if (!capabilities.can_multi_conn) {
    cache = make_cache(capabilities);
  } else {
    if (shared_cache_ && !shared_size() && shared_cache_->size() != capabilities.size) {
      settings_.report_loss(name_, shared_cache_->unsaved());
      remove(shared_cache_);
    }
    if (!shared_cache_)
      shared_cache_ = make_cache(capabilities);
    cache = shared_cache_;
    cache->set_size(std::max(shared_size().value_or(0), capabilities.size));
  }
  handles_.push_back(handle);
  return cache;
}

void Export::detach(const std::shared_ptr<Handle>& handle,
                    const std::shared_ptr<WriteCache>& cache) {
  const std::lock_guard lock(mutex_);
  std::erase(handles_, handle);
  if (cache != shared_cache_) {
    const Unsaved lost = cache->unsaved();
    if (lost.bytes > 0)
      settings_.report_loss(name_, lost);
    remove(cache);
  } else if (const std::optional<std::uint64_t> size = shared_size()) {
    cache->set_size(*size);
  } else {
    cache->forget_all();
    if (cache->unsaved().bytes == 0)
      remove(cache);
  }
}

void Export::remove(const std::shared_ptr<WriteCache>& cache) {
  const std::shared_ptr<WriteCache> removed = cache; // `cache` may be the member reset below
  std::erase(caches_, removed);
  if (shared_cache_ == removed)
    shared_cache_.reset();
}

void Export::changed_storage(const WriteCache* by, const ByteRange& range) const {
  std::vector<std::shared_ptr<WriteCache>> others;
  {
    const std::lock_guard lock(mutex_);
    if (caches_.size() == 1)
      return;
    others = caches_;
  }
  for (const std::shared_ptr<WriteCache>& cache : others) {
    if (cache.get() != by)
      cache->forget(range);
  }
}

bool Export::disposable() const {
  const std::lock_guard lock(mutex_);
  return handles_.empty() && caches_.empty();
}

void Export::report_left() const {
  const std::lock_guard lock(mutex_);
  for (const std::shared_ptr<WriteCache>& cache : caches_) {
    const Unsaved lost = cache->unsaved();
    if (lost.bytes > 0)
      settings_.report_loss(name_, lost);
  }
}

Exports::Membership Exports::attach(const std::string& name,
                                    const std::shared_ptr<Handle>& handle) {
  const std::lock_guard lock(mutex_);
  std::shared_ptr<Export>& found = exports_[name];
  if (!found)
    found = std::make_shared<Export>(name, settings_, budget_);
  return {found, found->attach(handle)};
}

void Exports::detach(const Membership& membership, const std::shared_ptr<Handle>& handle) {
  const std::lock_guard lock(mutex_);
  membership.of->detach(handle, membership.cache);
  if (membership.of->disposable())
    std::erase_if(exports_, [&](const auto& entry) { return entry.second == membership.of; });
}

void Exports::report_left() const {
  const std::lock_guard lock(mutex_);
  for (const auto& [name, left] : exports_)
    left->report_left();
}

} // namespace qcowcache
