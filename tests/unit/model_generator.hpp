#pragma once

#include "model_sequence.hpp"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

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
/// So many steps after connections were made to an export like `setup`. No calls are to fail.
std::vector<ModelStep> random_steps(const ModelSetup& setup, std::uint64_t seed, std::size_t count);
/// A random sequence: the same one for the same seed, on every machine.
ModelSequence random_sequence(std::uint64_t seed);
