#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace qcowcache::qcow2 {

/// Whether a write of `data` at `offset` begins a new image, or makes an end of the one that was
/// there: zeros or anything else than qcow2's magic number; the header of an image that has no L1
/// table yet, and no extensions, which is the first thing that QEMU writes when it creates one; a
/// header together with other than just its cluster, as whoever copies an image writes it.
///
/// What QEMU writes to the header of an image in use is none of these: single fields, or the first
/// cluster (`qcow2_update_header`), which has the feature names in it. Those of version 2 lack
/// them: there the second header of an image that is being created looks like the first. Pure;
/// never fails on any input.
[[nodiscard]] bool begins_image(std::uint64_t offset, std::span<const std::byte> data) noexcept;

} // namespace qcowcache::qcow2
