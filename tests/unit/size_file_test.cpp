#include "size_file.hpp"

#include "catch.hpp"

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <sys/stat.h>
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
  for (const std::string& nonsense :
       {std::string(), std::string("junk"), std::string("64M and more"), std::string("-1"),
        std::string(" \n"), std::string("64M\0", 4), std::string(300, '0'),
        std::string(300, ' ').append("64M"), std::string("9999999999999999999999")}) {
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

TEST_CASE("spaces around a size do not matter", "[size_file]") {
  const ScratchFile scratch;
  SizeFile file(scratch.path(), [](const std::string&) {});
  scratch.hold("\r\n \t2M \n\n");
  CHECK(next_look(file) == std::uint64_t{2} * 1024 * 1024);
}

TEST_CASE("what is no file is neither waited for nor read without end", "[size_file]") {
  const ScratchFile scratch;
  unsigned complaints = 0;
  const auto complain = [&](const std::string&) { ++complaints; };
  for (const std::string& path : {std::string("/dev/zero"), std::string("/"), scratch.path()}) {
    SizeFile file(path, complain);
    if (path == scratch.path())
      REQUIRE(mkfifo(path.c_str(), S_IRUSR | S_IWUSR) == 0);
    CHECK_FALSE(file.changed());
  }
  CHECK(complaints == 3);
}
