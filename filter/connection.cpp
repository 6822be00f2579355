#include "connection.hpp"

#include "cached_image.hpp"

#include <cerrno>
#include <new>
#include <system_error>
#include <thread>
#include <tuple>

namespace qcowcache {

Export& Connection::visit() {
  std::call_once(visited_, [this] { export_ = exports_.visit(export_name_); });
  return *export_;
}

Image& Connection::enter(const Image::Request& request) {
  const std::lock_guard lock(entering_);
  const std::shared_ptr<Image> present = images_.empty() ? nullptr : images_.back();
  if (ended_)
    throw std::system_error(ESHUTDOWN, std::generic_category(), "the connection has ended");
  // Another request may have seen to it meanwhile.
  if (present && !handle_->is_guest())
    return *present;
  images_.reserve(images_.size() + 1);
  std::shared_ptr<Image> image = visit().enter(handle_, present, request);
  if (image != present) {
    images_.push_back(std::move(image));
    image_.store(images_.back().get(), std::memory_order_release);
  }
  return *images_.back();
}

Connection::InUse Connection::in_use(const Image::Request& request) {
  std::optional<Handle::Use> use = storage_if_any();
  if (!use)
    throw std::system_error(ESHUTDOWN, std::generic_category(), "the connection has ended");
  const auto has_to_enter = [&](const Image* image) {
    return image == nullptr || (handle_->is_guest() && !image->admits_guest(request));
  };
  const bool in_line_of_cache = capabilities().can_multi_conn && !has_to_enter(this->image());
  std::optional<RangeLock::Owned> place =
      request.changes ? visit().arrive(request.range, in_line_of_cache) : std::nullopt;
  if (place)
    visit().wait_turn(*place);
  Image* image = this->image();
  if (has_to_enter(image))
    image = &enter(request);
  if (request.changes)
    handle_->begins_to_change();
  return InUse{image->cache(), std::move(*use), image->verifier(), std::move(place)};
}

Verifier::Outcome Connection::InUse::check() const {
  if (verifier == nullptr)
    return Verifier::Outcome::clean;
  CachedImage image(cache, use.storage());
  return verifier->check(image);
}

/// There is nobody to tell but the operator.
void Connection::check_at_end(const InUse& storage) {
  try {
    std::ignore = storage.check();
  } catch (const std::exception& error) {
    storage.verifier->report_unchecked(error.what());
  }
}

void Connection::drain() noexcept {
  // What a connection wrote that is a guest now is on storage.
  if (ended_ || this->image() == nullptr || handle_->is_guest())
    return;
  Image& image = *this->image();
  // Storage is flushed for others as well, who could not.
  const bool recorded = image.cache().recorded();
  if (!handle_->ends_changing() && !recorded)
    return;
  const bool last = !image.is_changed_by_others(*handle_);
  const auto write_all = [&]() noexcept {
    try {
      std::optional<Handle::Use> use = handle_->use();
      if (!use)
        return;
      const InUse in_use{image.cache(), std::move(*use), image.verifier()};
      in_use.cache.drain(in_use.use.storage());
      check_at_end(in_use);
      if (last)
        in_use.cache.give_back_room(in_use.use.storage());
    } catch (const std::exception&) {
      // What is left is found, and reported, by whoever looks at the cache next.
    }
  };
  if (const std::optional<Handle::Use> use = handle_->use(); use && image.verifier() != nullptr)
    image.verifier()->ends(&use->storage());
  const bool unchecked = image.verifier() != nullptr && image.verifier()->has_work_at_end();
  const bool clean = image.cache().clean();
  const bool has_work =
      !clean || recorded || unchecked || (last && image.cache().may_have_reserved());
  // Who cannot write may flush what others wrote.
  const bool can = capabilities().can_write || (clean && recorded);
  if (!has_work || !can)
    return;
  // Filters that sleep refuse to do so in a thread that serves a client once the client is gone.
  try {
    std::thread(write_all).join();
  } catch (const std::exception&) { // no thread, or no memory for one
    write_all();
  }
}

void Connection::end() noexcept {
  if (!handle_ || ended_.exchange(true))
    return;
  handle_->retire();
  const std::lock_guard lock(entering_);
  if (!export_)
    return;
  try {
    exports_.leave(export_, *handle_, images_.empty() ? nullptr : images_.back());
  } catch (const std::bad_alloc&) {
    // The export keeps a connection that is of no use to anybody, and its bytes with it.
  }
}

} // namespace qcowcache
