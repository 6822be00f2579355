#pragma once

#include "util/byte_ranges.hpp"

#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <vector>

/// Ways to write ranges and bytes so that a test reads well and a failure shows both sides.
namespace as_text {

/// "0-10 20-30"; "" for an empty set.
inline std::string ranges(const qcowcache::ByteRanges& set) {
  std::string text;
  for (const qcowcache::ByteRange& range : set) {
    if (!text.empty())
      text += ' ';
    text += std::to_string(range.begin) + "-" + std::to_string(range.end);
  }
  return text;
}

/// Bytes as the characters that they are, zeros as '0'.
inline std::string bytes(std::span<const std::byte> data) {
  std::string text;
  for (const std::byte byte : data)
    text += byte == std::byte{0} ? '0' : std::to_integer<char>(byte);
  return text;
}

inline std::vector<std::byte> parse(std::string_view text) {
  std::vector<std::byte> data;
  for (const char character : text)
    data.push_back(static_cast<std::byte>(character));
  return data;
}

} // namespace as_text
