#pragma once

#include "storage/storage.hpp"

#include <atomic>
#include <chrono>
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

  /// A moment after storage was opened: what is written later by others can be seen through it only
  /// if it is the same disk.
  [[nodiscard]] std::chrono::steady_clock::time_point opened() const noexcept { return opened_; }

  /// Nothing once the handle is retired. REQUIRES: the caller is the connection itself, or the
  /// connection has made a data request; before that nbdkit may still be busy preparing it.
  [[nodiscard]] std::optional<Use> use();
  /// Allows no new use and waits until the last one has ended. May be called again.
  void retire() noexcept;

  /// As `Storage::count_in`, the first time; later calls change nothing.
  void count_in(std::shared_ptr<Counters> counters) noexcept {
    if (!std::exchange(counted_, true))
      storage_->count_in(std::move(counters));
  }

  /// Fixed for the life of the connection; may be asked after `retire`, too.
  [[nodiscard]] const Capabilities& capabilities() const noexcept {
    return storage_->capabilities();
  }
  /// Whether `writer` (see `Unit::last_writer`) is this connection.
  [[nodiscard]] bool is(const void* writer) const noexcept { return storage_.get() == writer; }
  /// As `Storage::is_guest`.
  [[nodiscard]] bool is_guest() const noexcept { return storage_->is_guest(); }
  /// Whether its client changes something, and has not ended.
  [[nodiscard]] bool changes() const noexcept { return changes_.load(std::memory_order_relaxed); }
  void begins_to_change() noexcept {
    if (!changes())
      changes_ = true;
  }
  /// Returns whether it did.
  bool ends_changing() noexcept { return changes_.exchange(false); }
  /// For `WriteCache::admit` and its like, which do not call storage; also after `retire`.
  [[nodiscard]] Storage& identity() const noexcept { return *storage_; }

private:
  void end_use() noexcept;

  const std::unique_ptr<Storage> storage_;
  std::mutex mutex_;
  std::condition_variable unused_;
  std::size_t users_ = 0;
  bool retired_ = false;
  bool counted_ = false;
  std::atomic<bool> changes_ = false;
  const std::chrono::steady_clock::time_point opened_ = std::chrono::steady_clock::now();
};

} // namespace qcowcache
