#pragma once

#include "verify/qcow2/header.hpp"

#include <zlib.h>
#include <zstd.h>

#include <cstddef>
#include <random>
#include <span>
#include <stdexcept>
#include <vector>

/// `size` bytes that shrink to about a half.
inline std::vector<std::byte> compressible(std::size_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::byte> bytes(size);
  for (std::byte& byte : bytes)
    byte = static_cast<std::byte>(random() % 16 + (random() % 8 == 0 ? random() % 240 : 0));
  return bytes;
}

/// A raw deflate stream as QEMU writes it, or with another window.
inline std::vector<std::byte> deflated(std::span<const std::byte> bytes, int window = -12) {
  z_stream stream{};
  if (deflateInit2(&stream, Z_DEFAULT_COMPRESSION, Z_DEFLATED, window, 9, Z_DEFAULT_STRATEGY) !=
      Z_OK)
    throw std::runtime_error("deflateInit2");
  std::vector<std::byte> result(deflateBound(&stream, bytes.size()) + 64);
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(bytes.data()));
  stream.avail_in = static_cast<uInt>(bytes.size());
  stream.next_out = reinterpret_cast<Bytef*>(result.data());
  stream.avail_out = static_cast<uInt>(result.size());
  const int outcome = deflate(&stream, Z_FINISH);
  result.resize(stream.total_out);
  deflateEnd(&stream);
  if (outcome != Z_STREAM_END)
    throw std::runtime_error("deflate");
  return result;
}

/// One zstd frame.
inline std::vector<std::byte> zstd_frame(std::span<const std::byte> bytes) {
  std::vector<std::byte> result(ZSTD_compressBound(bytes.size()));
  const std::size_t size =
      ZSTD_compress(result.data(), result.size(), bytes.data(), bytes.size(), 3);
  if (ZSTD_isError(size) != 0)
    throw std::runtime_error("ZSTD_compress");
  result.resize(size);
  return result;
}

/// What QEMU would store for a cluster of these bytes.
inline std::vector<std::byte> compressed(qcowcache::qcow2::Compression compression,
                                         std::span<const std::byte> bytes) {
  return compression == qcowcache::qcow2::Compression::zstd ? zstd_frame(bytes) : deflated(bytes);
}
