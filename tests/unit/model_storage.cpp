#include "model_storage.hpp"

#include "all_zeros.hpp"
#include "copy_bytes.hpp"

#include <algorithm>
#include <system_error>

using qcowcache::ByteRange;
using qcowcache::copy_bytes;
using qcowcache::Fua;

void ModelDisk::write(std::uint64_t offset, std::span<const std::byte> data) {
  copy_bytes(data, now_.begin() + static_cast<std::ptrdiff_t>(offset));
}

void ModelDisk::harden(const ByteRange& range) {
  copy_bytes(now(range), durable_.begin() + static_cast<std::ptrdiff_t>(range.begin));
}

void ModelDisk::resize(std::uint64_t size) {
  now_.resize(size);
  durable_.resize(size);
}

void ModelStorage::ask(Fails kind, const ByteRange& range) {
  const Verdict verdict = watch_.judge({kind, range, {}, false, false, connection_});
  if (verdict.error != 0)
    throw std::system_error(verdict.error, std::generic_category(), "refused");
}

void ModelStorage::change(Fails kind, const ByteRange& range, std::span<const std::byte> data,
                          bool fua, bool fast) {
  const Verdict verdict = watch_.judge(
      {kind, range, kind == Fails::write ? data : data.first(0), fua, fast, connection_});
  const std::uint64_t half =
      qcowcache::align_down(range.size() / 2, setup_.minimum); // what is left of it when it is torn
  const std::uint64_t done = verdict.lost         ? 0
                             : verdict.error == 0 ? range.size()
                             : verdict.torn       ? half
                                                  : 0;
  if (!data.empty())
    disk_->write(range.begin, data.first(done));
  if (!capabilities_.can_flush)
    disk_->harden(range); // it has nothing volatile
  if (verdict.error != 0)
    throw std::system_error(verdict.error, std::generic_category(), "refused");
  if (fua && capabilities_.fua == Fua::emulate)
    disk_->harden({0, disk_->size()});
  else if (fua)
    disk_->harden(range);
}

void ModelStorage::do_read(std::uint64_t offset, std::span<std::byte> data) {
  const ByteRange range{offset, offset + data.size()};
  ask(Fails::read, range);
  copy_bytes(disk_->now(range), data.begin());
}

void ModelStorage::do_write(std::uint64_t offset, std::span<const std::byte> data, bool fua) {
  change(Fails::write, {offset, offset + data.size()}, data, fua, false);
}

void ModelStorage::do_flush() {
  ask(Fails::flush, {});
  disk_->harden({0, disk_->size()});
}

void ModelStorage::do_zero(const ByteRange& range, const ZeroOptions& options) {
  const std::vector<std::byte> zeros(range.size());
  change(Fails::zero, range, zeros, options.fua, options.fast);
}

void ModelStorage::do_trim(const ByteRange& range, bool fua) {
  std::vector<std::byte> after;
  if (setup_.trims != Trims::keeps)
    after.assign(range.size(),
                 std::byte{setup_.trims == Trims::zeros ? std::uint8_t{0} : std::uint8_t{0xee}});
  change(Fails::trim, range, after, fua, false);
}

void ModelStorage::do_cache(const ByteRange& range) {
  ask(Fails::cache, range);
}

qcowcache::Storage::ExtentType ModelStorage::type_of(const ByteRange& part) const {
  const bool zeros = qcowcache::all_zeros(disk_->now(part));
  const std::uint64_t number = part.begin / setup_.grain;
  if (!zeros)
    return number % 5 == 0 ? ExtentType::hole : ExtentType::data;
  if (setup_.shy && number % 3 == 0)
    return ExtentType::data;
  return number % 2 == 0 ? ExtentType::hole_and_zero : ExtentType::zero;
}

qcowcache::Storage::Extents ModelStorage::do_extents(const ByteRange& range, bool only_first) {
  ask(Fails::extents, range);
  Extents found;
  for (ByteRange rest = range; !rest.empty();) {
    const ByteRange part{rest.begin,
                         std::min(rest.end, (rest.begin / setup_.grain + 1) * setup_.grain)};
    const ExtentType type = type_of(part);
    if (!found.empty() && found.back().type == type)
      found.back().range.end = part.end;
    else if ((only_first || setup_.shy) && !found.empty())
      return found;
    else
      found.push_back({part, type});
    rest.begin = part.end;
  }
  return found;
}
