#include "model_client.hpp"

#include "image_bytes.hpp"
#include "util/copy_bytes.hpp"

#include <algorithm>
#include <cerrno>
#include <span>
#include <system_error>

using namespace qcowcache;

namespace {

using Bytes = std::vector<std::byte>;

std::string hexadecimal(std::byte byte) {
  constexpr const char* digits = "0123456789abcdef";
  const auto value = std::to_integer<unsigned>(byte);
  return {digits[value / 16], digits[value % 16]};
}

/// The bytes of `part` in those of `range`.
std::span<const std::byte> part_of(std::span<const std::byte> data, const ByteRange& range,
                                   const ByteRange& part) {
  return data.subspan(part.begin - range.begin, part.size());
}

/// Puts what is in `part` of `range` there.
void put(std::span<const std::byte> data, const ByteRange& range, const ByteRange& part,
         Bytes& bytes) {
  copy_bytes(data, bytes.begin() + static_cast<std::ptrdiff_t>(part.begin - range.begin));
}

std::uint64_t first_difference(std::span<const std::byte> a, std::span<const std::byte> b) {
  return static_cast<std::uint64_t>(std::ranges::mismatch(a, b).in1 - a.begin());
}

} // namespace

Bytes bytes_of(std::uint64_t value, const ByteRange& range) {
  if (value == 0)
    return Bytes(range.size());
  // Copied in pieces: loops over single bytes are slow under sanitizers.
  static const Bytes wheel = [] {
    Bytes all(std::size_t{255} * 256);
    for (std::size_t i = 0; i < all.size(); ++i)
      all[i] = static_cast<std::byte>(1 + i % 255);
    return all;
  }();
  const std::span<const std::byte> from =
      std::span(wheel).subspan((value * 37 + range.begin) % 255, wheel.size() - 255);
  Bytes bytes;
  while (bytes.size() < range.size()) {
    const auto piece = from.first(std::min(from.size(), range.size() - bytes.size()));
    bytes.insert(bytes.end(), piece.begin(), piece.end());
  }
  return bytes;
}

ByteRange ModelStripes::first_of_one_owner(const ByteRange& range) const noexcept {
  if (width == 0)
    return range;
  const std::uint64_t border =
      range.begin < header_end ? header_end : (range.begin / width + 1) * width;
  return {range.begin, std::min(range.end, border)};
}

/// Calls `visit` for the parts of `range` that the client owns.
template <typename Visit>
void ModelClient::for_each_own(const ByteRange& range, Visit visit) const {
  const std::uint64_t width = stripes_.width;
  if (width == 0) {
    visit(range);
    return;
  }
  const auto visit_part = [&](const ByteRange& part) {
    if (part.overlaps(range))
      visit(part.intersection(range));
  };
  if (number_ >= stripes_.clients)
    return; // an onlooker
  if (number_ == 0)
    visit_part({0, ModelStripes::header_end});
  const std::uint64_t period = width * stripes_.clients;
  for (std::uint64_t begin = range.begin / period * period + number_ * width; begin < range.end;
       begin += period)
    visit_part({std::max(begin, ModelStripes::header_end), begin + width});
}

void ModelClient::connect(Exports& exports, std::unique_ptr<MemoryStorage> storage, ModelView& view,
                          const std::string& name) {
  view_ = &view;
  storage_ = storage.get();
  connection_ = std::make_unique<Connection>(exports, name);
  connection_->begin(std::move(storage));
}

void ModelClient::disconnect(bool properly) {
  if (properly)
    connection_->drain();
  connection_->end();
  if (!storage_->violations().empty())
    referee_.breaks("storage was called wrongly: " + storage_->violations().front());
  storage_ = nullptr;
  connection_.reset();
}

const WriteCache* ModelClient::cache() const {
  const Image* const image = connection_ ? connection_->image() : nullptr;
  return image != nullptr ? &image->cache() : nullptr;
}

ByteRange ModelClient::range_of(const ModelStep& step) const {
  return ByteRange{step.offset, step.offset + step.length}.intersection({0, capabilities().size});
}

ByteRange ModelClient::changed_by(const ModelStep& step) const {
  const ByteRange range = range_of(step);
  if (range.empty() || !capabilities().can_write || !stripes_.owns(number_, range.begin))
    return {};
  return stripes_.first_of_one_owner(range);
}

bool ModelClient::reaches_all() const {
  if (cache() == nullptr)
    return true;
  const Unsaved unsaved = cache()->unsaved();
  return unsaved.bytes == 0 ||
         (capabilities().can_write && unsaved.ranges.hull().end <= capabilities().size);
}

void ModelClient::compare(const char* where, std::uint64_t offset,
                          std::span<const std::byte> data) {
  ModelBytes& bytes = view_->bytes;
  if (const auto wrong = bytes.first_wrong(offset, data)) {
    referee_.breaks(std::string(where) + ": byte " + std::to_string(*wrong) + " is " +
                    hexadecimal(data[*wrong - offset]) + " instead of " +
                    hexadecimal(bytes.at(*wrong)));
    return;
  }
  bytes.seen(offset, data);
}

void ModelClient::check_read(const ByteRange& range, std::span<const std::byte> data) {
  Bytes expected = view_->disk->now(range);
  for_each_own(range, [&](const ByteRange& part) {
    const auto found = part_of(data, range, part);
    compare("read", part.begin, found);
    put(found, range, part, expected);
  });
  if (!stripes_.at_once && !same(data, expected))
    referee_.breaks("read: byte " + std::to_string(range.begin + first_difference(data, expected)) +
                    " is not what another connection has stored");
}

void ModelClient::check_stored(const char* where, const ByteRange& range, bool durable) {
  const Bytes stored = durable ? view_->disk->durable(range) : view_->disk->now(range);
  for_each_own(range, [&](const ByteRange& part) {
    compare(where, part.begin, part_of(stored, range, part));
  });
}

void ModelClient::check_written(const MemoryStorage::Call& call) const {
  const Bytes now = view_->disk->now(call.range);
  Bytes expected = now;
  for_each_own(call.range, [&](const ByteRange& part) {
    const auto invented = first_without(part, [&](const ByteRange& piece) {
      const auto data = part_of(call.data, call.range, piece);
      return same(data, part_of(now, call.range, piece)) || view_->bytes.allows(piece.begin, data);
    });
    const ByteRange right{part.begin, invented.value_or(part.end)};
    put(part_of(call.data, call.range, right), call.range, right, expected);
  });
  if (same(call.data, expected))
    return;
  const std::uint64_t i = first_difference(call.data, expected);
  const std::uint64_t offset = call.range.begin + i;
  referee_.breaks("invented: byte " + std::to_string(offset) + " is written as " +
                  hexadecimal(call.data[i]) + ", storage has " + hexadecimal(now[i]) +
                  ", clients wrote " + hexadecimal(view_->bytes.at(offset)));
}

int ModelClient::request(const Image::Request& needed, const Work& work, int excused) {
  try {
    const Connection::InUse in_use = connection_->in_use(needed);
    work(in_use.cache, in_use.use.storage());
    return 0;
  } catch (const std::system_error& error) {
    const int code = error.code().value();
    if (!referee_.excuses(code) && code != excused)
      referee_.breaks(std::string("failed for no reason: ") + error.what());
    return code != 0 ? code : EIO;
  } catch (const std::exception& error) {
    referee_.breaks(std::string("failed: ") + error.what());
    return EIO;
  }
}

/// Whether a request that failed has changed nothing, as a single one for storage has not that was
/// refused at once.
bool ModelClient::untouched(const ByteRange& range) const {
  return referee_.untouched() &&
         storage_->pieces(align_outward(range, capabilities().write_alignment())) == 1;
}

int ModelClient::write(std::uint64_t offset, const Bytes& data, bool fua) {
  const ByteRange range{offset, offset + data.size()};
  view_->bytes.may_be(offset, data);
  const int error = request({true, range}, [&](WriteCache& cache, Storage& storage) {
    cache.write(storage, offset, data, fua);
  });
  if (error == 0) {
    view_->bytes.is(offset, data);
    if (fua)
      check_stored("stored by FUA", range, true);
    return 0;
  }
  constexpr std::uint64_t unit = WriteCache::least_unit_size;
  if ((fua || offset / unit == (range.end - 1) / unit) && untouched(range))
    view_->bytes.withdraw();
  return error;
}

int ModelClient::write_header(const ModelStep& step, const ByteRange& range) {
  const Bytes header = step.value == 0 ? Bytes(qcow2::header_bytes)
                                       : qcow2_header(static_cast<unsigned>(step.value));
  const ByteRange part = range.intersection({0, header.size()});
  if (part.empty())
    return 0;
  const auto bytes = part_of(header, {0, header.size()}, part);
  return write(part.begin, {bytes.begin(), bytes.end()}, step.fua);
}

int ModelClient::read(const ByteRange& range) {
  Bytes data(range.size());
  reading_ = true;
  const int error = request({false, range}, [&](WriteCache& cache, Storage& storage) {
    cache.read(storage, range.begin, data);
  });
  reading_ = false;
  if (error == 0)
    check_read(range, data);
  return error;
}

int ModelClient::zero(const ModelStep& step, const ByteRange& range) {
  const Bytes zeros(range.size());
  if (!capabilities().can_zero)
    return write(range.begin, zeros, step.fua); // nbdkit does the same
  const Storage::ZeroOptions options{step.may_trim, step.fua,
                                     step.fast && capabilities().can_fast_zero};
  const bool slow =
      align_inward(range, capabilities().minimum) != range || storage_->pieces(range) != 1;
  const bool cannot = options.fast && slow;
  view_->bytes.may_be(range.begin, zeros);
  const int error = request(
      {true, range},
      [&](WriteCache& cache, Storage& storage) { cache.zero(storage, range, options); },
      cannot ? ENOTSUP : 0);
  if (error == 0) {
    if (cannot)
      referee_.breaks("a fast zero that cannot be one did not fail");
    view_->bytes.is(range.begin, zeros);
    if (step.fua)
      check_stored("zeroed by FUA", range, true);
  } else if (cannot && error == ENOTSUP) {
    view_->bytes.withdraw();
  } else if (!slow && untouched(range)) {
    view_->bytes.withdraw();
  }
  return error;
}

int ModelClient::trim(const ModelStep& step, const ByteRange& range) {
  const ByteRange blocks = align_inward(range, capabilities().minimum);
  const int error = request({true, range}, [&](WriteCache& cache, Storage& storage) {
    cache.trim(storage, range, step.fua);
  });
  if (error != 0) {
    // A part may have been done. Bytes that storage lacks are not lost by it.
    for (const ByteRange& part : referee_.trimmed().inside(blocks))
      view_->bytes.may_be(part.begin, view_->disk->now(part));
    return error;
  }
  view_->bytes.is(blocks.begin, view_->disk->now(blocks));
  if (storage_->trimmed == std::byte{0} && !view_->disk->all_zeros(blocks))
    referee_.breaks("trim: " + to_string(blocks) + " was not trimmed");
  if (step.fua)
    check_stored("trimmed by FUA", blocks, true);
  return 0;
}

int ModelClient::extents(const ModelStep& step, const ByteRange& range) {
  Storage::Extents found;
  const int error = request({false, range}, [&](WriteCache& cache, Storage& storage) {
    found = cache.extents(storage, range, step.first);
  });
  if (error != 0)
    return error;
  std::uint64_t position = range.begin;
  for (const Storage::Extent& extent : found) {
    if (extent.range.begin != position || extent.range.empty() || extent.range.end > range.end) {
      referee_.breaks("extents: " + to_string(extent.range) + " does not follow " +
                      std::to_string(position));
      return 0;
    }
    position = extent.range.end;
    if (extent.type == Storage::ExtentType::zero ||
        extent.type == Storage::ExtentType::hole_and_zero)
      check_read(extent.range, Bytes(extent.range.size()));
  }
  if (position == range.begin)
    referee_.breaks("extents: none");
  return 0;
}

int ModelClient::flush() {
  const int error = request(
      {}, [](WriteCache& cache, Storage& storage) { cache.flush(storage); },
      reaches_all() ? 0 : EIO);
  if (error != 0)
    return error;
  if (!stripes_.at_once && (!cache()->clean() || cache()->unsaved().bytes > 0))
    referee_.breaks("flush: some bytes are still in memory only");
  check_stored("flushed", {0, view_->disk->size()}, true);
  return 0;
}

int ModelClient::carry_out(const ModelStep& step) {
  const ByteRange range = range_of(step);
  const ByteRange changes = changed_by(step);
  const Capabilities& can = capabilities();
  switch (step.kind) {
  case StepKind::write:
    return changes.empty() ? 0 : write(changes.begin, bytes_of(step.value, changes), step.fua);
  case StepKind::header:
    return write_header(step, changes);
  case StepKind::zero:
    return changes.empty() ? 0 : zero(step, changes);
  case StepKind::trim:
    return changes.empty() || !can.can_trim ? 0 : trim(step, changes);
  case StepKind::read:
    return range.empty() ? 0 : read(range);
  case StepKind::extents:
    return range.empty() || !can.can_extents ? 0 : extents(step, range);
  case StepKind::flush:
    return can.can_write ? flush() : 0;
  case StepKind::cache:
    return range.empty() || !can.can_cache
               ? 0
               : request({}, [&](WriteCache& /*cache*/, Storage& storage) {
                   storage.cache(align_outward(range, can.minimum));
                 });
  default:
    return 0;
  }
}
