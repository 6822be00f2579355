#include "size_file.hpp"

#include "catch.hpp"

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <unistd.h>

using qcowcache::SizeFile;

namespace {

/// A file of the test's own, gone when it ends.
class ScratchFile {
public:
  ScratchFile()
      : path_(std::filesystem::temp_directory_path() /
              ("qcowcache-size." + std::to_string(getpid()))) {}
  ScratchFile(const ScratchFile&) = delete;
  ScratchFile& operator=(const ScratchFile&) = delete;
  ~ScratchFile() { std::filesystem::remove(path_); }

  void hold(const std::string& text) const { std::ofstream(path_) << text; }
  [[nodiscard]] std::string path() const { return path_.string(); }

private:
  std::filesystem::path path_;
};

/// What the file says once it is time to look again.
std::optional<std::uint64_t> next_look(SizeFile& file) {
  const auto deadline = std::chrono::steady_clock::now() + SizeFile::least_interval;
  std::optional<std::uint64_t> size = file.changed();
  while (!size && std::chrono::steady_clock::now() < deadline)
    size = file.changed();
  return size ? size : file.changed();
}

} // namespace

TEST_CASE("a size is told once, and again when it changes", "[size_file]") {
  const ScratchFile scratch;
  unsigned complaints = 0;
  SizeFile file(scratch.path(), [&](const std::string&) { ++complaints; });
  scratch.hold("64M\n");
  CHECK(file.changed() == std::uint64_t{64} * 1024 * 1024);
  CHECK_FALSE(file.changed()); // too early to look again
  CHECK_FALSE(next_look(file));
  scratch.hold("0");
  CHECK(next_look(file) == std::uint64_t{0});
  CHECK(complaints == 0);
}

TEST_CASE("a file that holds no size is complained of once, until it does again", "[size_file]") {
  const ScratchFile scratch;
  std::string complaint;
  unsigned complaints = 0;
  SizeFile file(scratch.path(), [&](const std::string& line) {
    complaint = line;
    ++complaints;
  });
  CHECK_FALSE(next_look(file)); // it is not there
  for (const char* nonsense : {"", "junk", "64M and more", "-1"}) {
    scratch.hold(nonsense);
    CHECK_FALSE(next_look(file));
  }
  CHECK(complaints == 1);
  CHECK(complaint.find("qcowcache-size-file=" + scratch.path()) != std::string::npos);
  scratch.hold("1M");
  CHECK(next_look(file) == std::uint64_t{1024} * 1024);
  scratch.hold("junk");
  CHECK_FALSE(next_look(file));
  CHECK(complaints == 2);
}
