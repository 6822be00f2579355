#pragma once

#include <concepts>
#include <cstddef>
#include <span>

namespace qcowcache::qcow2 {

/// The number that starts at byte `offset`. REQUIRES: all of it lies within `bytes`.
template <std::unsigned_integral Integer>
[[nodiscard]] Integer big_endian(std::span<const std::byte> bytes, std::size_t offset) noexcept {
  Integer value = 0;
  for (const std::byte byte : bytes.subspan(offset, sizeof(Integer)))
    value = static_cast<Integer>(value << 8U) | std::to_integer<Integer>(byte);
  return value;
}

} // namespace qcowcache::qcow2
