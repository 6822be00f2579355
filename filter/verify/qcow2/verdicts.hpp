#pragma once

#include "util/byte_ranges.hpp"
#include "verify/qcow2/decompressor.hpp"
#include "verify/qcow2/l2_table.hpp"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace qcowcache::qcow2 {

/// What became of decoding streams, so that one which many entries name is decoded once. Has place
/// for a fixed number of them, 200 KB, taken when the first is noted; a new one may take the place
/// of another.
///
/// Not thread safe. Without memory it notes nothing.
class Verdicts {
public:
  /// What decoding this cluster would say, of which the file has the bytes up to `end`; nothing
  /// when that is not known.
  [[nodiscard]] std::optional<Decoding> find(const CompressedCluster& cluster,
                                             std::uint64_t end) const noexcept;
  void note(const CompressedCluster& cluster, std::uint64_t end, const Decoding& decoding) noexcept;
  /// The bytes of `range` are going to be others, or to be there at all.
  void forget(const ByteRange& range) noexcept;
  /// Forgets all, and gives the memory back.
  void clear() noexcept;

private:
  struct Noted {
    CompressedCluster cluster;
    std::uint64_t end = 0;
    Decoding decoding;
  };
  static constexpr std::size_t places = 4096;

  [[nodiscard]] static std::size_t place(std::uint64_t offset, std::uint32_t length) noexcept;

  /// Those whose cluster has no length are free.
  std::vector<Noted> noted_;
  /// All that is noted lies in here.
  ByteRange hull_;
};

} // namespace qcowcache::qcow2
