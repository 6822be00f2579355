#include "crash_replay.hpp"

using qcowcache::ByteRange;
using qcowcache::ByteRanges;

bool CrashReplay::advance() {
  if (position_ == journal_.entries().size())
    return false;
  const Journal::Entry& next = journal_.entries()[position_++];
  const Change& change = journal_.change(next);
  const bool begins = next.moment == Journal::Moment::begin;
  if (next.side == Journal::Side::client)
    begins ? promised_.begin(next.change, change) : promised_.end(next.change, change);
  else
    begins ? disk_.begin(next.change, change) : disk_.end(next.change, change);
  return true;
}

std::optional<std::string> CrashReplay::examine(std::mt19937_64& random, unsigned subsets) {
  const std::size_t pending = disk_.pending().size();
  const ByteRanges undecided = disk_.undecided();
  // Whatever no pending change is about is the same in all states.
  std::optional<std::string> wrong =
      examine_state("nothing unflushed survives", ByteRanges(promised_.everything()),
                    [](std::size_t, std::uint64_t) { return false; });
  if (!wrong)
    wrong = examine_state("everything survives", undecided,
                          [](std::size_t, std::uint64_t) { return true; });
  for (std::size_t one = 0; one < pending && !wrong; ++one) {
    const std::string name = "#" + std::to_string(disk_.pending()[one].number);
    wrong = examine_state("everything but " + name + " survives", undecided,
                          [one](std::size_t i, std::uint64_t) { return i != one; });
    if (!wrong)
      wrong = examine_state("of what is unflushed only " + name + " survives", undecided,
                            [one](std::size_t i, std::uint64_t) { return i == one; });
  }
  return wrong ? wrong : examine_torn(random, subsets);
}

std::optional<std::string> CrashReplay::examine_torn(std::mt19937_64& random, unsigned subsets) {
  const std::size_t pending = disk_.pending().size();
  const ByteRanges undecided = disk_.undecided();
  std::optional<std::string> wrong;
  for (unsigned i = 0; i < subsets && pending > 0 && !wrong; ++i)
    wrong = examine_state("subset " + std::to_string(i) + " survives, torn", undecided,
                          torn_by_chance(pending, random));
  return wrong;
}

std::optional<std::string> CrashReplay::examine_newest() {
  const std::size_t newest = disk_.pending().size() - 1;
  return examine_state("of what is unflushed only the last survives",
                       ByteRanges(disk_.pending().back().change->range),
                       [newest](std::size_t i, std::uint64_t) { return i == newest; });
}

std::optional<std::string> CrashReplay::examine_state(const std::string& name,
                                                      const ByteRanges& where,
                                                      const Survives& survives) {
  ++states_;
  const std::vector<std::byte>& image = disk_.image(survives);
  for (const ByteRange& range : where) {
    if (const std::optional<std::uint64_t> wrong = promised_.first_wrong(image, range))
      return "power cut behind entry " + std::to_string(position_ - 1) + ", " + name +
             ": the byte at " + std::to_string(*wrong) + " is " +
             std::to_string(std::to_integer<int>(image[*wrong])) +
             ", which nobody may find there\n" + journal_.history(*wrong, position_);
  }
  return std::nullopt;
}

std::function<bool(std::size_t, std::uint64_t)> torn_by_chance(std::size_t pending,
                                                               std::mt19937_64& random) {
  enum class Fate { lost, whole, torn };
  std::vector<Fate> fates;
  fates.reserve(pending);
  for (std::size_t i = 0; i < pending; ++i)
    fates.push_back(static_cast<Fate>(random() % 3));
  return [fates = std::move(fates), &random](std::size_t i, std::uint64_t /*sector*/) {
    return fates[i] == Fate::whole || (fates[i] == Fate::torn && random() % 2 == 0);
  };
}
