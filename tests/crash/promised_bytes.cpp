#include "promised_bytes.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

using qcowcache::ByteRange;
using qcowcache::ByteRanges;

void PromisedBytes::begin(std::size_t number, const Change& change) {
  if (change.kind == Change::Kind::flush) {
    Flush flush{number, {}};
    for (const Version& version : versions_) {
      if (version.acknowledged)
        flush.covers.push_back(version.number);
    }
    flushes_.push_back(std::move(flush));
    return;
  }
  for (const Version& version : versions_) {
    if (!version.acknowledged && version.change->range.overlaps(change.range))
      throw std::logic_error("clients' requests #" + std::to_string(version.number) + " and #" +
                             std::to_string(number) + " were in the same bytes at once");
  }
  versions_.push_back({&change, number, ByteRanges(change.range), false});
  change.apply(change.range, newest_);
}

void PromisedBytes::end(std::size_t number, const Change& change) {
  if (change.kind == Change::Kind::flush) {
    const auto flush = std::ranges::find(flushes_, number, &Flush::number);
    for (const std::size_t covered : flush->covers)
      settle(covered);
    flushes_.erase(flush);
    return;
  }
  std::ranges::find(versions_, number, &Version::number)->acknowledged = true;
  if (change.fua)
    settle(number);
}

void PromisedBytes::settle(std::size_t number) {
  const auto found = std::ranges::find(versions_, number, &Version::number);
  // Another flush may have been quicker; and a trim replaces nothing.
  if (found == versions_.end() || found->change->kind == Change::Kind::trim)
    return;
  for (const ByteRange& range : found->open)
    found->change->apply(range, settled_);
  for (auto older = versions_.begin(); older != found; ++older)
    older->open.remove(found->change->range);
  versions_.erase(found);
  std::erase_if(versions_, [](const Version& version) {
    return version.acknowledged && version.open.empty();
  });
}

std::optional<std::uint64_t> PromisedBytes::first_wrong(const std::vector<std::byte>& image,
                                                        const ByteRange& range) const {
  constexpr std::uint64_t chunk_size = 512;
  const auto equal = [&](const std::vector<std::byte>& allowed, const ByteRange& chunk) {
    const auto begin = static_cast<std::ptrdiff_t>(chunk.begin);
    return std::equal(image.begin() + begin, image.begin() + static_cast<std::ptrdiff_t>(chunk.end),
                      allowed.begin() + begin);
  };
  for (ByteRange rest = range; !rest.empty();) {
    const ByteRange chunk{rest.begin, std::min(rest.end, rest.begin + chunk_size)};
    if (!equal(newest_, chunk) && !equal(settled_, chunk)) {
      if (const std::optional<std::uint64_t> wrong = first_wrong_in_chunk(image, chunk))
        return wrong;
    }
    rest.begin = chunk.end;
  }
  return std::nullopt;
}

std::optional<std::uint64_t>
PromisedBytes::first_wrong_in_chunk(const std::vector<std::byte>& image,
                                    const ByteRange& chunk) const {
  std::vector<const Version*> near;
  for (const Version& version : versions_) {
    if (version.open.overlaps(chunk))
      near.push_back(&version);
  }
  for (std::uint64_t offset = chunk.begin; offset < chunk.end; ++offset) {
    const auto is_the_value_of = [&](const Version* version) {
      return version->open.contains({offset, offset + 1}) &&
             version->change->byte_at(offset) == image[offset];
    };
    if (image[offset] != settled_[offset] && std::ranges::none_of(near, is_the_value_of))
      return offset;
  }
  return std::nullopt;
}
