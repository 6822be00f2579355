#include "connection.hpp"

#include "cached_image.hpp"

#include <cerrno>
#include <new>
#include <system_error>
#include <thread>
#include <tuple>

namespace qcowcache {

void Connection::begin(std::unique_ptr<Storage> storage) {
  handle_ = std::make_shared<Handle>(std::move(storage));
  membership_ = exports_.attach(export_name_, handle_);
  membership_.cache->learn_layout(handle_->use()->storage());
}

std::optional<Connection::InUse> Connection::in_use_if_any() {
  std::optional<Handle::Use> use = handle_ ? handle_->use() : std::nullopt;
  if (!use)
    return std::nullopt;
  handle_->show();
  return InUse{*membership_.cache, std::move(*use), membership_.verifier.get()};
}

Verifier::Outcome Connection::InUse::check() const {
  if (verifier == nullptr)
    return Verifier::Outcome::clean;
  CachedImage image(cache, use.storage());
  return verifier->check(image);
}

Connection::InUse Connection::in_use() {
  std::optional<InUse> storage = in_use_if_any();
  if (!storage)
    throw std::system_error(ESHUTDOWN, std::generic_category(), "the connection has ended");
  return std::move(*storage);
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
  if (ended_ || !membership_.cache)
    return;
  const auto write_all = [this]() noexcept {
    try {
      const InUse storage = in_use();
      storage.cache.drain(storage.use.storage());
      check_at_end(storage);
    } catch (const std::exception&) {
      // What is left is found, and reported, by whoever looks at the cache next.
    }
  };
  if (const std::optional<Handle::Use> use = handle_->use(); use && membership_.verifier)
    membership_.verifier->ends(&use->storage());
  const bool unchecked = membership_.verifier && membership_.verifier->has_work_at_end();
  if (!capabilities().can_write || (membership_.cache->clean() && !unchecked))
    return;
  // Filters that sleep refuse to do so in a thread that serves a client once the client is gone.
  try {
    std::thread(write_all).join();
  } catch (const std::exception&) { // no thread, or no memory for one
    write_all();
  }
}

void Connection::end() noexcept {
  if (!membership_.cache || ended_.exchange(true))
    return;
  handle_->retire();
  try {
    exports_.detach(membership_, handle_);
  } catch (const std::bad_alloc&) {
    // The export keeps a connection that is of no use to anybody, and its bytes with it.
  }
}

} // namespace qcowcache
