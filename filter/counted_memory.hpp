#pragma once

#include "memory_budget.hpp"

#include <cstddef>
#include <map>
#include <memory>
#include <memory_resource>

namespace qcowcache {

/// Memory for containers that counts in the budget: whole pages from there, and no more than one
/// `share`-th of the budget. Throws std::bad_alloc when that, or the budget, is used up.
///
/// Not thread safe. Must not outlive the budget.
class CountedMemory final : public std::pmr::memory_resource {
public:
  CountedMemory(MemoryBudget& budget, std::size_t share) noexcept
      : budget_(budget), share_(share) {}

  /// Bytes that are handed out now.
  [[nodiscard]] std::size_t used() const noexcept { return used_; }

private:
  void* do_allocate(std::size_t bytes, std::size_t alignment) override;
  void do_deallocate(void* memory, std::size_t bytes, std::size_t alignment) override;
  [[nodiscard]] bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override {
    return this == &other;
  }

  MemoryBudget& budget_;
  const std::size_t share_;
  std::size_t used_ = 0;
  std::map<void*, std::shared_ptr<MemoryBudget::Buffer>> buffers_;
};

} // namespace qcowcache
