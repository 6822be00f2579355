#pragma once

#include "model_sequence.hpp"

#include <cstddef>
#include <optional>
#include <string>

/// The first promise that was found broken.
struct ModelFailure {
  /// The number of the step, from 0; as many as there are steps: what was compared at the end.
  std::size_t step;
  std::string what;
};

/// Does what the sequence says to exports, connections and caches over storage in memory, and
/// compares with a plain array of bytes: what clients read, what storage has when they were told
/// so, each call that storage gets, and the memory that is used. Everything happens in the order of
/// the sequence; the same sequence does the same each time. Steps that make no sense (a request on
/// a connection that is not there) are left out.
std::optional<ModelFailure> run(const ModelSequence& sequence);
