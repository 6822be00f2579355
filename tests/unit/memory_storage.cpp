#include "memory_storage.hpp"

#include "util/all_zeros.hpp"
#include "util/copy_bytes.hpp"

#include <algorithm>
#include <cerrno>
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

void MemoryDisk::harden(const ByteRange& range) {
  const std::lock_guard lock(mutex_);
  qcowcache::copy_bytes(std::span(now_).subspan(range.begin, range.size()),
                        at(durable_, range.begin));
}

void MemoryDisk::resize(std::uint64_t size) {
  const std::lock_guard lock(mutex_);
  now_.resize(size);
  durable_.resize(size);
  size_ = size;
}

bool MemoryDisk::all_zeros(const ByteRange& range) const {
  const std::lock_guard lock(mutex_);
  return qcowcache::all_zeros(std::span(now_).subspan(range.begin, range.size()));
}

std::vector<std::byte> MemoryDisk::now(const ByteRange& range) const {
  const std::lock_guard lock(mutex_);
  return {at(now_, range.begin), at(now_, range.end)};
}

std::vector<std::byte> MemoryDisk::durable(const ByteRange& range) const {
  const std::lock_guard lock(mutex_);
  return {at(durable_, range.begin), at(durable_, range.end)};
}

MemoryStorage::Hook MemoryStorage::refusal(Kind kind, int error) {
  return [kind, error](const Call& call) {
    if (call.kind == kind)
      throw std::system_error(error, std::generic_category(), "refused");
  };
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

void MemoryStorage::note(const Call& call, bool allowed) {
  const std::lock_guard lock(mutex_);
  const ByteRange& range = call.range;
  const auto violate = [&](const char* rule) {
    violations_.push_back(std::string(rule) + ": " + std::to_string(range.begin) + " to " +
                          std::to_string(range.end));
  };
  const bool ragged_end = range.end % capabilities_.minimum != 0 && range.end != capabilities_.size;
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
  if (call.fast && !capabilities_.can_fast_zero)
    violate("fast zero not supported");
  calls_.push_back(call);
  calls_.back().data = {};
}

template <typename Work>
void MemoryStorage::carry_out(const Call& call, bool allowed, Work work) {
  note(call, allowed);
  if (before)
    before(call);
  const Verdict verdict = judge ? judge(call) : Verdict();
  ByteRange part = call.range;
  if (verdict.done == Verdict::Part::half)
    part.end = part.begin + qcowcache::align_down(part.size() / 2, capabilities_.minimum);
  if (verdict.done == Verdict::Part::all || (verdict.done == Verdict::Part::half && !part.empty()))
    work(part);
  if (verdict.error != 0)
    throw std::system_error(verdict.error, std::generic_category(), "refused");
  if (after)
    after(call);
  // As nbdkit does it.
  if (call.fua && capabilities_.fua == Fua::emulate)
    do_flush();
}

/// Whether what a request changes is there to stay: always where there is nothing volatile.
bool MemoryStorage::hardens(bool fua) const noexcept {
  return !capabilities_.can_flush || (fua && capabilities_.fua == Fua::native);
}

void MemoryStorage::do_read(std::uint64_t offset, std::span<std::byte> data) {
  carry_out({Kind::read, {offset, offset + data.size()}}, true,
            [&](const ByteRange& part) { disk_->read(offset, data.first(part.size())); });
}

void MemoryStorage::do_write(std::uint64_t offset, std::span<const std::byte> data, bool fua) {
  Call call{Kind::write, {offset, offset + data.size()}, fua};
  call.data = data;
  carry_out(call, capabilities_.can_write, [&](const ByteRange& part) {
    disk_->allocate(part);
    disk_->write(offset, data.first(part.size()), hardens(fua));
  });
}

void MemoryStorage::do_flush() {
  carry_out({Kind::flush, {}}, capabilities_.can_flush, [&](const ByteRange& /*part*/) {
    disk_->harden({0, disk_->size()});
  });
}

void MemoryStorage::do_zero(const ByteRange& range, const ZeroOptions& options) {
  carry_out({Kind::zero, range, options.fua, options.may_trim, options.fast},
            capabilities_.can_write && capabilities_.can_zero, [&](const ByteRange& part) {
              if (options.may_trim)
                disk_->deallocate(part);
              else
                disk_->allocate(part);
              disk_->zero(part, hardens(options.fua));
            });
}

void MemoryStorage::do_trim(const ByteRange& range, bool fua) {
  carry_out({Kind::trim, range, fua}, capabilities_.can_write && capabilities_.can_trim,
            [&](const ByteRange& part) {
              disk_->deallocate(part);
              if (trimmed)
                disk_->write(part.begin, std::vector(part.size(), *trimmed), hardens(fua));
              else if (hardens(fua))
                disk_->harden(part);
            });
}

void MemoryStorage::do_cache(const ByteRange& range) {
  carry_out({Kind::cache, range}, capabilities_.can_cache, [](const ByteRange& /*part*/) {});
}

qcowcache::Storage::Extents MemoryStorage::do_extents(const ByteRange& range, bool only_first) {
  Extents found;
  carry_out({Kind::extents, range}, capabilities_.can_extents, [&](const ByteRange& /*part*/) {
    const qcowcache::ByteRanges data =
        zeros_are_data ? disk_->allocated() : qcowcache::ByteRanges();
    for (ByteRange rest = range; !rest.empty();) {
      const ByteRange part{rest.begin, std::min(rest.end, (rest.begin / grain + 1) * grain)};
      const bool zeros = disk_->all_zeros(part) && !data.overlaps(part);
      const ExtentType type = type_of ? type_of(part, zeros)
                              : zeros ? ExtentType::hole_and_zero
                                      : ExtentType::data;
      if (!found.empty() && found.back().type == type)
        found.back().range.end = part.end;
      else if ((only_first || tells_one) && !found.empty())
        return;
      else
        found.push_back({part, type});
      rest.begin = part.end;
    }
  });
  return found;
}
