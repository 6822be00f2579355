#pragma once

#include "util/byte_ranges.hpp"

#include <cstdint>
#include <string>
#include <system_error>

namespace qcowcache {

/// Bytes that are acknowledged to clients and that storage does not have.
struct Unsaved {
  std::uint64_t bytes = 0;
  ByteRanges ranges;
  /// Storage's own answer to the last attempt, if there was one.
  std::error_code error;
};

/// The line that tells an operator of bytes that were acknowledged and that storage never took: how
/// many, and where (first and last offset of each range, in bytes). However much is lost and
/// whatever a client called the export, it stays one line of at most some hundred printable
/// characters.
[[nodiscard]] std::string loss_message(const std::string& export_name, const Unsaved& lost);

} // namespace qcowcache
