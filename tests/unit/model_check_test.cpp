// Random sequences of everything that can happen, on connections, exports and caches over storage
// in memory, compared with a plain array of bytes.
//
//   QCOWCACHE_MODEL_SEED=N       the first seed (1)
//   QCOWCACHE_MODEL_SEQUENCES=N  how many sequences, each with the next seed
//   QCOWCACHE_MODEL_REPLAY=FILE  instead: the sequence in FILE, as a failure prints it

#include "catch.hpp"
#include "model_generator.hpp"
#include "model_run.hpp"
#include "model_sequence.hpp"
#include "model_shrink.hpp"
#include "sanitized.hpp"
#include "watchdog.hpp"

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>

namespace {

// Under a sanitizer each takes many times as long.
constexpr std::uint64_t usual_sequences = thread_sanitized ? 10 : sanitized ? 100 : 1000;

std::uint64_t number_from(const char* variable, std::uint64_t usual) {
  const char* text = std::getenv(variable);
  return text != nullptr ? std::stoull(text) : usual;
}

/// What is told of a sequence that fails.
std::string story_of(const ModelSequence& failing, Watchdog& watchdog) {
  const ModelSequence shortest = shrink(failing, [&](const ModelSequence& candidate) {
    watchdog.watch([&] { return "hangs:\n" + to_text(candidate); });
    return run(candidate).failure.has_value();
  });
  const std::optional<ModelFailure> failure = run(shortest).failure;
  std::string story =
      "the shortest sequence that fails, for QCOWCACHE_MODEL_REPLAY:\n" + to_text(shortest);
  if (failure) {
    story +=
        "fails " +
        (failure->step < shortest.steps.size() ? "at: " + to_text(shortest.steps[failure->step])
                                               : std::string("at the end")) +
        "\n" + failure->what;
  }
  return story;
}

} // namespace

TEST_CASE("random sequences of requests do what they do to an array of bytes", "[model]") {
  Watchdog watchdog("model check");
  if (const char* file = std::getenv("QCOWCACHE_MODEL_REPLAY")) {
    std::ostringstream text;
    text << std::ifstream(file).rdbuf();
    const ModelSequence sequence = sequence_from_text(text.str());
    if (const auto failure = run(sequence).failure)
      FAIL(failure->what << "\n" << story_of(sequence, watchdog));
    return;
  }
  const std::uint64_t first = number_from("QCOWCACHE_MODEL_SEED", 1);
  const std::uint64_t count = number_from("QCOWCACHE_MODEL_SEQUENCES", usual_sequences);
  for (std::uint64_t seed = first; seed - first < count; ++seed) {
    const ModelSequence sequence = random_sequence(seed);
    watchdog.watch([&] { return "QCOWCACHE_MODEL_SEED=" + std::to_string(seed) + " hangs"; });
    if (const auto failure = run(sequence).failure)
      FAIL("QCOWCACHE_MODEL_SEED=" << seed << ": " << failure->what << "\n"
                                   << story_of(sequence, watchdog));
  }
}

TEST_CASE("the model check sees that storage lost a write, and says how to see it", "[model]") {
  constexpr unsigned sequences = sanitized ? 4 : 20;
  unsigned caught = 0;
  std::size_t longest = 0;
  for (std::uint64_t seed = 1; seed <= sequences; ++seed) {
    ModelSequence sequence = random_sequence(seed);
    sequence.setup.loses_write = 2;
    if (run(sequence).failure) {
      ++caught;
      const ModelSequence shortest = shrink(sequence, [](const ModelSequence& candidate) {
        return run(candidate).failure.has_value();
      });
      longest = std::max(longest, shortest.steps.size());
      const auto failure = run(sequence_from_text(to_text(shortest))).failure;
      REQUIRE(failure);
      CHECK(failure->what == run(shortest).failure->what);
    }
  }
  CHECK(caught >= sequences / 2);
  CHECK(longest <= 12);
}

TEST_CASE("a sequence is what its text says", "[model]") {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    const std::string text = to_text(random_sequence(seed));
    CHECK(to_text(sequence_from_text(text)) == text);
    CHECK(to_text(random_sequence(seed)) == text);
  }
  CHECK_THROWS_AS(sequence_from_text("wriet"), std::invalid_argument);
  CHECK_THROWS_AS(sequence_from_text("write ofset=1"), std::invalid_argument);
  CHECK_THROWS_AS(sequence_from_text("write offset=1x"), std::invalid_argument);
}
