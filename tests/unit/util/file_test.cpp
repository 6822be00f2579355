#include "util/file.hpp"

#include "catch.hpp"
#include "scratch_directory.hpp"

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <system_error>

using qcowcache::create_file;
using qcowcache::File;
using qcowcache::file_fault;

TEST_CASE("a new file replaces what an earlier process left, and no file of others", "[file]") {
  const ScratchDirectory scratch;
  std::ofstream(scratch.file("theirs")) << "precious";
  std::filesystem::create_symlink(scratch.file("theirs"), scratch.file("new"));
  {
    const File file = create_file(scratch.file("new"));
    CHECK(std::fputs("mine", file.get()) >= 0);
  }
  CHECK(scratch.content("new") == "mine");
  CHECK(scratch.content("theirs") == "precious");
  CHECK_THROWS_AS(create_file(scratch.file("gone/new")), std::system_error);
}

TEST_CASE("where no file can be put is known before", "[file]") {
  const ScratchDirectory scratch;
  CHECK(file_fault(scratch.file("new")).empty());
  std::ofstream(scratch.file("old")) << "old";
  CHECK(file_fault(scratch.file("old")).empty());
  CHECK(file_fault("") == "the absolute path of a file");
  CHECK(file_fault("relative") == "the absolute path of a file");
  CHECK(file_fault(scratch.file("")) == "the absolute path of a file");
  CHECK(file_fault(scratch.file("gone/s")) ==
        "in a directory that can be written to (No such file or directory)");
  CHECK(file_fault(scratch.file("old/s")) ==
        "in a directory that can be written to (Not a directory)");
  CHECK(file_fault("/dev/null").substr(0, 14) == "a regular file");
  std::filesystem::create_directory(scratch.file("directory"));
  CHECK(file_fault(scratch.file("directory")).substr(0, 14) == "a regular file");
}
