#include "counted_memory.hpp"

#include <new>

namespace qcowcache {

namespace {

/// The budget hands out whole pages, so one of each grant lies idle.
constexpr std::size_t page_size = 4096;
/// What an allocation costs beside its own bytes, at most.
constexpr std::size_t overhead = 32;

} // namespace

std::size_t CountedMemory::granted() const noexcept {
  return grants_.size() * (grant - page_size);
}

bool CountedMemory::could_have(std::size_t bytes) const {
  return bytes + overhead <= budget_.limit() / share_ / grant * (grant - page_size);
}

void* CountedMemory::do_allocate(std::size_t bytes, std::size_t alignment) {
  const std::size_t most = budget_.limit() / share_;
  while (used_ + bytes + overhead > granted()) {
    if ((grants_.size() + 1) * grant > most)
      throw std::bad_alloc();
    grants_.reserve(grants_.size() + 1);
    std::shared_ptr<MemoryBudget::Buffer> more = budget_.try_take(page_size, grant - page_size);
    if (!more)
      throw std::bad_alloc();
    grants_.push_back(std::move(more));
  }
  void* const memory = ::operator new (bytes, std::align_val_t{alignment});
  used_ += bytes + overhead;
  return memory;
}

void CountedMemory::do_deallocate(void* memory, std::size_t bytes, std::size_t alignment) {
  ::operator delete (memory, std::align_val_t{alignment});
  used_ -= bytes + overhead;
  // One is kept, so that a container that grows and shrinks does not go back and forth.
  const auto spare = [this](std::size_t grants) {
    return used_ + grants * (grant - page_size) <= granted();
  };
  while (!grants_.empty() && (used_ == 0 || spare(2) || (spare(1) && too_much())))
    grants_.pop_back();
}

} // namespace qcowcache
