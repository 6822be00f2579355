// Whatever request storage fails, and however: no acknowledged byte is lost, no acknowledged flush
// is a lie, and the error that a client gets is storage's own.

#include "catch.hpp"
#include "model_run.hpp"
#include "model_sequence.hpp"
#include "sanitized.hpp"

#include <cerrno>
#include <tuple>
#include <utility>

namespace {

// Under a sanitizer each run takes many times as long, so it looks at every fiftieth request only.
constexpr unsigned step = sanitized ? 50 : 1;
/// Sanitizers look at the paths that errors take: a third of all combinations has each of them.
constexpr unsigned one_in = thread_sanitized ? 40 : sanitized ? 3 : 1;

/// An image is created, filled, changed, and filled on by others.
constexpr const char* story = R"(
setup connections=3 size=328457
connect
zero length=512
header length=112 value=16
write offset=112 length=3984
flush
write offset=4096 length=3000 value=1
write offset=7096 length=65536 value=2
write offset=85536 length=5000 value=3
write offset=68536 length=10000 value=4
write offset=197385 length=131072 value=5 fua=1
write offset=88536 length=4000 value=6 fua=1
flush
write offset=92537 length=100 value=7
write offset=131077 length=50 value=8
zero offset=67536 length=20000
write offset=105536 length=3000 value=9
zero offset=106536 length=1000 fast=1
trim offset=89536 length=3050
trim offset=131072 length=65536
write offset=131772 length=196608 value=10
extents offset=65536 length=131072
cache offset=65536 length=131072

size length=459986
connect connection=1
read connection=1 length=459986
write connection=1 offset=328447 length=65536 value=11
disconnect
flush connection=1
header connection=1 length=112 value=17
write connection=1 offset=262145 length=2000 value=12
flush connection=1
write connection=1 offset=131072 length=131072 value=13
write connection=1 offset=393219 length=1000 value=14
disconnect connection=1

connect connection=2
read connection=2 length=459986
write connection=2 offset=394219 length=1000 value=15
flush connection=2
write connection=2 offset=65536 length=700 value=16
heals
disconnect connection=2
)";

/// The story with each change read back, and background writers at work.
ModelSequence with_reads(const ModelSequence& told) {
  ModelSequence sequence{told.setup, {}};
  for (const ModelStep& does : told.steps) {
    sequence.steps.push_back(does);
    if (does.kind != StepKind::write && does.kind != StepKind::zero && does.kind != StepKind::trim)
      continue;
    ModelStep reads = does;
    reads.kind = StepKind::read;
    sequence.steps.push_back(reads);
    ModelStep turn = does;
    turn.kind = StepKind::turn;
    turn.length = 2;
    sequence.steps.push_back(turn);
  }
  return sequence;
}

/// Lets each request that `fault` is about fail in turn; returns about how many there are.
unsigned try_each(ModelSequence sequence, const ModelStep& fault) {
  sequence.steps.insert(sequence.steps.begin(), fault);
  for (unsigned nth = 1;; nth += step) {
    sequence.steps.front().nth = nth;
    const ModelResult result = run(sequence);
    if (result.failure || result.lost > 0 || (fault.once && result.failed > 1))
      FAIL((result.failure ? result.failure->what
                           : std::to_string(result.failed) + " requests failed, " +
                                 std::to_string(result.lost) + " bytes were reported lost")
           << "\n"
           << to_text(sequence));
    if (result.refused == 0)
      return nth - 1;
    REQUIRE(nth < 1000);
  }
}

} // namespace

TEST_CASE("whichever request of storage fails, nothing is lost and no flush lies",
          "[every_call_fails]") {
  ModelSequence sequence = with_reads(sequence_from_text(story));
  ModelStep fault;
  fault.kind = StepKind::breaks;
  std::tie(sequence.setup.background, fault.error) = GENERATE(table<bool, std::uint64_t>(
      {{false, EIO}, {false, ENOSPC}, {false, EPERM}, {true, EIO}, {true, ENOSPC}}));
  fault.once = GENERATE(true, false);
  fault.done = GENERATE(Done::none, Done::all);
  const bool plenty = GENERATE(true, false);
  static unsigned combinations = 0;
  if (combinations++ % one_in != 0)
    return;
  if (!plenty) {
    if (!sequence.setup.background) // nobody would give back what requests wait for
      sequence.setup.memory = std::uint64_t{4} * (65536 + 8192);
    sequence.setup.retries = true;
    sequence.setup.can_extents = false;
    sequence.setup.fua = ModelFua::none;
  } else if (!fault.once) { // more requests, and as many more runs
    sequence.setup.reserve = 262144;
  }
  for (fault.fails = Fails::read; fault.fails <= Fails::cache;
       fault.fails = static_cast<Fails>(static_cast<int>(fault.fails) + 1)) {
    const unsigned requests = try_each(sequence, fault);
    CHECK((requests > 0 || (fault.fails == Fails::extents && !sequence.setup.can_extents)));
  }
}
