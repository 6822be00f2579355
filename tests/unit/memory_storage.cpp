#include "memory_storage.hpp"

#include "copy_bytes.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <system_error>

using qcowcache::ByteRange;
using qcowcache::Capabilities;
using qcowcache::Fua;

namespace {

auto at(std::vector<std::byte>& bytes, std::uint64_t offset) {
  return bytes.begin() + static_cast<std::ptrdiff_t>(offset);
}

auto at(const std::vector<std::byte>& bytes, std::uint64_t offset) {
  return bytes.begin() + static_cast<std::ptrdiff_t>(offset);
}

} // namespace

void MemoryDisk::read(std::uint64_t offset, std::span<std::byte> data) const {
  const std::lock_guard lock(mutex_);
  std::copy_n(at(now_, offset), data.size(), data.begin());
}

void MemoryDisk::write(std::uint64_t offset, std::span<const std::byte> data, bool durable) {
  const std::lock_guard lock(mutex_);
  qcowcache::copy_bytes(data, at(now_, offset));
  if (durable)
    qcowcache::copy_bytes(data, at(durable_, offset));
}

void MemoryDisk::zero(const ByteRange& range, bool durable) {
  const std::lock_guard lock(mutex_);
  std::fill_n(at(now_, range.begin), range.size(), std::byte{0});
  if (durable)
    std::fill_n(at(durable_, range.begin), range.size(), std::byte{0});
}

void MemoryDisk::allocate(const ByteRange& range) {
  const std::lock_guard lock(mutex_);
  const ByteRange blocks = qcowcache::align_outward(range, 4096);
  if (allocated_.bytes() + allocated_.missing(blocks).bytes() > room)
    throw std::system_error(ENOSPC, std::generic_category(), "full");
  allocated_.add(blocks);
}

void MemoryDisk::deallocate(const ByteRange& range) {
  const std::lock_guard lock(mutex_);
  allocated_.remove(qcowcache::align_inward(range, 4096));
}

qcowcache::ByteRanges MemoryDisk::allocated() const {
  const std::lock_guard lock(mutex_);
  return allocated_;
}

void MemoryDisk::flush() {
  const std::lock_guard lock(mutex_);
  durable_ = now_;
}

bool MemoryDisk::all_zeros(const ByteRange& range) const {
  const std::lock_guard lock(mutex_);
  // As fast as memcmp is: under sanitizers a loop over single bytes takes most of a test's time.
  const std::span<const std::byte> bytes = std::span(now_).subspan(range.begin, range.size());
  return bytes.empty() || (bytes.front() == std::byte{0} &&
                           std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) == 0);
}

std::vector<std::byte> MemoryDisk::now() const {
  const std::lock_guard lock(mutex_);
  return now_;
}

std::vector<std::byte> MemoryDisk::durable() const {
  const std::lock_guard lock(mutex_);
  return durable_;
}

Capabilities MemoryStorage::everything(std::uint64_t size) {
  Capabilities capabilities;
  capabilities.size = size;
  capabilities.can_write = true;
  capabilities.can_flush = true;
  capabilities.can_trim = true;
  capabilities.can_zero = true;
  capabilities.can_fast_zero = true;
  capabilities.can_extents = true;
  capabilities.can_cache = true;
  capabilities.can_multi_conn = true;
  capabilities.fua = Fua::native;
  return capabilities;
}

std::vector<MemoryStorage::Call> MemoryStorage::calls() const {
  const std::lock_guard lock(mutex_);
  return calls_;
}

std::vector<MemoryStorage::Call> MemoryStorage::calls(Kind kind) const {
  std::vector<Call> of_kind;
  std::ranges::copy_if(calls(), std::back_inserter(of_kind),
                       [kind](const Call& call) { return call.kind == kind; });
  return of_kind;
}

void MemoryStorage::forget_calls() {
  const std::lock_guard lock(mutex_);
  calls_.clear();
}

std::vector<std::string> MemoryStorage::violations() const {
  const std::lock_guard lock(mutex_);
  return violations_;
}

void MemoryStorage::begin(const Call& call, bool allowed) {
  {
    const std::lock_guard lock(mutex_);
    const ByteRange& range = call.range;
    const auto violate = [&](const char* rule) {
      violations_.push_back(std::string(rule) + ": " + std::to_string(range.begin) + " to " +
                            std::to_string(range.end));
    };
    const bool ragged_end =
        range.end % capabilities_.minimum != 0 && range.end != capabilities_.size;
    if (!allowed)
      violate("not supported");
    if (call.kind != Kind::flush && range.empty())
      violate("empty");
    if (range.end > capabilities_.size)
      violate("past the end");
    if (range.begin % capabilities_.minimum != 0 || ragged_end)
      violate("ragged");
    if (range.size() > capabilities_.maximum)
      violate("too large");
    if (call.fua && capabilities_.fua == Fua::none)
      violate("FUA not supported");
    calls_.push_back(call);
  }
  if (before)
    before(call);
}

void MemoryStorage::end(const Call& call) const {
  if (after)
    after(call);
}

void MemoryStorage::do_read(std::uint64_t offset, std::span<std::byte> data) {
  const Call call{Kind::read, {offset, offset + data.size()}, false};
  begin(call, true);
  disk_->read(offset, data);
  end(call);
}

void MemoryStorage::do_write(std::uint64_t offset, std::span<const std::byte> data, bool fua) {
  const Call call{Kind::write, {offset, offset + data.size()}, fua};
  begin(call, capabilities_.can_write);
  disk_->allocate(call.range);
  disk_->write(offset, data, fua);
  end(call);
}

void MemoryStorage::do_flush() {
  const Call call{Kind::flush, {}, false};
  begin(call, capabilities_.can_flush);
  disk_->flush();
  end(call);
}

void MemoryStorage::do_zero(const ByteRange& range, const ZeroOptions& options) {
  const Call call{Kind::zero, range, options.fua, options.may_trim};
  begin(call, capabilities_.can_write && (!options.fast || capabilities_.can_fast_zero));
  if (options.may_trim)
    disk_->deallocate(range);
  else
    disk_->allocate(range);
  disk_->zero(range, options.fua);
  end(call);
}

void MemoryStorage::do_trim(const ByteRange& range, bool fua) {
  const Call call{Kind::trim, range, fua};
  begin(call, capabilities_.can_trim);
  disk_->deallocate(range);
  disk_->zero(range, fua);
  end(call);
}

void MemoryStorage::do_cache(const ByteRange& range) {
  const Call call{Kind::cache, range, false};
  begin(call, capabilities_.can_cache);
  end(call);
}

qcowcache::Storage::Extents MemoryStorage::do_extents(const ByteRange& range, bool only_first) {
  const Call call{Kind::extents, range, false};
  begin(call, capabilities_.can_extents);
  constexpr std::uint64_t block = 4096;
  const qcowcache::ByteRanges data = zeros_are_data ? disk_->allocated() : qcowcache::ByteRanges();
  Extents found;
  bool complete = false;
  for (ByteRange rest = range; !rest.empty() && !complete;) {
    const ByteRange part{rest.begin,
                         std::min(rest.end, qcowcache::align_down(rest.begin, block) + block)};
    const bool hole = disk_->all_zeros(part) && !data.overlaps(part);
    const ExtentType type = hole ? ExtentType::hole_and_zero : ExtentType::data;
    if (!found.empty() && found.back().type == type)
      found.back().range.end = part.end;
    else if (only_first && !found.empty())
      complete = true;
    else
      found.push_back({part, type});
    rest.begin = part.end;
  }
  end(call);
  return found;
}
