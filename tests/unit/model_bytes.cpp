#include "model_bytes.hpp"

#include "util/copy_bytes.hpp"

#include <algorithm>
#include <cstring>

using qcowcache::ByteRange;

// Loops over single bytes are slow under sanitizers, and std::ranges::equal has one for std::byte.
bool same(std::span<const std::byte> a, std::span<const std::byte> b) noexcept {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size()) == 0);
}

void ModelBytes::close(const ByteRange& range) {
  for (Alternative& alternative : alternatives_)
    alternative.open.remove(range);
  std::erase_if(alternatives_,
                [](const Alternative& alternative) { return alternative.open.empty(); });
}

void ModelBytes::resize(std::uint64_t size) {
  close({size, UINT64_MAX});
  bytes_.resize(size);
}

void ModelBytes::is(std::uint64_t offset, std::span<const std::byte> data) {
  qcowcache::copy_bytes(data, bytes_.begin() + static_cast<std::ptrdiff_t>(offset));
  close({offset, offset + data.size()});
}

void ModelBytes::may_be(std::uint64_t offset, std::span<const std::byte> data) {
  if (data.empty())
    return;
  Alternative& alternative = alternatives_.emplace_back();
  alternative.offset = offset;
  alternative.data.assign(data.begin(), data.end());
  alternative.open.add({offset, offset + data.size()});
}

bool ModelBytes::certain(const ByteRange& range) const noexcept {
  return std::ranges::none_of(alternatives_, [&](const Alternative& alternative) {
    return alternative.open.overlaps(range);
  });
}

void ModelBytes::seen(std::uint64_t offset, std::span<const std::byte> data) {
  if (!certain({offset, offset + data.size()}))
    is(offset, data);
}

bool ModelBytes::allows(std::uint64_t offset, std::span<const std::byte> data) const noexcept {
  return same(std::span(bytes_).subspan(offset, data.size()), data) ||
         std::ranges::any_of(alternatives_, [&](const Alternative& alternative) {
           return alternative.open.contains({offset, offset + data.size()}) &&
                  same(
                      std::span(alternative.data).subspan(offset - alternative.offset, data.size()),
                      data);
         });
}

std::optional<std::uint64_t> ModelBytes::first_wrong(std::uint64_t offset,
                                                     std::span<const std::byte> data) const {
  return first_without({offset, offset + data.size()}, [&](const ByteRange& part) {
    return allows(part.begin, data.subspan(part.begin - offset, part.size()));
  });
}
