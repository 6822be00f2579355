#include "recording_storage.hpp"

#include <thread>
#include <utility>

using qcowcache::ByteRange;
using qcowcache::Fua;
using Kind = Change::Kind;

template <typename Request>
void RecordingStorage::record(Change change, Request request) {
  // As nbdkit does it.
  const bool flush_behind = change.fua && capabilities().fua == Fua::emulate;
  if (flush_behind)
    change.fua = false;
  const std::size_t number = journal_.begin(Journal::Side::storage, std::move(change));
  std::this_thread::yield(); // requests take time, and others begin and end meanwhile
  request();
  std::this_thread::yield();
  journal_.end(Journal::Side::storage, number);
  if (flush_behind)
    do_flush();
}

void RecordingStorage::do_write(std::uint64_t offset, std::span<const std::byte> data, bool fua) {
  record({Kind::write, {offset, offset + data.size()}, {data.begin(), data.end()}, fua},
         [&] { below_.write(offset, data, fua); });
}

void RecordingStorage::do_flush() {
  record({Kind::flush, {}, {}, false}, [&] { below_.flush(); });
}

void RecordingStorage::do_zero(const ByteRange& range, const ZeroOptions& options) {
  record({Kind::zero, range, {}, options.fua}, [&] { below_.zero(range, options); });
}

void RecordingStorage::do_trim(const ByteRange& range, bool fua) {
  record({Kind::trim, range, {}, fua}, [&] { below_.trim(range, fua); });
}

void RecordingStorage::do_read(std::uint64_t offset, std::span<std::byte> data) {
  below_.read(offset, data);
}

void RecordingStorage::do_cache(const ByteRange& range) {
  below_.cache(range);
}

qcowcache::Storage::Extents RecordingStorage::do_extents(const ByteRange& range, bool only_first) {
  return below_.extents(range, only_first);
}
