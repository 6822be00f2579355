#include "model_shrink.hpp"

#include <algorithm>
#include <vector>

namespace {

using StillFails = std::function<bool(const ModelSequence&)>;

/// Leaves out pieces of `size` steps; returns whether any could be.
bool leave_out(ModelSequence& failing, std::size_t size, const StillFails& fails) {
  bool shorter = false;
  // From the end, for what comes after the failure goes first.
  for (std::size_t end = failing.steps.size(); end > 0;) {
    const std::size_t begin = end - std::min(end, size);
    ModelSequence candidate = failing;
    candidate.steps.erase(candidate.steps.begin() + static_cast<std::ptrdiff_t>(begin),
                          candidate.steps.begin() + static_cast<std::ptrdiff_t>(end));
    if (fails(candidate)) {
      failing = std::move(candidate);
      shorter = true;
    }
    end = begin;
  }
  return shorter;
}

/// Ways to make a step simpler, the boldest first.
std::vector<ModelStep> simpler(const ModelStep& step) {
  std::vector<ModelStep> candidates;
  const auto try_with = [&](auto change) {
    ModelStep candidate = step;
    change(candidate);
    if (to_text(candidate) != to_text(step))
      candidates.push_back(candidate);
  };
  try_with([](ModelStep& s) {
    s.fails = Fails::nothing;
    s.nth = 1;
    s.error = 0;
    s.done = Done::none;
    s.once = false;
  });
  try_with([](ModelStep& s) { s.done = Done::none; });
  try_with([](ModelStep& s) { s.fua = false; });
  try_with([](ModelStep& s) { s.may_trim = false; });
  try_with([](ModelStep& s) { s.fast = false; });
  try_with([](ModelStep& s) { s.length = std::min<std::uint64_t>(s.length, 1); });
  try_with([](ModelStep& s) { s.length = s.length > 1 ? s.length / 2 : s.length; });
  try_with([](ModelStep& s) { s.length = s.length > 1 ? s.length - 1 : s.length; });
  for (const std::uint64_t grid : {65536U, 4096U, 512U})
    try_with([grid](ModelStep& s) { s.offset = s.offset / grid * grid; });
  return candidates;
}

bool simplify(ModelSequence& failing, const StillFails& fails) {
  bool simplified = false;
  for (std::size_t i = 0; i < failing.steps.size(); ++i) {
    for (const ModelStep& step : simpler(failing.steps[i])) {
      ModelSequence candidate = failing;
      candidate.steps[i] = step;
      if (fails(candidate)) {
        failing = std::move(candidate);
        simplified = true;
        break;
      }
    }
  }
  return simplified;
}

} // namespace

ModelSequence shrink(ModelSequence failing, const StillFails& fails) {
  constexpr int most_rounds = 40;
  for (int round = 0; round < most_rounds; ++round) {
    std::size_t size = std::max<std::size_t>(1, failing.steps.size() / 2);
    while (size > 1) {
      leave_out(failing, size, fails);
      size /= 2;
    }
    const bool shorter = leave_out(failing, 1, fails);
    if (!simplify(failing, fails) && !shorter)
      break;
  }
  return failing;
}
