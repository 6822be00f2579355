#pragma once

#include "model_sequence.hpp"

#include <functional>

/// The shortest sequence that can be had from `failing` by leaving out steps and making them
/// simpler such that `fails` still holds: delta debugging. REQUIRES: `fails(failing)`.
/// Source: A. Zeller and R. Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", 2002.
ModelSequence shrink(ModelSequence failing, const std::function<bool(const ModelSequence&)>& fails);
