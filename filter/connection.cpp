#include "connection.hpp"

#include <cerrno>
#include <system_error>
#include <thread>

namespace qcowcache {

void Connection::begin(std::unique_ptr<Storage> storage) {
  handle_ = std::make_shared<Handle>(std::move(storage));
  membership_ = exports_.attach(export_name_, handle_);
  membership_.cache->learn_layout(handle_->use()->storage());
}

Connection::InUse Connection::in_use() {
  std::optional<Handle::Use> use = handle_ ? handle_->use() : std::nullopt;
  if (!use)
    throw std::system_error(ESHUTDOWN, std::generic_category(), "the connection has ended");
  handle_->show();
  return {*membership_.cache, std::move(*use)};
}

void Connection::drain() noexcept {
  if (ended_ || !membership_.cache)
    return;
  const auto write_all = [this]() noexcept {
    try {
      const InUse storage = in_use();
      storage.cache.drain(storage.use.storage());
    } catch (const std::exception&) {
      // What is left is found, and reported, by whoever looks at the cache next.
    }
  };
  if (!capabilities().can_write || membership_.cache->unsaved().bytes == 0)
    return;
  // Filters that sleep refuse to do so in a thread that serves a client once the client is gone.
  try {
    std::thread(write_all).join();
  } catch (const std::system_error&) {
    write_all();
  }
}

void Connection::end() noexcept {
  if (!membership_.cache || ended_.exchange(true))
    return;
  handle_->retire();
  exports_.detach(membership_, handle_);
}

} // namespace qcowcache
