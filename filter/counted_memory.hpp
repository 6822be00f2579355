#pragma once

#include "memory_budget.hpp"

#include <cstddef>
#include <memory>
#include <memory_resource>
#include <vector>

namespace qcowcache {

/// Memory for containers that counts in the budget, piece by piece as it is needed, and is no more
/// than one `share`-th of it. Throws std::bad_alloc when that, or the budget, is used up.
///
/// The standard library's pools are not for memory that ends: libstdc++ 12's goes on without it.
///
/// Not thread safe. Must not outlive the budget.
class CountedMemory final : public std::pmr::memory_resource {
public:
  CountedMemory(MemoryBudget& budget, std::size_t share) noexcept
      : budget_(budget), share_(share) {}

  /// Bytes that are handed out now, with what each allocation costs beside.
  [[nodiscard]] std::size_t used() const noexcept { return used_; }
  /// Whether more is held than may be, since the budget has become smaller.
  [[nodiscard]] bool too_much() const { return grants_.size() * grant > budget_.limit() / share_; }

  /// Whether so many bytes could be handed out at once, if nothing else were.
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

  MemoryBudget& budget_;
  const std::size_t share_;
  std::size_t used_ = 0;
  /// What the budget was charged, in equal pieces.
  std::vector<std::shared_ptr<MemoryBudget::Buffer>> grants_;
};

} // namespace qcowcache
