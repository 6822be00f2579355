#pragma once

#include "util/byte_ranges.hpp"

#include <cstddef>
#include <cstdint>
#include <list>
#include <optional>
#include <span>
#include <vector>

/// Whether both are the same bytes: at the speed of memcmp.
[[nodiscard]] bool same(std::span<const std::byte> a, std::span<const std::byte> b) noexcept;

/// The first byte of `range` that is not in a part of which `holds` is true; nothing if there is
/// none. Of which parts it is asked is up to this: of few where it is true of large ones.
template <typename Holds>
[[nodiscard]] std::optional<std::uint64_t> first_without(const qcowcache::ByteRange& range,
                                                         Holds holds) {
  if (range.empty() || holds(range))
    return std::nullopt;
  if (range.size() == 1)
    return range.begin;
  const std::uint64_t middle = range.begin + range.size() / 2;
  const auto found = first_without(qcowcache::ByteRange{range.begin, middle}, holds);
  return found ? found : first_without(qcowcache::ByteRange{middle, range.end}, holds);
}

/// What each byte of an export may be, as far as the clients were told. Mostly that is one value;
/// after a request that failed it is what was there, or what was to be there, until somebody reads
/// it. Not thread safe.
class ModelBytes {
public:
  explicit ModelBytes(std::vector<std::byte> initial) : bytes_(std::move(initial)) {}

  [[nodiscard]] std::uint64_t size() const noexcept { return bytes_.size(); }
  /// What is cut off is forgotten, what is added reads as zeros.
  void resize(std::uint64_t size);

  /// The bytes are `data`, and nothing else.
  void is(std::uint64_t offset, std::span<const std::byte> data);
  /// The bytes are what they were, or `data`, each for itself.
  void may_be(std::uint64_t offset, std::span<const std::byte> data);
  /// They are not, after all. REQUIRES: nothing else was told since `may_be`.
  void withdraw() { alternatives_.pop_back(); }
  /// Somebody read `data`: each byte is that from now on. REQUIRES: all of it is allowed.
  void seen(std::uint64_t offset, std::span<const std::byte> data);

  /// `data` is all what the bytes were, or all what they may be since one and the same request.
  [[nodiscard]] bool allows(std::uint64_t offset, std::span<const std::byte> data) const noexcept;
  /// The offset of the first byte of `data` that is not allowed.
  [[nodiscard]] std::optional<std::uint64_t> first_wrong(std::uint64_t offset,
                                                         std::span<const std::byte> data) const;
  /// Each byte of `range` can only be what `at` says.
  [[nodiscard]] bool certain(const qcowcache::ByteRange& range) const noexcept;
  /// The likeliest value.
  [[nodiscard]] std::byte at(std::uint64_t offset) const noexcept { return bytes_[offset]; }

private:
  struct Alternative {
    std::uint64_t offset = 0;
    std::vector<std::byte> data;
    /// For which bytes it is still possible.
    qcowcache::ByteRanges open;
  };

  void close(const qcowcache::ByteRange& range);

  std::vector<std::byte> bytes_;
  std::list<Alternative> alternatives_;
};
