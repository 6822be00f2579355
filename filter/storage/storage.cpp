#include "storage/storage.hpp"

#include <algorithm>
#include <bit>
#include <cerrno>

namespace qcowcache {

namespace {

/// nbdkit itself writes the zeros where a plugin cannot, and gets large requests wrong.
constexpr std::uint64_t largest_zero = std::uint64_t{32} * 1024 * 1024;
/// nbdkit's count is 32 bits wide; a round number below that keeps pieces aligned.
constexpr std::uint64_t largest_request = std::uint64_t{1} << 31U;

/// The first piece of `range` that is no larger than `most`, cut on a multiple of `alignment`.
ByteRange first_piece(const ByteRange& range, std::uint64_t most, std::uint64_t alignment) {
  if (range.size() <= most)
    return range;
  const std::uint64_t cut = align_down(range.begin + most, alignment);
  return {range.begin, cut > range.begin ? cut : range.begin + most};
}

/// Calls `request` for the pieces of `range`, in order.
template <typename Request>
void for_each_piece(const ByteRange& range, std::uint64_t most, std::uint64_t alignment,
                    Request request) {
  for (ByteRange rest = range; !rest.empty();) {
    const ByteRange piece = first_piece(rest, most, alignment);
    request(piece);
    rest.begin = piece.end;
  }
}

std::uint64_t most_for(const Capabilities& capabilities, std::uint64_t limit) {
  return std::min<std::uint64_t>(capabilities.maximum, limit);
}

} // namespace

bool no_room(const std::error_code& error) noexcept {
  return error == std::errc::no_space_on_device || error.value() == EDQUOT;
}

std::uint64_t Capabilities::write_alignment() const noexcept {
  const std::uint64_t within_maximum = std::bit_floor(std::uint64_t{maximum});
  return std::max<std::uint64_t>(minimum, std::min<std::uint64_t>(4096, within_maximum));
}

std::uint64_t Capabilities::rewritten_block() const noexcept {
  const std::uint64_t alignment = write_alignment();
  return preferred == maximum ? std::max<std::uint64_t>(preferred, alignment) : alignment;
}

bool Storage::piece_needs_fua(bool fua, const ByteRange& range, std::uint64_t end) const noexcept {
  const Fua how = capabilities().fua;
  return fua && (how == Fua::native || (how == Fua::emulate && end == range.end));
}

void Storage::read(std::uint64_t offset, std::span<std::byte> data) {
  for_each_piece({offset, offset + data.size()}, most_for(capabilities(), largest_request),
                 capabilities().rewritten_block(), [&](const ByteRange& piece) {
                   do_read(piece.begin, data.subspan(piece.begin - offset, piece.size()));
                   count(Count::storage_reads);
                   count(Count::storage_read_bytes, piece.size());
                 });
}

void Storage::write(std::uint64_t offset, std::span<const std::byte> data, bool fua) {
  const ByteRange range{offset, offset + data.size()};
  for_each_piece(range, most_for(capabilities(), largest_request), capabilities().rewritten_block(),
                 [&](const ByteRange& piece) {
                   try {
                     do_write(piece.begin, data.subspan(piece.begin - offset, piece.size()),
                              piece_needs_fua(fua, range, piece.end));
                   } catch (...) {
                     count(Count::refused_writes);
                     throw;
                   }
                   count(Count::storage_writes);
                   count(Count::storage_written_bytes, piece.size());
                 });
  if (fua && capabilities().fua == Fua::none)
    flush();
}

void Storage::flush() {
  if (!capabilities().can_flush)
    return;
  do_flush();
  count(Count::storage_flushes);
}

void Storage::zero(const ByteRange& range, const ZeroOptions& options) {
  for_each_piece(range, most_for(capabilities(), largest_zero), capabilities().rewritten_block(),
                 [&](const ByteRange& piece) {
                   ZeroOptions piece_options = options;
                   piece_options.fua = piece_needs_fua(options.fua, range, piece.end);
                   do_zero(piece, piece_options);
                   count(Count::storage_zeros);
                 });
  if (options.fua && capabilities().fua == Fua::none)
    flush();
}

void Storage::allocate(const ByteRange& range) {
  ZeroOptions options;
  options.fast = capabilities().can_fast_zero;
  for_each_piece(range, most_for(capabilities(), largest_request), capabilities().rewritten_block(),
                 [&](const ByteRange& piece) {
                   do_zero(piece, options);
                   count(Count::storage_zeros);
                 });
}

void Storage::trim(const ByteRange& range, bool fua) {
  for_each_piece(range, most_for(capabilities(), largest_zero), capabilities().rewritten_block(),
                 [&](const ByteRange& piece) {
                   do_trim(piece, piece_needs_fua(fua, range, piece.end));
                   count(Count::storage_trims);
                 });
  if (fua && capabilities().fua == Fua::none)
    flush();
}

void Storage::cache(const ByteRange& range) {
  for_each_piece(range, most_for(capabilities(), largest_request), capabilities().rewritten_block(),
                 [&](const ByteRange& piece) { do_cache(piece); });
}

std::uint64_t Storage::pieces(const ByteRange& range) const noexcept {
  std::uint64_t count = 0;
  for_each_piece(range, most_for(capabilities(), largest_zero), capabilities().rewritten_block(),
                 [&](const ByteRange& /*piece*/) { ++count; });
  return count;
}

Storage::Extents Storage::extents(const ByteRange& range, bool only_first) {
  const std::uint64_t most = most_for(capabilities(), largest_request);
  const ByteRange piece = first_piece(range, most, capabilities().rewritten_block());
  Extents found = do_extents(piece, only_first);
  // Storage may speak of more than it was asked about.
  for (Extent& extent : found)
    extent.range = extent.range.intersection(range);
  found.erase(std::remove_if(found.begin(), found.end(),
                             [](const Extent& extent) { return extent.range.empty(); }),
              found.end());
  return found;
}

} // namespace qcowcache
