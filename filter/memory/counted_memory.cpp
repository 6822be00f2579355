#include "memory/counted_memory.hpp"

#include <new>
#include <utility>

namespace qcowcache {

namespace {

/// What an allocation costs beside its own bytes, at most.
constexpr std::size_t overhead = 32;

} // namespace

bool MemoryShare::take(std::size_t most, std::size_t own, std::size_t more) noexcept {
  std::size_t taken = taken_;
  do {
    if (taken + own + more > most)
      return false;
  } while (!taken_.compare_exchange_weak(taken, taken + more));
  return true;
}

std::size_t CountedMemory::granted() const noexcept {
  // The budget hands out whole pages, so one of each grant lies idle.
  return grants_.size() * (grant - MemoryBudget::page_size);
}

bool CountedMemory::too_much() const {
  const std::size_t most = share_->most(budget_);
  const std::size_t taken = share_->taken();
  const std::size_t own = grants_.size() * grant;
  // The last grant was taken when it was not there yet.
  return own > 0 && (taken > most || taken + own > most + 2 * grant);
}

bool CountedMemory::could_have(std::size_t bytes) const {
  const std::size_t most = share_->most(budget_) / grant;
  const std::size_t others = share_->taken() / grant - grants_.size();
  // The last of so many is the one for which most has to be free.
  const std::size_t grants = others >= most ? 0 : (most - others + 1) / 2;
  return bytes + overhead <= grants * (grant - MemoryBudget::page_size);
}

bool CountedMemory::take_grant() {
  grants_.reserve(grants_.size() + 1);
  if (!share_->take(share_->most(budget_), grants_.size() * grant, grant))
    return false;
  std::shared_ptr<MemoryBudget::Buffer> more;
  try {
    more = budget_.try_take(MemoryBudget::page_size, grant - MemoryBudget::page_size);
  } catch (const std::bad_alloc&) {
    more = nullptr;
  }
  if (!more) {
    share_->give_back(grant);
    return false;
  }
  grants_.push_back(std::move(more));
  return true;
}

void CountedMemory::give_grant() noexcept {
  grants_.pop_back();
  share_->give_back(grant);
}

void* CountedMemory::do_allocate(std::size_t bytes, std::size_t alignment) {
  const std::size_t before = grants_.size();
  const auto give_up = [&]() noexcept {
    while (grants_.size() > before) // what is of no use here is of use to others
      give_grant();
  };
  try {
    while (used_ + bytes + overhead > granted()) {
      if (!take_grant())
        throw std::bad_alloc();
    }
    void* const memory = ::operator new (bytes, std::align_val_t{alignment});
    used_ += bytes + overhead;
    return memory;
  } catch (const std::bad_alloc&) {
    give_up();
    throw;
  }
}

void CountedMemory::do_deallocate(void* memory, std::size_t bytes, std::size_t alignment) {
  ::operator delete (memory, std::align_val_t{alignment});
  used_ -= bytes + overhead;
  // One is kept, so that a container that grows and shrinks does not go back and forth.
  const auto spare = [this](std::size_t grants) {
    return used_ + grants * (grant - MemoryBudget::page_size) <= granted();
  };
  while (!grants_.empty() && (used_ == 0 || spare(2) || (spare(1) && too_much())))
    give_grant();
}

} // namespace qcowcache
