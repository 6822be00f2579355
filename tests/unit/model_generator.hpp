#pragma once

#include "model_sequence.hpp"

#include <cstdint>
#include <functional>

/// What the choices come from that make a sequence.
struct ModelChoices {
  /// A number less than the limit, which is at least 1.
  std::function<std::uint64_t(std::uint64_t limit)> below;
  /// There is nothing more to choose from: the sequence ends.
  std::function<bool()> ended = [] { return false; };
  /// Bytes. Narrow ones take long to compare.
  std::uint64_t least_stripe = 1;
};

ModelSequence random_sequence(ModelChoices choices);
/// A random sequence: the same one for the same seed, on every machine.
ModelSequence random_sequence(std::uint64_t seed);
