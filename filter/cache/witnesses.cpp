#include "cache/witnesses.hpp"

#include "util/all_zeros.hpp"

#include <algorithm>
#include <functional>
#include <string_view>

namespace qcowcache {

std::size_t Witnesses::checksum(std::span<const std::byte> block) noexcept {
  // Any byte type may be looked at as characters.
  const std::string_view characters(reinterpret_cast<const char*>(block.data()), block.size());
  return std::hash<std::string_view>()(characters);
}

void Witnesses::remember(const Witness& witness) noexcept {
  if (all_.size() == most) {
    // The header stays: every image has one, and what was written last is seldom there.
    const auto oldest = std::prev(all_.end());
    all_.erase(oldest->block.begin == 0 ? std::prev(oldest) : oldest);
  }
  all_.insert(all_.begin(), witness);
}

void Witnesses::wrote(const ByteRange& range, std::span<const std::byte> data,
                      Clock::time_point begun) noexcept {
  changed(range);
  const auto block = data.first(std::min<std::size_t>(data.size(), largest_block));
  if (block.size() >= smallest_block && !all_zeros(block))
    remember({{range.begin, range.begin + block.size()}, checksum(block), begun});
}

void Witnesses::read(const ByteRange& range, std::span<const std::byte> data) noexcept {
  changed(range);
  const std::span<const std::byte> block =
      data.first(std::min<std::size_t>(data.size(), largest_block));
  if (!block.empty())
    remember({{range.begin, range.begin + block.size()}, checksum(block), std::nullopt});
}

void Witnesses::changed(const ByteRange& range) noexcept {
  all_.erase(std::remove_if(all_.begin(), all_.end(),
                            [&](const Witness& each) { return each.block.overlaps(range); }),
             all_.end());
}

} // namespace qcowcache
