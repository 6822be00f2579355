#pragma once

#include "image_bytes.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

/// A qcow2 image of clusters of 64 KiB with one L2 table, whose first entry is a compressed cluster
/// that is nothing but zeros.
inline std::vector<std::byte> damaged_image() {
  constexpr std::size_t cluster = 65536;
  std::vector<std::byte> image(4 * cluster);
  const std::vector<std::byte> header = qcow2_header(16);
  std::ranges::copy(header, image.begin());
  const auto put = [&](std::size_t at, std::uint64_t value, unsigned width) {
    for (unsigned i = 0; i < width; ++i)
      image[at + i] = static_cast<std::byte>(value >> (width - 1 - i) * 8 & 0xffU);
  };
  put(24, 512 * cluster, 8);
  put(36, 1, 4);
  put(40, cluster, 8);
  put(cluster, 2 * cluster, 8);
  put(2 * cluster, std::uint64_t{1} << 62U | 3 * cluster, 8);
  return image;
}
