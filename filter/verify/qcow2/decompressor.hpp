#pragma once

#include "verify/qcow2/header.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace qcowcache::qcow2 {

/// What became of decoding the bytes of a compressed cluster.
struct Decoding {
  enum class Result {
    /// Exactly one cluster, to the end of its stream: QEMU can read it.
    whole,
    /// The bytes end before the stream does.
    too_short,
    /// The stream goes on after a whole cluster.
    no_end,
    /// The stream ends before a whole cluster.
    too_little,
    /// The decoder says that this is no stream.
    damaged,
  };

  Result result = Result::damaged;
  /// How many of the bytes the stream has; 0 unless `whole`.
  std::size_t stream_size = 0;
  /// The decoder's own words where it has any, otherwise what is wrong in ours; "" when `whole`.
  /// Lives as long as the program.
  const char* reason = "";

  [[nodiscard]] bool whole() const noexcept { return result == Result::whole; }
};

/// Decodes compressed clusters, strictly: what QEMU writes, and nothing that QEMU cannot read.
///
/// Keeps its decoders and a buffer of one cluster between calls. Allocates nothing by what a stream
/// says of itself. Not thread safe. Throws std::bad_alloc.
class Decompressor {
public:
  Decompressor();
  Decompressor(Decompressor&& other) noexcept;
  Decompressor& operator=(Decompressor&&) = delete;
  Decompressor(const Decompressor&) = delete;
  Decompressor& operator=(const Decompressor&) = delete;
  ~Decompressor();

  /// Decodes the stream that begins at the first of `bytes`; bytes behind it are not looked at.
  /// `cluster_size` is what it has to become, in bytes.
  [[nodiscard]] Decoding decode(Compression compression, std::span<const std::byte> bytes,
                                std::uint32_t cluster_size);

  /// Whether a stream can begin like this; tells most of what is none apart, at no cost.
  [[nodiscard]] static bool may_begin(Compression compression,
                                      std::span<const std::byte> bytes) noexcept;

private:
  class Inflate;
  class Zstd;

  std::unique_ptr<Inflate> inflate_;
  std::unique_ptr<Zstd> zstd_;
  std::unique_ptr<std::byte[]> output_;
  std::uint32_t output_size_ = 0;
};

} // namespace qcowcache::qcow2
