#pragma once

#include "memory_storage.hpp"

#include <atomic>
#include <functional>
#include <latch>

/// Holds back what storage gets of a kind until `let_go`.
class Gate {
public:
  /// For the `hook`.
  explicit Gate(MemoryStorage::Kind kind) : kind_(kind) {}
  /// In `storage`, before it carries them out, or when it has: `&MemoryStorage::after`.
  Gate(MemoryStorage& storage, MemoryStorage::Kind kind,
       MemoryStorage::Hook MemoryStorage::*when = &MemoryStorage::before)
      : kind_(kind), place_(&(storage.*when)) {
    *place_ = hook();
  }
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;
  ~Gate() {
    if (place_ != nullptr)
      *place_ = nullptr;
  }

  /// For storage that does not outlive it.
  [[nodiscard]] MemoryStorage::Hook hook() {
    return [this](const MemoryStorage::Call& call) {
      if (call.kind != kind_)
        return;
      if (!used_.exchange(true))
        reached_.count_down();
      open_.wait();
    };
  }
  void wait_until_reached() const { reached_.wait(); }
  void let_go() { open_.count_down(); }

private:
  const MemoryStorage::Kind kind_;
  MemoryStorage::Hook* const place_ = nullptr;
  std::atomic<bool> used_ = false;
  std::latch reached_{1};
  std::latch open_{1};
};
