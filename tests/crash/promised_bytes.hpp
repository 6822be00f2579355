#pragma once

#include "journal.hpp"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

/// Which values each byte of an export may have after a power cut, by what its clients have asked
/// for and been told.
///
/// A byte has the value that it had when the last flush that was acknowledged began (a value
/// acknowledged with FUA counts as flushed by itself), or one that a later request gave it. What is
/// acknowledged before that flush began and replaced before then is gone for good. A trim leaves
/// the choice between the value before it and zero. Not thread safe.
class PromisedBytes {
public:
  explicit PromisedBytes(std::vector<std::byte> initial)
      : settled_(std::move(initial)), newest_(settled_) {}

  /// A client's request has arrived, or has been acknowledged. `change` outlives this. Throws
  /// std::logic_error when it begins while another in the same bytes is not acknowledged: clients
  /// who do that are owed nothing in particular.
  void begin(std::size_t number, const Change& change);
  void end(std::size_t number, const Change& change);

  [[nodiscard]] qcowcache::ByteRange everything() const noexcept { return {0, settled_.size()}; }
  /// The first byte of `range` that may not be as it is in `image`, which is the whole disk.
  [[nodiscard]] std::optional<std::uint64_t> first_wrong(const std::vector<std::byte>& image,
                                                         const qcowcache::ByteRange& range) const;

private:
  /// A value that bytes may have beside the settled one.
  struct Version {
    const Change* change;
    std::size_t number;
    /// Where it may still be.
    qcowcache::ByteRanges open;
    bool acknowledged = false;
  };
  struct Flush {
    std::size_t number;
    /// What had been acknowledged when it began.
    std::vector<std::size_t> covers;
  };
  void settle(std::size_t number);
  [[nodiscard]] std::optional<std::uint64_t>
  first_wrong_in_chunk(const std::vector<std::byte>& image,
                       const qcowcache::ByteRange& chunk) const;

  std::vector<std::byte> settled_;
  /// What the last request made of each byte: where it differs, one of `versions_` says the same.
  std::vector<std::byte> newest_;
  /// In the order in which they began.
  std::vector<Version> versions_;
  std::vector<Flush> flushes_;
};
