#include "verify/qcow2/decompressor.hpp"

#include <zlib.h>
#include <zstd.h>
#include <zstd_errors.h>

#include <new>

namespace qcowcache::qcow2 {

namespace {

using Result = Decoding::Result;

/// QEMU compresses with a window of 12 bits, without zlib's header. A larger window accepts what
/// QEMU cannot read.
constexpr int raw_deflate_window = -12;

/// zstd's own default limit, which QEMU leaves in place, in bytes.
constexpr std::uint64_t largest_window = std::uint64_t{1} << 27U;

constexpr std::size_t magic_size = 4;
constexpr std::uint32_t skippable_magic = 0x184d2a50;
constexpr std::uint32_t skippable_mask = 0xfffffff0;

std::uint32_t little_endian_32(std::span<const std::byte> bytes) noexcept {
  std::uint32_t value = 0;
  for (std::size_t i = magic_size; i-- > 0;)
    value = value << 8U | std::to_integer<std::uint32_t>(bytes[i]);
  return value;
}

/// Whether the frame that begins here asks for a larger window than QEMU's decoder grants. QEMU's
/// decodes piece by piece and has to keep a window; ours decodes in one piece and keeps none, so it
/// would not notice.
bool window_too_large(std::span<const std::byte> frame) noexcept {
  if (frame.size() < magic_size + 2 || little_endian_32(frame) != ZSTD_MAGICNUMBER)
    return false;
  const auto descriptor = std::to_integer<unsigned>(frame[magic_size]);
  const bool single_segment = (descriptor & 0x20U) != 0;
  if (single_segment)
    return false; // its window is its content, which has to fit into a cluster
  const auto window = std::to_integer<unsigned>(frame[magic_size + 1]);
  const std::uint64_t base = std::uint64_t{1} << (10U + (window >> 3U));
  return base + base / 8 * (window & 7U) > largest_window;
}

} // namespace

class Decompressor::Inflate {
public:
  Inflate() {
    if (inflateInit2(&stream_, raw_deflate_window) != Z_OK)
      throw std::bad_alloc();
  }
  Inflate(const Inflate&) = delete;
  Inflate& operator=(const Inflate&) = delete;
  ~Inflate() { inflateEnd(&stream_); }

  Decoding decode(std::span<const std::byte> bytes, std::span<std::byte> output) {
    inflateReset(&stream_);
    // zlib does not write to what `next_in` points to; its interface is older than const.
    stream_.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(bytes.data())); // NOLINT
    stream_.avail_in = static_cast<uInt>(bytes.size());
    stream_.next_out = reinterpret_cast<Bytef*>(output.data());
    stream_.avail_out = static_cast<uInt>(output.size());
    switch (inflate(&stream_, Z_FINISH)) {
    case Z_STREAM_END:
      if (stream_.avail_out > 0)
        return {Result::too_little, 0, "the stream ends before a whole cluster"};
      return {Result::whole, bytes.size() - stream_.avail_in, ""};
    case Z_OK:
    case Z_BUF_ERROR:
      if (stream_.avail_out == 0)
        return {Result::no_end, 0, "no stream end after a whole cluster"};
      return {Result::too_short, 0, "too short: the data ends before the stream"};
    case Z_MEM_ERROR:
      throw std::bad_alloc();
    default:
      return {Result::damaged, 0, stream_.msg != nullptr ? stream_.msg : "no deflate stream"};
    }
  }

private:
  z_stream stream_{};
};

class Decompressor::Zstd {
public:
  Zstd() : context_(ZSTD_createDCtx()) {
    if (context_ == nullptr)
      throw std::bad_alloc();
  }
  Zstd(const Zstd&) = delete;
  Zstd& operator=(const Zstd&) = delete;
  ~Zstd() { ZSTD_freeDCtx(context_); }

  /// QEMU goes on with the next frame until the cluster is whole.
  Decoding decode(std::span<const std::byte> bytes, std::span<std::byte> output) {
    std::span<const std::byte> rest = bytes;
    std::span<std::byte> room = output;
    while (!room.empty()) {
      if (rest.empty())
        return {Result::too_little, 0, "the stream ends before a whole cluster"};
      const std::size_t frame = ZSTD_findFrameCompressedSize(rest.data(), rest.size());
      if (ZSTD_isError(frame) != 0)
        return refusal(frame);
      if (window_too_large(rest))
        return {Result::damaged, 0, "the frame asks for too large a window"};
      const std::size_t made =
          ZSTD_decompressDCtx(context_, room.data(), room.size(), rest.data(), frame);
      if (ZSTD_isError(made) != 0)
        return refusal(made);
      room = room.subspan(made);
      rest = rest.subspan(frame);
    }
    return {Result::whole, bytes.size() - rest.size(), ""};
  }

private:
  static Decoding refusal(std::size_t code) {
    switch (ZSTD_getErrorCode(code)) {
    case ZSTD_error_memory_allocation:
      throw std::bad_alloc();
    case ZSTD_error_srcSize_wrong:
      return {Result::too_short, 0, "too short: the data ends before the frame"};
    case ZSTD_error_dstSize_tooSmall:
      return {Result::no_end, 0, "the frame holds more than a cluster"};
    default:
      return {Result::damaged, 0, ZSTD_getErrorName(code)};
    }
  }

  ZSTD_DCtx* context_;
};

Decompressor::Decompressor() = default;
Decompressor::Decompressor(Decompressor&& other) noexcept = default;
Decompressor::~Decompressor() = default;

Decoding Decompressor::decode(Compression compression, std::span<const std::byte> bytes,
                              std::uint32_t cluster_size) {
  if (bytes.empty())
    return {Result::too_short, 0, "no data"};
  if (output_size_ != cluster_size) {
    output_ = std::make_unique<std::byte[]>(cluster_size);
    output_size_ = cluster_size;
  }
  const std::span output(output_.get(), output_size_);
  if (compression == Compression::zstd) {
    if (!zstd_)
      zstd_ = std::make_unique<Zstd>();
    return zstd_->decode(bytes, output);
  }
  if (!inflate_)
    inflate_ = std::make_unique<Inflate>();
  return inflate_->decode(bytes, output);
}

bool Decompressor::may_begin(Compression compression, std::span<const std::byte> bytes) noexcept {
  if (bytes.empty())
    return false;
  if (compression == Compression::deflate) {
    // Bits 1 and 2 of the first byte are the kind of the first block; there is none with both set.
    return (std::to_integer<unsigned>(bytes[0]) & 6U) != 6U;
  }
  if (bytes.size() < magic_size)
    return false;
  const std::uint32_t magic = little_endian_32(bytes);
  return magic == ZSTD_MAGICNUMBER || (magic & skippable_mask) == skippable_magic;
}

} // namespace qcowcache::qcow2
