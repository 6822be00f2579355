#pragma once

#include "memory/memory_budget.hpp"

#include <atomic>
#include <cstddef>
#include <memory>
#include <memory_resource>
#include <vector>

namespace qcowcache {

/// A part of the budget that several have together, one `nth` of it. Nobody uses it up: each may
/// have no more than all of them leave free, as in `MemoryBudget::fair`. One alone has half of it.
///
/// Thread safe.
class MemoryShare {
public:
  explicit MemoryShare(std::size_t nth) noexcept : nth_(nth) {}
  MemoryShare(const MemoryShare&) = delete;
  MemoryShare& operator=(const MemoryShare&) = delete;
  ~MemoryShare() = default;

  /// How much all may have together.
  [[nodiscard]] std::size_t most(const MemoryBudget& budget) const { return budget.limit() / nth_; }
  /// How much all have.
  [[nodiscard]] std::size_t taken() const noexcept { return taken_; }
  /// Somebody who has `own` bytes takes `more`; returns false when that is too much of `most`.
  bool take(std::size_t most, std::size_t own, std::size_t more) noexcept;
  void give_back(std::size_t bytes) noexcept { taken_ -= bytes; }

private:
  const std::size_t nth_;
  std::atomic<std::size_t> taken_ = 0;
};

/// Memory for containers that counts in the budget, piece by piece as it is needed, and comes out
/// of a share that others have, too. Throws std::bad_alloc when that, or the budget, is used up.
///
/// The standard library's pools are not for memory that ends: libstdc++ 12's goes on without it.
///
/// Not thread safe. Must not outlive the budget.
class CountedMemory final : public std::pmr::memory_resource {
public:
  CountedMemory(MemoryBudget& budget, std::shared_ptr<MemoryShare> share) noexcept
      : budget_(budget), share_(std::move(share)) {}

  /// Whether more is held than may be, since the budget has become smaller, or others have come.
  [[nodiscard]] bool too_much() const;

  /// Whether so many bytes could be handed out at once, if nothing else were from here.
  [[nodiscard]] bool could_have(std::size_t bytes) const;

private:
  /// The budget is asked for so many bytes at a time.
  static constexpr std::size_t grant = std::size_t{4} * 4096;

  void* do_allocate(std::size_t bytes, std::size_t alignment) override;
  void do_deallocate(void* memory, std::size_t bytes, std::size_t alignment) override;
  [[nodiscard]] bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override {
    return this == &other;
  }
  [[nodiscard]] std::size_t granted() const noexcept;
  bool take_grant();
  void give_grant() noexcept;

  MemoryBudget& budget_;
  const std::shared_ptr<MemoryShare> share_;
  /// Bytes that are handed out now, with what each allocation costs beside.
  std::size_t used_ = 0;
  /// What the budget was charged, in equal pieces.
  std::vector<std::shared_ptr<MemoryBudget::Buffer>> grants_;
};

} // namespace qcowcache
