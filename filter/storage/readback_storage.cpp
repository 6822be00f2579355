#include "storage/readback_storage.hpp"

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <vector>

namespace qcowcache {

// What arrives here has been cut to what storage takes, so that the storage below cuts nothing.

void ReadbackStorage::do_read(std::uint64_t offset, std::span<std::byte> data) {
  below_->read(offset, data);
}

void ReadbackStorage::do_write(std::uint64_t offset, std::span<const std::byte> data, bool fua) {
  std::vector<std::byte> stored(data.size()); // first: a failure here has written nothing
  below_->write(offset, data, fua);
  try {
    below_->read(offset, stored);
  } catch (const std::system_error& error) {
    throw NotAsWritten(error.code());
  }
  const auto difference = std::ranges::mismatch(data, stored).in1;
  if (difference == data.end())
    return;
  report_({offset, offset + data.size()},
          offset + static_cast<std::uint64_t>(difference - data.begin()));
  throw NotAsWritten(std::error_code(EIO, std::generic_category()));
}

void ReadbackStorage::do_flush() {
  below_->flush();
}

void ReadbackStorage::do_zero(const ByteRange& range, const ZeroOptions& options) {
  below_->zero(range, options);
}

void ReadbackStorage::do_trim(const ByteRange& range, bool fua) {
  below_->trim(range, fua);
}

void ReadbackStorage::do_cache(const ByteRange& range) {
  below_->cache(range);
}

Storage::Extents ReadbackStorage::do_extents(const ByteRange& range, bool only_first) {
  return below_->extents(range, only_first);
}

} // namespace qcowcache
