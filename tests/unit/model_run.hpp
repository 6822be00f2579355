#pragma once

#include "model_sequence.hpp"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

/// The first promise that was found broken.
struct ModelFailure {
  /// The number of the step, from 0; as many as there are steps: what was compared at the end.
  std::size_t step;
  std::string what;
};

/// What came of a sequence.
struct ModelResult {
  std::optional<ModelFailure> failure;
  /// How many calls storage refused, and how many requests failed.
  std::uint64_t refused = 0;
  std::uint64_t failed = 0;
  /// Bytes that were reported lost.
  std::uint64_t lost = 0;
};

/// Does what the sequence says to exports, connections and caches over storage in memory, and
/// compares with a plain array of bytes: what clients read, what storage has when they were told
/// so, each call that storage gets, and the memory that is used. Everything happens in the order of
/// the sequence; the same sequence does the same each time. Steps that make no sense (a request on
/// a connection that is not there) are left out.
ModelResult run(const ModelSequence& sequence);
