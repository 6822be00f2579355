#pragma once

#include "byte_ranges.hpp"

#include <cstddef>
#include <cstdint>
#include <list>
#include <optional>
#include <span>
#include <vector>

/// Whether both are the same bytes: at the speed of memcmp.
[[nodiscard]] bool same(std::span<const std::byte> a, std::span<const std::byte> b) noexcept;

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
  /// Somebody read `data`: each byte is that from now on. REQUIRES: all of it is allowed.
  void seen(std::uint64_t offset, std::span<const std::byte> data);

  [[nodiscard]] bool allows(std::uint64_t offset, std::byte value) const noexcept;
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
