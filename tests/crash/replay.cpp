// crash-replay JOURNAL INITIAL SEED IMAGE COMMAND MOST
//
// Cuts the power at each point of a journal that journal_filter.cpp has written above and beneath
// the filter under test, over storage that held what is in the file INITIAL. Reports the first byte
// that breaks a promise.
//
// Each time that a client's flush is acknowledged, and just before storage flushes, an image that
// a power cut may leave then is put into the file IMAGE and the shell runs COMMAND, which must
// succeed; about MOST times, evenly spread. At the end IMAGE is what is durable.

#include "crash_replay.hpp"
#include "journal_file.hpp"

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr unsigned subsets = 64;

std::vector<std::byte> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  std::vector<std::byte> bytes(static_cast<std::size_t>(file.tellg()));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  if (!file)
    throw std::runtime_error(path + ": cannot be read");
  return bytes;
}

/// Lets a command judge images.
class Judge {
public:
  Judge(std::string path, std::string command)
      : path_(std::move(path)), command_(std::move(command)) {}

  void keep(const std::vector<std::byte>& image) const {
    std::ofstream file(path_, std::ios::binary | std::ios::trunc);
    file.write(reinterpret_cast<const char*>(image.data()),
               static_cast<std::streamsize>(image.size()));
    file.close();
    if (!file)
      throw std::runtime_error(path_ + ": cannot be written");
  }

  void check(const std::vector<std::byte>& image, const std::string& state) {
    keep(image);
    ++checked_;
    if (std::system(command_.c_str()) != 0)
      throw std::runtime_error("an image is not sound: " + state);
  }

  [[nodiscard]] unsigned checked() const noexcept { return checked_; }

private:
  const std::string path_;
  const std::string command_;
  unsigned checked_ = 0;
};

void throw_if(const std::optional<std::string>& wrong) {
  if (wrong)
    throw std::runtime_error(*wrong);
}

bool none(std::size_t /*pending*/, std::uint64_t /*sector*/) {
  return false;
}

bool all(std::size_t /*pending*/, std::uint64_t /*sector*/) {
  return true;
}

void replay(const Journal& journal, const std::vector<std::byte>& initial, std::uint64_t seed,
            Judge& judge, std::size_t most) {
  const auto is_flush = [&](const Journal::Entry& entry) {
    return journal.change(entry).kind == Change::Kind::flush;
  };
  // Three images for each of storage's flushes and the client's that it answers.
  const auto flushes =
      static_cast<std::size_t>(std::ranges::count_if(journal.entries(), is_flush) / 4);
  const std::size_t step = std::max<std::size_t>(1, 3 * flushes / most);
  std::mt19937_64 random(seed);
  CrashReplay replay(journal, initial);
  std::size_t acknowledged = 0;
  std::size_t flushed = 0;
  while (replay.advance()) {
    const Journal::Entry& entry = replay.entry();
    const bool begins = entry.moment == Journal::Moment::begin;
    const bool of_storage = entry.side == Journal::Side::storage;
    const std::string name = "#" + std::to_string(entry.change);
    if (of_storage && begins && is_flush(entry)) {
      throw_if(replay.examine_torn(random, subsets));
      if (flushed++ % step == 0) {
        judge.check(replay.disk().image(all), "just before storage's flush " + name);
        judge.check(replay.disk().image(torn_by_chance(replay.disk().pending().size(), random)),
                    "just before storage's flush " + name + ", torn");
      }
    } else if (of_storage && begins) {
      throw_if(replay.examine_newest());
    } else if (!of_storage && !begins && is_flush(entry)) {
      throw_if(replay.examine(random, subsets));
      if (acknowledged++ % step == 0)
        judge.check(replay.disk().image(none), "when flush " + name + " is acknowledged");
    } else if (!of_storage && !begins && journal.change(entry).fua) {
      throw_if(replay.examine(random, subsets));
    }
  }
  judge.keep(replay.disk().image(none));
  std::cout << journal.entries().size() << " entries, " << acknowledged << " flushes acknowledged, "
            << replay.states() << " states looked at, " << judge.checked() << " images checked\n";
}

} // namespace

int main(int argc, char* argv[]) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (arguments.size() != 6) {
    std::cerr << "usage: crash-replay JOURNAL INITIAL SEED IMAGE COMMAND MOST\n";
    return 2;
  }
  try {
    Journal journal;
    read_journal(arguments[0], journal);
    Judge judge(arguments[3], arguments[4]);
    replay(journal, read_file(arguments[1]), std::stoull(arguments[2]), judge,
           std::stoull(arguments[5]));
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "crash-replay: " << error.what() << "\n";
    return 1;
  }
}
