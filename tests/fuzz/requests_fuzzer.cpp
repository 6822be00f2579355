// Requests to exports over storage in memory that may fail at any time, compared with an array of
// bytes: the model check, with an input in place of chance.

#include "targets.hpp"

#include "input.hpp"
#include "model_generator.hpp"
#include "model_run.hpp"

void fuzz::requests(std::span<const std::byte> bytes) {
  Input input(bytes);
  const auto below = [&input](std::uint64_t limit) {
    return input.number(limit <= 256 ? 1 : limit <= 65536 ? 2 : 3) % limit;
  };
  const ModelSequence sequence = random_sequence({below, [&input] { return input.empty(); }, 512});
  if (const auto failure = run(sequence).failure)
    throw Broken(failure->what + "\n" + to_text(sequence));
}
