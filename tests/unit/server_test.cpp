#include "server.hpp"

#include "catch.hpp"
#include "compressed_bytes.hpp"
#include "image_bytes.hpp"
#include "memory_storage.hpp"
#include "scratch_directory.hpp"

#include <algorithm>
#include <fstream>
#include <initializer_list>
#include <mutex>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

using namespace qcowcache;
using Kind = MemoryStorage::Kind;

namespace {

constexpr std::uint64_t unit = WriteCache::least_unit_size;
constexpr std::uint64_t disk_size = 16 * unit;

/// A program that has a server, and remembers what it was told.
class Program {
public:
  using Settings = std::initializer_list<std::pair<std::string, std::string>>;

  explicit Program(Settings settings, bool parallel = true)
      : server_(parsed(settings), host(parallel)) {
    server_.open_files();
    server_.start();
  }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;
  ~Program() { end(); }

  [[nodiscard]] Server& server() noexcept { return server_; }
  Connection& connect(const std::shared_ptr<MemoryDisk>& disk,
                      std::function<void(const MemoryStorage::Call&)> after = {}) {
    auto storage = std::make_unique<MemoryStorage>(MemoryStorage::everything(disk_size), disk);
    storage->after = std::move(after);
    return connect(std::move(storage));
  }
  Connection& connect(std::unique_ptr<MemoryStorage> storage) {
    Connection& connection = server_.open("an\nexport");
    server_.begin(connection, std::move(storage));
    return connection;
  }
  /// As nbdkit ends a connection.
  void close(Connection& connection) {
    connection.drain();
    server_.close(connection);
  }
  void end() {
    if (!std::exchange(ended_, true))
      server_.stop();
  }
  [[nodiscard]] std::vector<std::string> complaints() const { return copy(complaints_); }
  [[nodiscard]] bool was_told(const std::string& line) const {
    const std::vector<std::string> told = copy(told_);
    return std::ranges::find(told, line) != told.end();
  }

private:
  static Parameters parsed(Settings settings) {
    Parameters parameters;
    for (const auto& [key, value] : settings)
      REQUIRE(parameters.set("qcowcache-" + key, value));
    parameters.check();
    return parameters;
  }
  Host host(bool parallel) {
    Host host;
    host.complain = [this](const std::string& line) { add(complaints_, line); };
    host.events.decision = [this](const std::string& line) { add(told_, line); };
    host.parallel = parallel;
    return host;
  }
  void add(std::vector<std::string>& lines, const std::string& line) {
    const std::lock_guard lock(mutex_);
    lines.push_back(line);
  }
  [[nodiscard]] std::vector<std::string> copy(const std::vector<std::string>& lines) const {
    const std::lock_guard lock(mutex_);
    return lines;
  }

  mutable std::mutex mutex_;
  std::vector<std::string> complaints_;
  std::vector<std::string> told_;
  bool ended_ = false;
  Server server_;
};

std::shared_ptr<MemoryDisk> image() {
  auto disk = std::make_shared<MemoryDisk>(disk_size);
  disk->write(0, qcow2_header(16), true);
  return disk;
}

} // namespace

TEST_CASE("what a client wrote is stored by its flush, and by its end", "[server]") {
  const std::string writers = GENERATE("0", "2");
  Program program({{"writers", writers}});
  const auto disk = image();
  Connection& connection = program.connect(disk);
  connection.write(3 * unit + 17, pattern(700, 1), false);
  connection.flush();
  CHECK(disk->now({3 * unit + 17, 3 * unit + 717}) == pattern(700, 1));
  connection.write(5 * unit + 17, pattern(700, 2), false);
  program.close(connection);
  CHECK(disk->now({5 * unit + 17, 5 * unit + 717}) == pattern(700, 2));
  CHECK(program.complaints().empty());
  CHECK(program.was_told(writers + " background writers"));
}

TEST_CASE("storage that takes one request at a time has no background writers", "[server]") {
  Program program({{"writers", "4"}}, false);
  CHECK(program.was_told("no background writers: storage takes one request at a time"));
  const auto disk = image();
  Connection& connection = program.connect(disk);
  connection.write(3 * unit, pattern(unit, 1), false);
  program.close(connection);
  CHECK(disk->now({3 * unit, 4 * unit}) == pattern(unit, 1));
}

TEST_CASE("the operator is told of bytes that are lost", "[server]") {
  Program program({{"writers", "0"}});
  bool full = false;
  Connection& connection = program.connect(image(), [&](const MemoryStorage::Call& call) {
    if (full && call.kind == Kind::write)
      throw std::system_error(ENOSPC, std::generic_category(), "refused");
  });
  connection.write(3 * unit, pattern(100, 1), false);
  full = true;
  CHECK_THROWS_AS(connection.flush(), std::system_error);
  program.close(connection);
  CHECK(program.complaints().empty()); // somebody may come, and the disk may have room again
  program.end();
  const std::vector<std::string> complaints = program.complaints();
  REQUIRE(complaints.size() == 1);
  CHECK(complaints[0].starts_with("qcowcache: export \"an\\x0aexport\": lost 100 bytes"));
}

TEST_CASE("the operator is told of storage that returns other bytes", "[server]") {
  Program program({{"readback", "true"}, {"writers", "0"}});
  const auto disk = image();
  Connection& connection = program.connect(disk, [&](const MemoryStorage::Call& call) {
    if (call.kind == Kind::write)
      disk->write(call.range.begin + 5, pattern(1, 9), false);
  });
  CHECK_THROWS_AS(connection.write(3 * unit, std::vector<std::byte>(4096), true),
                  std::system_error);
  const std::vector<std::string> complaints = program.complaints();
  REQUIRE_FALSE(complaints.empty());
  CHECK(complaints[0] == "qcowcache: export \"an\\x0aexport\": storage returned other bytes than "
                         "were written at 196608-200703, from 196613 on");
}

TEST_CASE("storage that failed to tell its block sizes is used, and the operator told once",
          "[server]") {
  Program program({{"writers", "0"}});
  Capabilities unknown = MemoryStorage::everything(disk_size);
  unknown.block_sizes_failed = true;
  const auto disk = image();
  program.connect(disk);
  CHECK(program.complaints().empty());
  for (unsigned i = 1; i <= 2; ++i) {
    Connection& connection = program.connect(std::make_unique<MemoryStorage>(unknown, disk));
    connection.write(i * unit + 17, pattern(700, i), false);
    program.close(connection);
    CHECK(disk->now({i * unit + 17, i * unit + 717}) == pattern(700, i));
  }
  const std::vector<std::string> complaints = program.complaints();
  REQUIRE(complaints.size() == 1);
  CHECK(complaints[0].starts_with(
      R"(qcowcache: export "an\x0aexport": storage failed to tell its block sizes)"));
  CHECK(complaints[0].find("--filter=blocksize-policy") != std::string::npos);
}

TEST_CASE("the operator is told once of units that are smaller than storage prefers", "[server]") {
  Program program({{"writers", "0"}, {"size", "1M"}});
  Capabilities large = MemoryStorage::everything(disk_size);
  large.preferred = 1024 * 1024;
  for (int i = 0; i < 2; ++i) {
    Connection& connection = program.connect(std::make_unique<MemoryStorage>(large, image()));
    connection.write(unit + 17, pattern(700, 1), false);
    program.close(connection);
  }
  const std::vector<std::string> complaints = program.complaints();
  REQUIRE(complaints.size() == 1);
  CHECK(complaints[0].find("qcowcache-size, now 1048576, is too small") != std::string::npos);
  CHECK(complaints[0].find("131072 bytes") != std::string::npos);
}

TEST_CASE("a new size counts with the next request", "[server]") {
  const ScratchDirectory scratch;
  std::ofstream(scratch.file("size")) << "1M";
  Program program({{"size-file", scratch.file("size")}});
  CHECK(program.was_told("memory for cached data is now 1048576 bytes"));
}

TEST_CASE("a server whose file cannot be had does not begin", "[server]") {
  const ScratchDirectory scratch;
  const std::string file = scratch.file("unclean");
  Program first({{"unclean", file}});
  CHECK_THROWS_AS(Program({{"unclean", file}}), std::system_error);
}

TEST_CASE("the report is written when the server ends", "[server]") {
  const ScratchDirectory scratch;
  Program program({{"stats", scratch.file("report")}});
  Connection& connection = program.connect(image());
  connection.write(3 * unit, pattern(100, 1), false);
  program.close(connection);
  program.end();
  CHECK(scratch.content("report").find("export \"an\\x0aexport\"") != std::string::npos);
}
