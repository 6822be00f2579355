#include "image.hpp"

#include <algorithm>
#include <new>
#include <utility>

namespace qcowcache {

/// What the background writers see of an image's cache.
class Image::Source final : public Writeback::Source {
public:
  Source(std::shared_ptr<const void> owner, std::shared_ptr<Image> image) noexcept
      : owner_(std::move(owner)), image_(std::move(image)) {}

  void write_one() override { image_->cache_->write_next(); }
  [[nodiscard]] std::size_t waiting() const override { return image_->cache_->waiting(); }
  void tick() override { image_->cache_->tick(); }

private:
  // In this order: the image uses what its owner has, so it goes first.
  const std::shared_ptr<const void> owner_;
  const std::shared_ptr<Image> image_;
};

/// What those who decode in the background see of a verifier.
class Image::Decoding final : public Writeback::Source {
public:
  explicit Decoding(std::shared_ptr<Verifier> verifier) noexcept : verifier_(std::move(verifier)) {}

  void write_one() override { verifier_->decode_one(); }
  [[nodiscard]] std::size_t waiting() const override { return verifier_->waiting(); }
  void tick() override { verifier_->shrink(); }

private:
  const std::shared_ptr<Verifier> verifier_;
};

void Image::begin(const Capabilities& capabilities, std::shared_ptr<const void> owner,
                  std::function<void(const Image&, const ByteRange&)> changed, bool look_at_all,
                  std::function<bool()> alone) {
  left_.more = look_at_all;
  // What the cache's callbacks need to know of it, set before anybody can use it.
  const auto self = std::make_shared<std::weak_ptr<Writeback::Source>>();
  WriteCache::Settings settings;
  settings.cluster_size = settings_.cluster_size;
  settings.max_write = settings_.max_write;
  settings.expire = settings_.expire;
  settings.max_delay = settings_.max_delay;
  settings.reserve = settings_.reserve;
  settings.alone = std::move(alone);
  settings.interrupted = settings_.interrupted;
  if (UncleanFile* const unclean = settings_.unclean; unclean != nullptr) {
    settings.hold = [this, unclean] { return unclean->hold(name_); };
    settings.release = [this, unclean] { unclean->release(name_); };
  }
  if (settings_.statistics != nullptr)
    settings.counters = settings_.statistics->counters(name_);
  settings.events = settings_.events.about("export \"" + printable(name_) + "\": ");
  settings.retry = settings_.retry;
  if (settings_.report_short_of_memory) {
    settings.short_of_memory = [this](std::uint64_t preferred, std::uint64_t unit_size) {
      settings_.report_short_of_memory(name_, preferred, unit_size);
    };
  }
  settings.changed_storage = [this, changed = std::move(changed)](const ByteRange& range) {
    changed(*this, range);
  };
  if (settings_.lend)
    settings.lend = [this](const WriteCache::Next& next) { return lend(next); };
  if (settings_.writeback != nullptr) {
    settings.wake_writer = [writeback = settings_.writeback, self](std::size_t waiting) {
      if (const std::shared_ptr<Writeback::Source> source = self->lock())
        writeback->wake(source, waiting);
    };
  }
  cache_ = std::make_shared<WriteCache>(std::move(settings), capabilities, ranges_, budget_);
  budget_.add_holder(cache_);
  if (settings_.writeback != nullptr) {
    const auto source = std::make_shared<Source>(std::move(owner), shared_from_this());
    *self = source;
    source_ = source;
    settings_.writeback->add(source);
  }
}

void Image::end() {
  give_up_record();
  if (const std::shared_ptr<Writeback::Source> source = source_.lock())
    settings_.writeback->remove(source);
}

/// Nobody is there any more who could flush what storage has taken.
void Image::give_up_record() {
  if (cache_->recorded() && cache_->clean()) {
    settings_.unclean->lose(name_);
    if (settings_.report_disk)
      settings_.report_disk(name_, "storage has taken all bytes, but no flush of it has succeeded "
                                   "since: they may be lost");
  }
  cache_->abandon();
}

void Image::begin_to_verify() {
  if (!settings_.verify)
    return;
  // As above: set before anybody can use it.
  const auto self = std::make_shared<std::weak_ptr<Writeback::Source>>();
  Verifier::Settings settings;
  settings.patience = settings_.patience;
  settings.counters = cache_->counters();
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
  settings.left = left_;
  auto verifier = std::make_shared<Verifier>(std::move(settings), budget_);
  if (settings_.decoders != nullptr) {
    const auto decoding = std::make_shared<Decoding>(verifier);
    *self = decoding;
    decoding_ = decoding;
    settings_.decoders->add(decoding);
  }
  verifier_ = std::move(verifier);
  left_ = {};
}

void Image::end_verifying() {
  if (const std::shared_ptr<Writeback::Source> decoding = decoding_.lock())
    settings_.decoders->remove(decoding);
  const std::shared_ptr<Verifier> ended = std::exchange(verifier_, nullptr);
  if (!ended)
    return;
  try {
    left_ = ended->left();
  } catch (const std::bad_alloc&) {
    left_.more = true; // nobody knows which
  }
}

std::shared_ptr<Verifier> Image::verifier() const {
  if (!settings_.verify)
    return nullptr;
  const std::lock_guard lock(mutex_);
  return verifier_;
}

Image::Debt Image::owes() const {
  if (!cache_->clean())
    return Debt::bytes;
  const std::lock_guard lock(mutex_);
  return left_.empty() ? Debt::none : Debt::clusters;
}

bool Image::is_used() const {
  const std::lock_guard lock(mutex_);
  return !users_.empty();
}

bool Image::is_changed_by_others(const Handle& handle) const {
  const std::lock_guard lock(mutex_);
  return std::ranges::any_of(users_, [&](const auto& user) {
    return user.get() != &handle && user->changes() && !user->is_guest();
  });
}

bool Image::is_used_by(const Handle& handle) const {
  const std::lock_guard lock(mutex_);
  return std::ranges::any_of(users_, [&](const auto& user) { return user.get() == &handle; });
}

bool Image::is_used_by_others(const Handle& handle) const {
  const std::lock_guard lock(mutex_);
  return std::ranges::any_of(users_, [&](const auto& user) { return user.get() != &handle; });
}

Image::Standing Image::standing(Handle& newcomer, const Request& request) const {
  const std::optional<Handle::Use> use = newcomer.use();
  if (!use)
    return Standing::guest; // it has ended, and uses nothing any more
  const bool others = is_used_by_others(newcomer);
  const std::uint64_t size = newcomer.capabilities().size;
  const bool left = !others && !is_used_by(newcomer) && !cache_->clean();
  if (left && size < cache_->size())
    return Standing::stranger; // what is left may lie behind its end
  // What is stored may be all zeros, and show nothing; and others may go on writing meanwhile.
  constexpr int most_comparisons = 64;
  for (int comparisons = 0; comparisons < most_comparisons; ++comparisons) {
    if (others && cache_->admits_guest(request.changes, request.range))
      return Standing::guest;
    const bool clean = cache_->clean();
    if (clean && !cache_->has_news(newcomer.opened()))
      return Standing::founder; // nothing can get lost, and comparing would prove nothing
    if (const std::optional<Handle::Use> other = lend_any(newcomer))
      cache_->look_at_disk(other->storage());
    switch (cache_->compare(use->storage(), newcomer.opened())) {
    case WriteCache::Likeness::other_disk:
      return Standing::stranger;
    case WriteCache::Likeness::same_disk:
      return Standing::trusted;
    case WriteCache::Likeness::unknown:
    case WriteCache::Likeness::begins_alike:
      if (left && size != cache_->size())
        return Standing::stranger; // many disks begin alike: not enough for what is left of one
      break;
    case WriteCache::Likeness::alike:
      break;
    }
    if (!clean && (!others || !cache_->store_some()))
      return Standing::trusted; // more than this nobody can know of bytes that nobody can write
  }
  return Standing::trusted;
}

void Image::join(const std::shared_ptr<Handle>& handle) {
  const std::lock_guard lock(mutex_);
  users_.reserve(users_.size() + 1); // nothing below the verifier can fail
  if (users_.empty())
    begin_to_verify();
  users_.push_back(handle);
  handle->count_in(cache_->counters());
  cache_->admit(handle->identity());
  follow_size();
}

void Image::leave(const Handle& handle) {
  const std::lock_guard lock(mutex_);
  std::erase_if(users_, [&](const auto& user) { return user.get() == &handle; });
  cache_->leave(handle.identity());
  if (users_.empty()) {
    cache_->forget_all(); // a background writer may hold on to the cache a moment longer
    end_verifying();
    if (cache_->clean())
      give_up_record();
    return;
  }
  follow_size();
  // Who is alone with what is on storage has nobody to be told apart from.
  Storage& first = users_.front()->identity();
  if (users_.size() == 1 && first.is_guest() && cache_->found_anew(first))
    cache_->trust(first);
}

std::uint64_t Image::largest_size() const {
  std::uint64_t largest = 0;
  for (const std::shared_ptr<Handle>& user : users_)
    largest = std::max(largest, user->capabilities().size);
  return largest;
}

void Image::follow_size() {
  // Unsaved bytes belong to an export of the size that it had: only a connection that sees as much
  // can store them.
  const std::uint64_t size = largest_size();
  if (size > cache_->size() || cache_->clean())
    cache_->set_size(size);
}

std::optional<Handle::Use> Image::lend(const WriteCache::Next& next) const {
  const std::lock_guard lock(mutex_);
  for (const bool preferred : {true, false}) {
    for (const std::shared_ptr<Handle>& user : users_) {
      const Capabilities& capabilities = user->capabilities();
      const bool wrote_last = user->is(next.writer);
      const bool can =
          capabilities.can_write && capabilities.size >= next.dirty_end && !user->is_guest();
      if (can && (wrote_last != next.was_refused) == preferred) {
        if (std::optional<Handle::Use> use = user->use())
          return use;
      }
    }
  }
  return std::nullopt;
}

/// Another connection, if possible one that is trusted.
std::optional<Handle::Use> Image::lend_any(const Handle& but) const {
  const std::lock_guard lock(mutex_);
  for (const bool guests : {false, true}) {
    for (const std::shared_ptr<Handle>& user : users_) {
      if (settings_.lend && user.get() != &but && user->is_guest() == guests) {
        if (std::optional<Handle::Use> use = user->use())
          return use;
      }
    }
  }
  return std::nullopt;
}

bool Image::report_lost() const {
  const Unsaved lost = cache_->unsaved();
  if (lost.bytes == 0)
    return false;
  cache_->counters()->add(Count::lost_bytes, lost.bytes);
  settings_.report_loss(name_, lost);
  return true;
}

void Image::report_lost_to_clients() const {
  if (report_lost() && settings_.unclean != nullptr)
    settings_.unclean->lose(name_);
}

} // namespace qcowcache
