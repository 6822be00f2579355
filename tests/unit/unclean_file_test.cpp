#include "unclean_file.hpp"

#include "catch.hpp"
#include "error_of.hpp"
#include "scratch_directory.hpp"

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

using qcowcache::UncleanFile;

namespace {

/// One server's use of the file.
class Record {
public:
  explicit Record(const ScratchDirectory& scratch,
                  std::chrono::milliseconds patience = std::chrono::milliseconds(0))
      : file_(
            scratch.file("unclean"), [this](const std::string& line) { told_.push_back(line); },
            patience) {
    file_.open();
  }

  UncleanFile* operator->() { return &file_; }
  [[nodiscard]] bool refuses(const std::string& name) {
    try {
      file_.refuse_if_lost(name);
    } catch (const UncleanFile::Lost& lost) {
      CHECK(lost.code().value() == EIO);
      return true;
    }
    return false;
  }
  [[nodiscard]] const std::vector<std::string>& told() const { return told_; }

private:
  std::vector<std::string> told_;
  UncleanFile file_;
};

/// Without the blanks that lines are filled up with: "a b ".
std::string names(const ScratchDirectory& scratch) {
  std::istringstream words(scratch.content("unclean"));
  std::string text;
  for (std::string word; words >> word;)
    text += word + " ";
  return text;
}

int error_of_open(const ScratchDirectory& scratch) {
  return error_of([&] { const Record record(scratch); });
}

} // namespace

TEST_CASE("an export is named while somebody holds something", "[unclean_file]") {
  const ScratchDirectory scratch;
  Record record(scratch);
  CHECK(scratch.content("unclean").empty());
  CHECK(record->hold("a"));
  CHECK(names(scratch) == "\"a\" ");
  CHECK(record->hold("a"));
  CHECK(record->hold(""));
  CHECK(names(scratch) == "\"a\" \"\" ");
  record->release("a");
  CHECK(names(scratch) == "\"a\" \"\" ");
  record->release("a");
  CHECK(names(scratch) == "\"\" ");
  const auto size = scratch.content("unclean").size();
  CHECK(record->hold("b"));
  CHECK(scratch.content("unclean").size() == size); // its line takes the place of another
  record->release("");
  record->release("b");
  CHECK(scratch.content("unclean").empty());
  CHECK_FALSE(record.refuses("a"));
  CHECK(scratch.files() == 1);
}

TEST_CASE("what is named when a server starts has lost bytes until an image is begun anew",
          "[unclean_file]") {
  const ScratchDirectory scratch;
  const std::string strange = "two\nlines \"quoted\" \\" + std::string(200, 'x');
  {
    Record record(scratch);
    CHECK(record->hold("a"));
    CHECK(record->hold("b"));
    CHECK(record->hold(strange));
    record->release("b");
  }
  Record record(scratch);
  CHECK(record.refuses("a"));
  CHECK_FALSE(record.refuses("b"));
  CHECK(record.refuses(strange));
  CHECK(record.refuses("a"));
  CHECK(record.told().size() == 2); // each once
  CHECK(record.told().at(0).find("export \"a\"") != std::string::npos);

  // Holding, and having stored what is held, does not bring back what was lost.
  CHECK(record->hold("a"));
  record->release("a");
  CHECK(record.refuses("a"));

  CHECK(record->hold("a"));
  record->begin_anew("a");
  CHECK_FALSE(record.refuses("a"));
  CHECK(names(scratch).find("\"a\"") != std::string::npos); // held, still
  record->release("a");
  CHECK(names(scratch).find("\"a\"") == std::string::npos);
  record->begin_anew(strange);
  CHECK(scratch.content("unclean").empty());
}

TEST_CASE("what will never be stored is lost from then on", "[unclean_file]") {
  const ScratchDirectory scratch;
  Record record(scratch);
  CHECK(record->hold("a"));
  record->lose("a");
  record->release("a");
  CHECK(record.refuses("a"));
  CHECK(names(scratch) == "\"a\" ");
  record->lose("b"); // nobody holds anything there
  CHECK_FALSE(record.refuses("b"));
}

TEST_CASE("an operator removes names, with any editor", "[unclean_file]") {
  const ScratchDirectory scratch;
  {
    Record record(scratch);
    CHECK(record->hold("a"));
    CHECK(record->hold("b"));
  }
  Record record(scratch);
  CHECK(record->hold("c"));
  CHECK(record.refuses("a"));
  SECTION("in a new file") {
    std::ofstream(scratch.file("edited")) << "\"b\"\n";
    std::filesystem::rename(scratch.file("edited"), scratch.file("unclean"));
    CHECK_FALSE(record.refuses("a"));
    CHECK(record.refuses("b"));
  }
  SECTION("in the same") {
    std::ofstream(scratch.file("unclean")) << "  \"b\"";
    CHECK_FALSE(record.refuses("a"));
    CHECK(record.refuses("b"));
  }
  SECTION("the whole file") {
    std::filesystem::remove(scratch.file("unclean"));
    CHECK_FALSE(record.refuses("a"));
    CHECK_FALSE(record.refuses("b"));
  }
  // What is held is there again, and stays.
  CHECK(names(scratch).find("\"c\"") != std::string::npos);
  std::filesystem::remove(scratch.file("unclean"));
  CHECK(record->hold("d"));
  CHECK(names(scratch).find("\"c\" \"d\"") != std::string::npos);
  std::filesystem::remove(scratch.file("unclean"));
  record->release("d");
  CHECK(names(scratch).find("\"d\"") == std::string::npos);
  CHECK(scratch.files() == 1);
}

TEST_CASE("what cannot be written down is not held", "[unclean_file]") {
  const ScratchDirectory scratch;
  Record record(scratch);
  CHECK(record->hold("a"));
  std::filesystem::remove_all(scratch.file(""));
  CHECK_FALSE(record->hold("b"));
  CHECK_FALSE(record->hold("b"));
  CHECK(record.told().size() == 1);
  std::filesystem::create_directory(scratch.file(""));
  CHECK(record->hold("b"));
  CHECK(names(scratch) == "\"a\" \"b\" ");
}

TEST_CASE("a file belongs to one server at a time, and holds names only", "[unclean_file]") {
  const ScratchDirectory scratch;
  {
    Record record(scratch);
    CHECK(error_of_open(scratch) == EBUSY);
    CHECK(record->hold("a"));
    CHECK(error_of_open(scratch) == EBUSY);
    CHECK(names(scratch) == "\"a\" ");
  }
  CHECK(error_of_open(scratch) == 0);
  std::ofstream(scratch.file("unclean")) << "a disk\n";
  CHECK(error_of_open(scratch) == EINVAL);
  CHECK(scratch.content("unclean") == "a disk\n");
  // As a power failure leaves it on some file systems.
  std::ofstream(scratch.file("unclean")) << "\"a\"  \n" << std::string(64, '\0');
  CHECK(error_of_open(scratch) == 0);
  CHECK(names(scratch) == "\"a\" ");
  // And a crash, while a name was written down for which nothing is held yet.
  for (const char* torn : {"\"a\"  \n\"b", "b\"\n\"a\""}) {
    std::ofstream(scratch.file("unclean")) << torn;
    CHECK(error_of_open(scratch) == 0);
    CHECK(names(scratch) == "\"a\" ");
  }
}

TEST_CASE("what somebody has just changed is left to him, and nobody relies on it",
          "[unclean_file]") {
  const ScratchDirectory scratch;
  {
    Record record(scratch);
    CHECK(record->hold("lost"));
  }
  Record record(scratch, std::chrono::hours(1));
  CHECK(record->hold("a"));
  std::filesystem::rename(scratch.file("unclean"), scratch.file("unclean~")); // an editor begins
  record->follow();
  CHECK_FALSE(record->hold("b"));
  CHECK(record.refuses("lost"));
  std::ofstream(scratch.file("unclean")) << "\"lost\"\n";
  CHECK_FALSE(record->hold("b"));
  CHECK(record.refuses("lost"));
  CHECK(names(scratch) == "\"lost\" ");
  CHECK(record.told().size() == 1); // of what is lost
}

TEST_CASE("who removes a name does not know of what is lost meanwhile", "[unclean_file]") {
  const ScratchDirectory scratch;
  Record record(scratch);
  CHECK(record->hold("a"));
  std::ofstream(scratch.file("unclean")) << "";
  record->lose("a");
  record->release("a");
  CHECK(record.refuses("a"));
  CHECK(names(scratch) == "\"a\" ");
  std::ofstream(scratch.file("unclean")) << "";
  CHECK_FALSE(record.refuses("a"));
}

TEST_CASE("names that an editor has dropped are written again, and so is one that came meanwhile",
          "[unclean_file]") {
  const ScratchDirectory scratch;
  Record record(scratch);
  CHECK(record->hold("a"));
  const auto save = [&](const std::string& text) {
    std::ofstream(scratch.file("edited")) << text;
    std::filesystem::rename(scratch.file("edited"), scratch.file("unclean"));
  };
  save("");
  record->follow();
  CHECK(names(scratch) == "\"a\" ");
  // At times that fails, once the new file belongs to this server already.
  const std::string in_the_way = qcowcache::fresh_name(scratch.file("unclean"));
  save("");
  std::filesystem::create_directories(in_the_way + "/so that it stays");
  CHECK_FALSE(record->hold("b"));
  std::filesystem::remove_all(in_the_way);
  CHECK(scratch.files() == 1);
  CHECK(record->hold("b"));
  CHECK(names(scratch) == "\"a\" \"b\" ");
}

TEST_CASE("nobody fills the file with names", "[unclean_file]") {
  const ScratchDirectory scratch;
  Record record(scratch);
  for (unsigned i = 0; i < 1000; ++i)
    REQUIRE(record->hold(std::to_string(i)));
  CHECK_FALSE(record->hold("one more"));
  CHECK(record.told().size() == 1);
  CHECK(record->hold("7"));
  record->release("8");
  CHECK(record->hold("one more"));
}

TEST_CASE("threads hold and release at once", "[unclean_file]") {
  const ScratchDirectory scratch;
  Record record(scratch);
  std::atomic<int> held = 0;
  {
    std::vector<std::jthread> threads;
    for (const char* name : {"a", "b", "a", "c"}) {
      threads.emplace_back([&, name] {
        for (int i = 0; i < 50; ++i) {
          held += record->hold(name) ? 1 : 0;
          record->release(name);
        }
      });
    }
  }
  CHECK(held == 200);
  CHECK(scratch.content("unclean").empty());
}
