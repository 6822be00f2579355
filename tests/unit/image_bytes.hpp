#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

/// `size` bytes that differ with `seed` and, nearly always, from their neighbours; never all zeros.
inline std::vector<std::byte> pattern(std::size_t size, unsigned seed) {
  std::vector<std::byte> bytes(size);
  std::uint32_t state = seed * 2654435761U + 12345U;
  for (std::byte& byte : bytes) {
    state = state * 1664525U + 1013904223U;
    byte = static_cast<std::byte>((state >> 24U) | 1U);
  }
  return bytes;
}

/// A qcow2 header, version 3, of an image with clusters of 1 << `cluster_bits` bytes.
inline std::vector<std::byte> qcow2_header(unsigned cluster_bits) {
  std::vector<std::byte> header(112);
  const auto put = [&](std::size_t offset, std::uint32_t value) {
    for (std::size_t i = 0; i < 4; ++i)
      header[offset + i] = static_cast<std::byte>(value >> (24U - 8U * i));
  };
  put(0, 0x514649fb);
  put(4, 3);
  put(20, cluster_bits);
  put(96, 4);
  put(100, 112);
  return header;
}
