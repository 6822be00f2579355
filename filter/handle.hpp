#pragma once

#include "storage.hpp"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

namespace qcowcache {

/// One connection's way to storage, for as long as nbdkit allows it to be used: from .prepare until
/// .finalize or .close, whichever comes first. Thread safe.
class Handle {
public:
  /// The right to call storage; while one lives, `retire` waits.
  class [[nodiscard]] Use {
  public:
    Use(Use&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
    Use& operator=(Use&&) = delete;
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
    ~Use() {
      if (handle_ != nullptr)
        handle_->end_use();
    }

    [[nodiscard]] Storage& storage() const noexcept { return *handle_->storage_; }

  private:
    friend class Handle;
    explicit Use(Handle& handle) noexcept : handle_(&handle) {}
    Handle* handle_;
  };

  explicit Handle(std::unique_ptr<Storage> storage) noexcept : storage_(std::move(storage)) {}

  /// For the connection itself. Nothing once the handle is retired.
  [[nodiscard]] std::optional<Use> use();
  /// For others, who may have it once the connection has made its first data request (`show`):
  /// before that nbdkit may still be busy preparing it.
  [[nodiscard]] std::optional<Use> borrow();
  void show() noexcept { shown_.store(true, std::memory_order_release); }
  /// Allows no new use and waits until the last one has ended. May be called again.
  void retire() noexcept;

  /// As `Storage::count_in`. REQUIRES: not shown yet.
  void count_in(std::shared_ptr<Counters> counters) noexcept {
    storage_->count_in(std::move(counters));
  }

  /// Fixed for the life of the connection; may be asked after `retire`, too.
  [[nodiscard]] const Capabilities& capabilities() const noexcept {
    return storage_->capabilities();
  }
  /// Whether `writer` (see `Unit::last_writer`) is this connection.
  [[nodiscard]] bool is(const void* writer) const noexcept { return storage_.get() == writer; }

private:
  void end_use() noexcept;

  const std::unique_ptr<Storage> storage_;
  std::mutex mutex_;
  std::condition_variable unused_;
  std::size_t users_ = 0;
  bool retired_ = false;
  std::atomic<bool> shown_ = false;
};

} // namespace qcowcache
