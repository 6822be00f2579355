#pragma once

#include "util/byte_ranges.hpp"

#include <cstddef>
#include <cstdint>
#include <set>

namespace qcowcache {

/// Follows whether clients are uploading an image as it is, byte for byte: from a write at its very
/// begin on, each byte once, and from front to back. A client of the format itself writes what it
/// has written before again and again. Requests in flight may overtake each other, holes may be
/// zeroed, before or in between, or left out where they are small.
///
/// While it goes on nobody can expect to find what lies behind the furthest byte that it has
/// written, unless somebody had written there before.
///
/// Not thread safe. Without memory there is no upload.
class Upload {
public:
  /// `client` stands for whoever did it.
  void wrote(const ByteRange& range, const void* client) noexcept;
  void zeroed(const ByteRange& range) noexcept;
  /// This client does no more. With the last one that has written the upload ends.
  void left(const void* client) noexcept;
  void end() noexcept;

  /// Whether what should be in the range is still to come.
  [[nodiscard]] bool awaits(const ByteRange& range) const noexcept;

private:
  bool going_ = false;
  /// By the upload, and by anybody ever. Of many pieces the lowest become one.
  ByteRanges written_;
  ByteRanges ever_;
  std::uint64_t zeroed_to_ = 0;
  std::set<const void*> clients_;
};

} // namespace qcowcache
