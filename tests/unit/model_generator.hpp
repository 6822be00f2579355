#pragma once

#include "model_sequence.hpp"

#include <cstdint>

/// A random sequence: the same one for the same seed, on every machine.
ModelSequence random_sequence(std::uint64_t seed);
