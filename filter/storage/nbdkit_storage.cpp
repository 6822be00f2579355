#include "storage/nbdkit_storage.hpp"

#include <algorithm>
#include <bit>
#include <memory>
#include <system_error>

namespace qcowcache {

namespace {

/// The answer of a can_* function, which has reported an error already.
int answer(int result) {
  if (result == -1)
    throw std::system_error(EIO, std::generic_category(), "storage did not tell what it can do");
  return result;
}

void check(int result, int error, const char* request) {
  if (result == -1)
    throw std::system_error(error != 0 ? error : EIO, std::generic_category(), request);
}

std::uint32_t fua_flag(bool fua) {
  return fua ? NBDKIT_FLAG_FUA : 0U;
}

std::uint32_t count_of(const ByteRange& range) {
  return static_cast<std::uint32_t>(range.size());
}

Storage::ExtentType type_of(std::uint32_t flags) {
  const bool hole = (flags & NBDKIT_EXTENT_HOLE) != 0;
  const bool zero = (flags & NBDKIT_EXTENT_ZERO) != 0;
  if (hole)
    return zero ? Storage::ExtentType::hole_and_zero : Storage::ExtentType::hole;
  return zero ? Storage::ExtentType::zero : Storage::ExtentType::data;
}

} // namespace

NbdkitStorage::NbdkitStorage(nbdkit_next* next) : next_(next) {
  const std::int64_t size = next->get_size(next);
  std::uint32_t minimum = 0;
  std::uint32_t preferred = 0;
  std::uint32_t maximum = 0;
  if (size == -1)
    throw std::system_error(EIO, std::generic_category(), "storage did not tell what it can do");

  Capabilities& found = capabilities_;
  // nbdkit remembers no failure, so it is asked only here: each time it would say why once more.
  found.block_sizes_failed = next->block_size(next, &minimum, &preferred, &maximum) == -1;
  if (!found.block_sizes_failed && minimum != 0) {
    found.minimum = std::bit_floor(minimum);
    found.preferred = std::bit_floor(preferred);
    found.maximum = maximum;
  }
  found.size = align_down(static_cast<std::uint64_t>(size), found.minimum);
  found.can_write = answer(next->can_write(next)) != 0;
  found.can_flush = answer(next->can_flush(next)) != 0;
  found.can_trim = answer(next->can_trim(next)) != 0;
  found.can_zero = answer(next->can_zero(next)) == NBDKIT_ZERO_NATIVE;
  found.can_fast_zero = answer(next->can_fast_zero(next)) != 0;
  found.can_extents = answer(next->can_extents(next)) != 0;
  found.can_cache = answer(next->can_cache(next)) == NBDKIT_CACHE_NATIVE;
  found.can_multi_conn = answer(next->can_multi_conn(next)) != 0;
  // nbdkit remembers the answer; asked later it may find a filter below that has lost its storage.
  answer(next->is_rotational(next));
  switch (answer(next->can_fua(next))) {
  case NBDKIT_FUA_NATIVE:
    found.fua = Fua::native;
    break;
  case NBDKIT_FUA_EMULATE:
    found.fua = Fua::emulate;
    break;
  default:
    found.fua = Fua::none;
    break;
  }
}

void NbdkitStorage::do_read(std::uint64_t offset, std::span<std::byte> data) {
  int error = 0;
  const int result =
      next_->pread(next_, data.data(), static_cast<std::uint32_t>(data.size()), offset, 0, &error);
  check(result, error, "storage refused to read");
}

void NbdkitStorage::do_write(std::uint64_t offset, std::span<const std::byte> data, bool fua) {
  int error = 0;
  const int result = next_->pwrite(next_, data.data(), static_cast<std::uint32_t>(data.size()),
                                   offset, fua_flag(fua), &error);
  check(result, error, "storage refused to write");
}

void NbdkitStorage::do_flush() {
  int error = 0;
  const int result = next_->flush(next_, 0, &error);
  check(result, error, "storage refused to flush");
}

void NbdkitStorage::do_zero(const ByteRange& range, const ZeroOptions& options) {
  int error = 0;
  const std::uint32_t flags = fua_flag(options.fua) |
                              (options.may_trim ? NBDKIT_FLAG_MAY_TRIM : 0U) |
                              (options.fast ? NBDKIT_FLAG_FAST_ZERO : 0U);
  const int result = next_->zero(next_, count_of(range), range.begin, flags, &error);
  check(result, error, "storage refused to zero");
}

void NbdkitStorage::do_trim(const ByteRange& range, bool fua) {
  int error = 0;
  const int result = next_->trim(next_, count_of(range), range.begin, fua_flag(fua), &error);
  check(result, error, "storage refused to trim");
}

void NbdkitStorage::do_cache(const ByteRange& range) {
  int error = 0;
  const int result = next_->cache(next_, count_of(range), range.begin, 0, &error);
  check(result, error, "storage refused to cache");
}

Storage::Extents NbdkitStorage::do_extents(const ByteRange& range, bool only_first) {
  const auto free_extents = [](nbdkit_extents* list) { nbdkit_extents_free(list); };
  const std::unique_ptr<nbdkit_extents, decltype(free_extents)> list(
      nbdkit_extents_new(range.begin, range.end), free_extents);
  if (!list)
    throw std::bad_alloc();
  int error = 0;
  const int result = next_->extents(next_, count_of(range), range.begin,
                                    only_first ? NBDKIT_FLAG_REQ_ONE : 0U, list.get(), &error);
  check(result, error, "storage refused to tell extents");

  Extents found;
  const std::size_t count = nbdkit_extents_count(list.get());
  found.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    const nbdkit_extent extent = nbdkit_get_extent(list.get(), i);
    found.push_back({{extent.offset, extent.offset + extent.length}, type_of(extent.type)});
  }
  return found;
}

} // namespace qcowcache
