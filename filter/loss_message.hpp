#pragma once

#include "write_cache.hpp"

#include <string>

namespace qcowcache {

/// The line that tells an operator of bytes that were acknowledged and that storage never took: how
/// many, and where (first and last offset of each range, in bytes). However much is lost and
/// whatever a client called the export, it stays one line of at most some hundred printable
/// characters.
[[nodiscard]] std::string loss_message(const std::string& export_name, const Unsaved& lost);

} // namespace qcowcache
