#include "counted_memory.hpp"

#include <algorithm>
#include <bit>
#include <new>

namespace qcowcache {

namespace {

constexpr std::size_t page_size = 4096;
/// For the entry that remembers the buffer.
constexpr std::size_t bookkeeping = 128;

/// Few different sizes, so that the budget can hand a buffer out again.
std::size_t rounded(std::size_t bytes) {
  return std::max(page_size, std::bit_ceil(bytes));
}

} // namespace

void* CountedMemory::do_allocate(std::size_t bytes, std::size_t alignment) {
  const std::size_t size = rounded(bytes);
  if (alignment > page_size || used_ + size + bookkeeping > budget_.limit() / share_)
    throw std::bad_alloc();
  std::shared_ptr<MemoryBudget::Buffer> buffer = budget_.try_take(size, bookkeeping);
  if (!buffer)
    throw std::bad_alloc();
  void* const memory = buffer->bytes().data();
  buffers_.emplace(memory, std::move(buffer));
  used_ += size + bookkeeping;
  return memory;
}

void CountedMemory::do_deallocate(void* memory, std::size_t bytes, std::size_t /*alignment*/) {
  buffers_.erase(memory);
  used_ -= rounded(bytes) + bookkeeping;
}

} // namespace qcowcache
