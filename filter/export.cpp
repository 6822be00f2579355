#include "export.hpp"

#include <algorithm>
#include <utility>

namespace qcowcache {

namespace {
constexpr std::ptrdiff_t most_with_failures = 64;
} // namespace

/// What the background writers see of a cache.
class Export::Source final : public Writeback::Source {
public:
  Source(std::shared_ptr<Export> owner, std::shared_ptr<WriteCache> cache) noexcept
      : owner_(std::move(owner)), cache_(std::move(cache)) {}

  void write_one() override {
    const std::optional<WriteCache::Next> next = cache_->next();
    if (!next)
      return;
    const std::optional<Handle::Use> use = owner_->borrow(*cache_, *next);
    if (!use || !cache_->write_next(use->storage()))
      cache_->give_up(*next);
  }
  [[nodiscard]] std::size_t waiting() const override { return cache_->waiting(); }
  void tick() override { cache_->tick(); }

private:
  // In this order: the cache uses the export's range lock, so it goes first.
  const std::shared_ptr<Export> owner_;
  const std::shared_ptr<WriteCache> cache_;
};

/// What those who decode in the background see of a verifier.
class Export::Decoding final : public Writeback::Source {
public:
  explicit Decoding(std::shared_ptr<Verifier> verifier) noexcept : verifier_(std::move(verifier)) {}

  void write_one() override { verifier_->decode_one(); }
  [[nodiscard]] std::size_t waiting() const override { return verifier_->waiting(); }
  void tick() override { verifier_->shrink(); }

private:
  const std::shared_ptr<Verifier> verifier_;
};

std::optional<std::uint64_t> Export::shared_size() const {
  std::optional<std::uint64_t> largest;
  for (const Member& member : members_) {
    if (member.cache == shared_cache_)
      largest = std::max(largest.value_or(0), member.handle->capabilities().size);
  }
  return largest;
}

void Export::follow_size() {
  // Unsaved bytes belong to an export of the size that it had: only a connection that sees as much
  // can store them.
  const std::uint64_t size = shared_size().value_or(0);
  if (size > shared_cache_->size() || shared_cache_->clean())
    shared_cache_->set_size(size);
}

std::shared_ptr<WriteCache> Export::make_cache(const Capabilities& capabilities) {
  // What the cache's callbacks need to know of the cache itself, set before anybody can use it.
  struct Self {
    const WriteCache* cache = nullptr;
    std::weak_ptr<Writeback::Source> source;
  };
  const auto self = std::make_shared<Self>();
  WriteCache::Settings settings;
  settings.cluster_size = settings_.cluster_size;
  settings.max_write = settings_.max_write;
  settings.expire = settings_.expire;
  if (settings_.statistics != nullptr)
    settings.counters = settings_.statistics->counters(name_);
  settings.events = settings_.events.about("export \"" + printable(name_) + "\": ");
  settings.retry = settings_.retry;
  settings.changed_storage = [this, self](const ByteRange& range) {
    changed_storage(self->cache, range);
  };
  if (settings_.writeback != nullptr) {
    settings.wake_writer = [writeback = settings_.writeback, self](std::size_t waiting) {
      if (const std::shared_ptr<Writeback::Source> source = self->source.lock())
        writeback->wake(source, waiting);
    };
  }
  auto cache = std::make_shared<WriteCache>(std::move(settings), capabilities, ranges_, budget_);
  std::shared_ptr<Writeback::Source> source;
  self->cache = cache.get();
  if (settings_.writeback != nullptr) {
    source = std::make_shared<Source>(shared_from_this(), cache);
    self->source = source;
    settings_.writeback->add(source);
  }
  budget_.add_holder(cache);
  caches_.reserve(caches_.size() + 1); // what an earlier verifier left is not taken for nothing
  Entry entry{cache, source, nullptr, {}};
  if (settings_.verify)
    add_verifier(entry, capabilities);
  caches_.push_back(std::move(entry));
  return cache;
}

void Export::add_verifier(Entry& entry, const Capabilities& capabilities) {
  // As above: set before anybody can use it.
  const auto self = std::make_shared<std::weak_ptr<Writeback::Source>>();
  Verifier::Settings settings;
  settings.patience = settings_.patience;
  settings.counters = entry.cache->counters();
  settings.report = [this](const std::string& line) { settings_.report_damage(name_, line); };
  if (settings_.decoders != nullptr) {
    settings.wake = [decoders = settings_.decoders, self](std::size_t waiting) {
      if (const std::shared_ptr<Writeback::Source> decoding = self->lock())
        decoders->wake(decoding, waiting);
    };
  }
  settings.decompressors = settings_.decompressors;
  settings.memory = settings_.verify_memory;
  settings.interrupted = settings_.interrupted;
  settings.everything = settings_.verify_everything;
  if (capabilities.can_multi_conn)
    settings.left = left_;
  entry.verifier = std::make_shared<Verifier>(std::move(settings), budget_);
  if (settings_.decoders != nullptr) {
    const auto decoding = std::make_shared<Decoding>(entry.verifier);
    *self = decoding;
    entry.decoding = decoding;
    settings_.decoders->add(decoding);
  }
  if (capabilities.can_multi_conn)
    left_ = {}; // the verifier's from here on, until it is removed
}

void Export::remove_verifier(Entry& entry) {
  if (const std::shared_ptr<Writeback::Source> decoding = entry.decoding.lock())
    settings_.decoders->remove(decoding);
  // Storage that does not share its cache may be another disk for the next connection.
  if (entry.verifier && entry.cache == shared_cache_)
    left_ = entry.verifier->left();
  entry.verifier.reset();
}

std::vector<Export::Entry>::iterator Export::entry_of(const WriteCache* cache) {
  return std::ranges::find_if(caches_,
                              [cache](const Entry& each) { return each.cache.get() == cache; });
}

std::shared_ptr<Verifier> Export::verifier_of(const WriteCache* cache) {
  const std::lock_guard lock(mutex_);
  const auto entry = entry_of(cache);
  return entry == caches_.end() ? nullptr : entry->verifier;
}

std::shared_ptr<WriteCache> Export::attach(const std::shared_ptr<Handle>& handle) {
  const std::lock_guard lock(mutex_);
  members_.reserve(members_.size() + 1); // nothing below a new cache can fail
  const Capabilities& capabilities = handle->capabilities();
  std::shared_ptr<WriteCache> cache;
  if (!capabilities.can_multi_conn) {
    cache = make_cache(capabilities);
  } else {
    if (shared_cache_ && !shared_size() && shared_cache_->size() != capabilities.size) {
      report_lost(*shared_cache_);
      remove(shared_cache_.get());
    }
    if (!shared_cache_)
      shared_cache_ = make_cache(capabilities);
    Entry& entry = *entry_of(shared_cache_.get());
    if (settings_.verify && !entry.verifier)
      add_verifier(entry, capabilities);
    cache = shared_cache_;
  }
  handle->count_in(cache->counters());
  members_.push_back({handle, cache});
  if (cache == shared_cache_)
    follow_size();
  return cache;
}

void Export::detach(const std::shared_ptr<Handle>& handle,
                    const std::shared_ptr<WriteCache>& cache) {
  const std::lock_guard lock(mutex_);
  std::erase_if(members_, [&](const Member& member) { return member.handle == handle; });
  if (cache != shared_cache_) {
    cache->forget_all(); // a background writer may hold on to the cache a moment longer
    report_lost(*cache);
    remove(cache.get());
  } else if (shared_size()) {
    follow_size();
  } else {
    cache->forget_all();
    if (cache->unsaved().bytes == 0) {
      remove(cache.get());
    } else if (settings_.verify) {
      // The next connection brings another, which finds the image as it is then.
      remove_verifier(*entry_of(shared_cache_.get()));
    }
  }
}

void Export::remove(const WriteCache* removed) {
  const auto entry = entry_of(removed);
  if (entry != caches_.end()) {
    if (const std::shared_ptr<Writeback::Source> source = entry->source.lock())
      settings_.writeback->remove(source);
    remove_verifier(*entry);
    caches_.erase(entry);
  }
  if (shared_cache_.get() == removed)
    shared_cache_.reset();
}

std::optional<Handle::Use> Export::borrow(const WriteCache& cache,
                                          const WriteCache::Next& next) const {
  const std::lock_guard lock(mutex_);
  for (const bool preferred : {true, false}) {
    for (const Member& member : members_) {
      const Capabilities& capabilities = member.handle->capabilities();
      const bool can = member.cache.get() == &cache && capabilities.can_write &&
                       capabilities.size >= next.dirty_end;
      const bool wrote_last = member.handle->is(next.writer);
      if (can && (wrote_last != next.was_refused) == preferred) {
        if (std::optional<Handle::Use> use = member.handle->borrow())
          return use;
      }
    }
  }
  return std::nullopt;
}

void Export::changed_storage(const WriteCache* by, const ByteRange& range) const {
  std::vector<Entry> others;
  {
    const std::lock_guard lock(mutex_);
    if (caches_.size() == 1)
      return;
    others = caches_;
  }
  for (const Entry& entry : others) {
    if (entry.cache.get() != by) {
      entry.cache->forget(range);
      if (entry.verifier)
        entry.verifier->forget(range);
    }
  }
}

Export::Need Export::need() const {
  const std::lock_guard lock(mutex_);
  if (!caches_.empty())
    return Need::use; // every connection has a cache
  return left_.empty() ? Need::none : Need::failures;
}

void Export::report_left() const {
  const std::lock_guard lock(mutex_);
  for (const Entry& entry : caches_)
    report_lost(*entry.cache);
}

void Export::report_lost(const WriteCache& cache) const {
  const Unsaved lost = cache.unsaved();
  if (lost.bytes == 0)
    return;
  cache.counters()->add(Count::lost_bytes, lost.bytes);
  settings_.report_loss(name_, lost);
}

Exports::Membership Exports::attach(const std::string& name,
                                    const std::shared_ptr<Handle>& handle) {
  const std::lock_guard lock(mutex_);
  auto found = exports_.find(name);
  if (found == exports_.end()) {
    // Storage that does not share its cache may have been another disk.
    const bool look_at_everything = forgotten_ && handle->capabilities().can_multi_conn;
    found = exports_
                .emplace(name, std::make_shared<Export>(name, settings_, budget_,
                                                        Verifier::Left{{}, look_at_everything}))
                .first;
  }
  Membership membership{found->second, found->second->attach(handle), nullptr};
  membership.verifier = membership.of->verifier_of(membership.cache.get());
  return membership;
}

void Exports::detach(const Membership& membership, const std::shared_ptr<Handle>& handle) {
  const std::lock_guard lock(mutex_);
  membership.of->detach(handle, membership.cache);
  const Export::Need need = membership.of->need();
  if (need == Export::Need::use || (need == Export::Need::failures && may_keep_failures()))
    return;
  const auto entry = std::ranges::find_if(
      exports_, [&](const auto& each) { return each.second == membership.of; });
  if (need == Export::Need::failures && !std::exchange(forgotten_, true))
    settings_.report_damage(
        entry->first, "too many exports have compressed clusters that cannot be read: from here on "
                      "all clusters of an export are checked whenever it is opened anew");
  exports_.erase(entry);
}

bool Exports::may_keep_failures() const {
  const auto has_failures = [](const auto& entry) {
    return entry.second->need() == Export::Need::failures;
  };
  return std::ranges::count_if(exports_, has_failures) <= most_with_failures;
}

void Exports::report_left() const {
  const std::lock_guard lock(mutex_);
  for (const auto& [name, left] : exports_)
    left->report_left();
}

} // namespace qcowcache
