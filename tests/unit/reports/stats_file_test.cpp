#include "reports/stats_file.hpp"

#include "catch.hpp"
#include "scratch_directory.hpp"

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <unistd.h>

using qcowcache::Snapshot;
using qcowcache::StatsFile;

TEST_CASE("the file's name says in which form statistics are reported", "[stats_file]") {
  const ScratchDirectory scratch;
  for (const char* name : {"s.json", "disk.prom", "s.txt", "s"}) {
    StatsFile file(
        scratch.file(name), [] { return Snapshot(); }, [](const std::string& line) { FAIL(line); });
    file.stop();
  }
  CHECK(scratch.content("s.json").substr(0, 13) == "{\"version\": 2");
  CHECK(scratch.content("disk.prom").substr(0, 7) == "# HELP ");
  CHECK(scratch.content("disk.prom").find("{server=\"disk\"}") != std::string::npos);
  CHECK(scratch.content("s.txt").substr(0, 24) == "nbdkit-qcowcache-filter\n");
  CHECK(scratch.content("s") == scratch.content("s.txt"));
  CHECK(scratch.files() == 4); // nothing is left beside them
}

TEST_CASE("a report is rewritten while it is to be, and once more at the end", "[stats_file]") {
  const ScratchDirectory scratch;
  std::atomic<unsigned> taken = 0;
  StatsFile file(
      scratch.file("s.json"),
      [&] {
        Snapshot snapshot;
        snapshot.memory_limit_bytes = ++taken;
        return snapshot;
      },
      [](const std::string& line) { FAIL(line); });
  file.start(std::chrono::seconds(1));
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (taken < 2 && std::chrono::steady_clock::now() < deadline)
    std::this_thread::yield();
  REQUIRE(taken >= 2);
  file.stop();
  CHECK(scratch.content("s.json").find("\"memory_limit_bytes\": " + std::to_string(taken)) !=
        std::string::npos);
  const unsigned last = taken;
  CHECK(last >= 3);
}

TEST_CASE("a report that cannot be written is complained of, once until one is", "[stats_file]") {
  const ScratchDirectory scratch;
  std::string complaint;
  unsigned complaints = 0;
  const std::string directory = scratch.file("gone");
  StatsFile file(
      directory + "/s", [] { return Snapshot(); },
      [&](const std::string& line) {
        complaint = line;
        ++complaints;
      });
  file.stop();
  file.stop();
  CHECK(complaints == 1);
  CHECK(complaint == "qcowcache-stats=" + directory + "/s: No such file or directory");
  std::filesystem::create_directory(directory);
  file.stop();
  CHECK(complaints == 1);
  CHECK(std::filesystem::file_size(directory + "/s") > 0);
  std::filesystem::remove_all(directory);
  file.stop();
  CHECK(complaints == 2);
}

TEST_CASE("what an earlier process left half written is no hindrance", "[stats_file]") {
  const ScratchDirectory scratch;
  std::ofstream(scratch.file("s." + std::to_string(getpid()) + ".new")) << "half";
  StatsFile file(
      scratch.file("s"), [] { return Snapshot(); }, [](const std::string& line) { FAIL(line); });
  file.stop();
  CHECK(scratch.content("s").substr(0, 6) == "nbdkit");
  CHECK(scratch.files() == 1);
}
