#pragma once

#include <cstdint>
#include <string>
#include <vector>

/// What several connections to one export name have in common.
enum class Sharing {
  cache,   ///< storage says multi-conn
  disk,    ///< it does not, but they see the same disk
  nothing, ///< each sees a disk of its own
};

/// How storage takes "force unit access", as `qcowcache::Fua`.
enum class ModelFua { none, emulate, native };

/// What storage does when it is told to trim.
enum class Trims { zeros, keeps, garbage };

/// How the memory is set up that a sequence begins with. All sizes are in bytes.
struct ModelSetup {
  Sharing sharing = Sharing::cache;
  std::uint64_t connections = 1;
  /// With a common disk but no common cache each connection writes to stripes of its own, this
  /// wide.
  std::uint64_t stripe = 100;
  std::uint64_t memory = 16777216;
  /// The parameters of these names; `cluster` 0: from the header.
  std::uint64_t cluster = 0;
  std::uint64_t max_write = 1048576;
  std::uint64_t reserve = 0;
  /// Every unit counts as left behind at once; otherwise none does by time.
  bool expire = false;
  /// No more is held than storage writes in a moment.
  bool hurried = false;
  /// What storage refused is tried again at once; otherwise never by itself. Not with `reserve`: a
  /// write would ask for room without end.
  bool retries = false;
  /// Units are queued for background writers, whose part the steps `turn` play.
  bool background = false;

  std::uint64_t size = 1048576;
  std::uint64_t minimum = 1;
  std::uint64_t preferred = 4096;
  std::uint64_t maximum = UINT32_MAX;
  bool can_flush = true;
  bool can_trim = true;
  bool can_zero = true;
  bool can_fast_zero = true;
  bool can_extents = true;
  bool can_cache = true;
  ModelFua fua = ModelFua::native;
  /// Extents begin and end on multiples of this; with `shy` only one is told at a time, and not all
  /// zeros are.
  std::uint64_t grain = 4096;
  bool shy = false;
  Trims trims = Trims::zeros;
  /// The disk is not empty at first.
  bool filled = false;
  /// Cluster bits of the qcow2 header that it begins with; 0: it has none.
  std::uint64_t header = 0;
  /// Storage acknowledges this write (counted from 1) without doing it; 0: none.
  std::uint64_t loses_write = 0;
};

enum class StepKind {
  connect,    ///< `read_only` or not
  disconnect, ///< with all that nbdkit does then
  vanish,     ///< the connection is closed without having been finalized
  write,      ///< `value` tells the bytes
  header,     ///< the bytes of a qcow2 header from `offset` on; `value`: cluster bits, 0: zeros
  read,
  zero,
  trim,
  extents,
  cache,
  flush,
  tick,
  queue,    ///< memory is scarce: the unit that nobody has used for longest is to be written
  turn,     ///< a background writer gets its turn
  budget,   ///< `length` bytes of memory from now on
  size,     ///< the disk is `length` bytes long as soon as nobody is connected, or it grows
  breaks,   ///< calls of kind `fails` fail from now on, from the `nth` or, if `once`, just that
  heals,    ///< nothing does any more
  look,     ///< somebody connects, asks for no data, and leaves
  exchange, ///< who connects from now on sees another disk; where `value`, a disk with content
};

/// How much of a call is carried out. As `MemoryStorage::Verdict::Part`.
enum class Done { none, half, all };

/// Which of storage's calls fails. From `read` on: as `MemoryStorage::Kind`.
enum class Fails { nothing, any, read, write, flush, zero, trim, extents, cache };

/// One thing that happens. Fields that a kind has no use for are ignored.
struct ModelStep {
  StepKind kind = StepKind::flush;
  std::uint64_t connection = 0;
  std::uint64_t offset = 0;
  std::uint64_t length = 0;
  std::uint64_t value = 0;
  bool fua = false;
  bool may_trim = false;
  bool fast = false;
  /// Only the first extent is wanted.
  bool first = false;
  bool read_only = false;
  /// During this step the call of this kind fails, the `nth` of its kind (from 1), with `error`
  /// (errno) after `done` of it was carried out.
  Fails fails = Fails::nothing;
  std::uint64_t nth = 1;
  std::uint64_t error = 0;
  Done done = Done::none;
  bool once = false;
};

struct ModelSequence {
  ModelSetup setup;
  std::vector<ModelStep> steps;
};

/// One line for the setup and one for each step, for people and for `sequence_from_text`.
std::string to_text(const ModelSequence& sequence);
std::string to_text(const ModelStep& step);
/// Throws std::invalid_argument for what `to_text` would not write.
ModelSequence sequence_from_text(const std::string& text);
