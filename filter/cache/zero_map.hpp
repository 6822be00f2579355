#pragma once

#include "util/byte_ranges.hpp"

#include <cstddef>
#include <list>

namespace qcowcache {

/// Which bytes of storage are known to read as zeros.
///
/// Storage is asked through its extents, in large windows, without owning them. Since storage may
/// change while it answers, every change is told to the map (`changed`) by its owner, before the
/// owner gives the range back; what changed while a question was under way is left out of the
/// answer.
///
/// Remembers a bounded number of ranges: what does not fit is forgotten, which costs a read later
/// and nothing else. Not thread safe: guarded by the cache's mutex.
class ZeroMap {
public:
  /// No more ranges than this are remembered.
  static constexpr std::size_t most_ranges = 512;

  /// A question under way; holds the place where changes are collected until `learn`.
  using Question = std::list<ByteRanges>::iterator;

  /// Whether storage was asked about every byte of `range` already.
  [[nodiscard]] bool asked(const ByteRange& range) const noexcept { return asked_.contains(range); }
  /// The parts of `range` that are known to be zeros.
  [[nodiscard]] ByteRanges zeros_in(const ByteRange& range) const { return zeros_.inside(range); }

  /// Begins and ends a question; `answered` is what storage spoke of, `zeros` what it called zeros.
  Question ask() { return questions_.emplace(questions_.end()); }
  void learn(Question question, const ByteRange& answered, const ByteRanges& zeros);
  void withdraw(Question question) noexcept { questions_.erase(question); }

  /// `range` was written, trimmed or may have been: nothing is known of it.
  void changed(const ByteRange& range) noexcept;
  /// Storage has zeroed `range`.
  void zeroed(const ByteRange& range);
  /// Everything that was learned goes.
  void clear() noexcept;

private:
  void keep_small() noexcept;

  ByteRanges asked_;
  ByteRanges zeros_;
  std::list<ByteRanges> questions_;
};

} // namespace qcowcache
