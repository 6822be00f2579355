#pragma once

#include <cstddef>
#include <cstring>
#include <span>

namespace qcowcache {

/// Whether every byte is 0, as it is when there is none. As fast as memcmp: each byte is compared
/// with the one before it.
[[nodiscard]] inline bool all_zeros(std::span<const std::byte> data) noexcept {
  return data.empty() || (data.front() == std::byte{0} &&
                          std::memcmp(data.data(), data.data() + 1, data.size() - 1) == 0);
}

} // namespace qcowcache
