#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

namespace fuzz {

/// Turns the bytes of an input into decisions. What is behind the end reads as zeros.
class Input {
public:
  explicit Input(std::span<const std::byte> bytes) noexcept : rest_(bytes) {}

  [[nodiscard]] bool empty() const noexcept { return rest_.empty(); }

  /// The next `width` bytes as a big-endian number; at most 8.
  std::uint64_t number(std::size_t width) noexcept {
    std::uint64_t value = 0;
    for (std::size_t i = 0; i < width; ++i) {
      const std::byte next = rest_.empty() ? std::byte{0} : rest_.front();
      rest_ = rest_.subspan(std::min<std::size_t>(1, rest_.size()));
      value = value << 8U | std::to_integer<std::uint64_t>(next);
    }
    return value;
  }

  /// One of `choices`, by the next byte.
  template <typename T, std::size_t count>
  T one_of(const T (&choices)[count]) noexcept {
    return choices[number(1) % count];
  }

  bool yes() noexcept { return number(1) % 2 != 0; }

private:
  std::span<const std::byte> rest_;
};

} // namespace fuzz
