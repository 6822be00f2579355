#pragma once

#include "journal.hpp"
#include "promised_bytes.hpp"
#include "volatile_disk.hpp"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <random>
#include <string>
#include <vector>

/// Cuts the power at each point of a journal, and holds what the disk may then have against what
/// clients have been promised. Not thread safe.
class CrashReplay {
public:
  /// The journal outlives this. `initial`: what was on the disk, safely, before it began.
  CrashReplay(const Journal& journal, const std::vector<std::byte>& initial)
      : journal_(journal), disk_(initial), promised_(initial) {}

  /// Goes on behind the next entry of the journal; returns whether there was one. Throws
  /// std::logic_error when storage, or a client, had two changes in the same bytes at once.
  bool advance();
  /// The entry that `advance` went behind.
  [[nodiscard]] const Journal::Entry& entry() const { return journal_.entries()[position_ - 1]; }

  /// Looks at what may be left after a power cut at this point. Of the changes that the disk has
  /// not flushed there survive: none; all; all but one, for each; one alone, for each; and
  /// `subsets` times some that `random` chooses, whole or torn, that is some sectors of them.
  ///
  /// Each byte is judged by itself, so if what each single change leaves is right, then so is
  /// every mixture. The mixtures are there to check that argument, and this program.
  ///
  /// Returns what is wrong, with the history of the first wrong byte, or nothing.
  std::optional<std::string> examine(std::mt19937_64& random, unsigned subsets);
  /// Only the mixtures.
  std::optional<std::string> examine_torn(std::mt19937_64& random, unsigned subsets);
  /// Only what the change that has just begun leaves, alone; enough where everything else was
  /// looked at before.
  std::optional<std::string> examine_newest();

  /// How many images have been looked at.
  [[nodiscard]] std::uint64_t states() const noexcept { return states_; }
  [[nodiscard]] VolatileDisk& disk() noexcept { return disk_; }

private:
  using Survives = std::function<bool(std::size_t pending, std::uint64_t sector)>;
  std::optional<std::string> examine_state(const std::string& name,
                                           const qcowcache::ByteRanges& where,
                                           const Survives& survives);

  const Journal& journal_;
  VolatileDisk disk_;
  PromisedBytes promised_;
  std::size_t position_ = 0;
  std::uint64_t states_ = 0;
};

/// Chooses by chance which of `pending` changes survive: about a third whole, and of as many some
/// sectors. The result answers for each sector of each change, given by its number among them.
std::function<bool(std::size_t pending, std::uint64_t sector)>
torn_by_chance(std::size_t pending, std::mt19937_64& random);
