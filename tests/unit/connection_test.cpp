#include "connection.hpp"

#include "cache/cached_image.hpp"
#include "catch.hpp"
#include "compressed_bytes.hpp"
#include "damaged_image.hpp"
#include "error_of.hpp"
#include "gate.hpp"
#include "image_bytes.hpp"
#include "memory_storage.hpp"
#include "scratch_directory.hpp"
#include "serving.hpp"
#include "watched_thread.hpp"

#include <algorithm>
#include <atomic>
#include <latch>
#include <thread>

using namespace qcowcache;
using Kind = MemoryStorage::Kind;

namespace {

constexpr std::uint64_t unit = WriteCache::least_unit_size;

constexpr std::uint64_t disk_size = 40 * unit;

std::shared_ptr<MemoryDisk> image() {
  auto disk = std::make_shared<MemoryDisk>(disk_size);
  disk->write(0, qcow2_header(16), true);
  return disk;
}

Capabilities unshared() {
  Capabilities capabilities = MemoryStorage::everything(disk_size);
  capabilities.can_multi_conn = false;
  return capabilities;
}

void write_in_pieces(Client& client, std::span<const std::byte> data, std::size_t piece) {
  for (std::size_t done = 0; done < data.size(); done += piece)
    client.write(unit + done, data.subspan(done, std::min(piece, data.size() - done)));
}

/// Whether all that the client's storage was asked to write lies in these units.
bool wrote_only(const Client& client, const std::vector<std::uint64_t>& units) {
  return std::ranges::all_of(client.storage().calls(Kind::write), [&](const auto& call) {
    return std::ranges::any_of(units, [&](std::uint64_t number) {
      return ByteRange{number * unit, (number + 1) * unit}.contains(call.range);
    });
  });
}

/// Exports whose compressed clusters are checked.
class Verifying {
  MemoryBudget budget_{64 * unit};

public:
  [[nodiscard]] Exports& exports() noexcept { return exports_; }
  [[nodiscard]] const MemoryBudget& budget() const noexcept { return budget_; }
  /// What the operator was told, line by line.
  std::vector<std::string> told;
  std::atomic<bool> interrupted = false;
  std::shared_ptr<MemoryShare> verify_memory = Verifier::usual_memory();
  std::shared_ptr<DecompressorPool> decompressors = std::make_shared<DecompressorPool>(1);
  /// None of them works unless it is started.
  Writeback writeback;
  Writeback decoders;

private:
  Export::Settings settings() {
    Export::Settings settings;
    settings.report_loss = [](const std::string&, const Unsaved&) {};
    settings.verify = true;
    settings.report_damage = [this](const std::string& name, const std::string& line) {
      told.push_back(name + ": " + line);
    };
    settings.interrupted = [this] { return interrupted.load(); };
    settings.verify_memory = verify_memory;
    settings.writeback = &writeback;
    settings.decoders = &decoders;
    settings.decompressors = decompressors;
    return settings;
  }

  Exports exports_{settings(), budget_};
};

/// One client of such an export.
class VerifiedClient {
public:
  VerifiedClient(Verifying& server, const std::string& name,
                 const std::shared_ptr<MemoryDisk>& disk)
      : VerifiedClient(server, name, disk, MemoryStorage::everything(disk->size())) {}
  VerifiedClient(Verifying& server, const std::string& name,
                 const std::shared_ptr<MemoryDisk>& disk, const Capabilities& capabilities)
      : connection_(server.exports(), name) {
    auto storage = std::make_unique<MemoryStorage>(capabilities, disk);
    storage->before = [this](const MemoryStorage::Call& call) {
      if (refuses_reads && call.kind == Kind::read)
        throw std::system_error(ENOMEDIUM, std::generic_category(), "refused");
    };
    connection_.begin(std::move(storage));
  }
  VerifiedClient(const VerifiedClient&) = delete;
  VerifiedClient& operator=(const VerifiedClient&) = delete;
  ~VerifiedClient() {
    connection_.drain();
    connection_.end();
  }

  void write(std::uint64_t offset, std::span<const std::byte> data) {
    connection_.write(offset, data, false);
  }
  Verifier::Outcome check() { return connection_.in_use(Image::Request{}).check(); }

  bool refuses_reads = false;

private:
  Connection connection_;
};

} // namespace

TEST_CASE("what a connection wrote is on storage when it has ended", "[connection]") {
  const unsigned writers = GENERATE(0U, 1U, 4U);
  Capabilities capabilities = MemoryStorage::everything(disk_size);
  capabilities.can_multi_conn = GENERATE(true, false);
  Serving serving(64 * unit, writers);
  const auto disk = image();
  const auto data = pattern(20 * unit + 123, 1);
  {
    Client client(serving, "a", disk, capabilities);
    client.write(unit + 17, data);
  }
  CHECK(disk->read(unit + 17, data.size()) == data);
  CHECK(serving.budget().used() == 0);
  CHECK(serving.lost == 0);
}

TEST_CASE("connections to multi-conn storage share, others only own ranges in common",
          "[connection]") {
  Serving serving(64 * unit, GENERATE(0U, 4U));
  const auto data = pattern(500, 1);
  SECTION("shared") {
    const auto disk = image();
    Client writer(serving, "a", disk);
    Client reader(serving, "a", disk);
    writer.write(3 * unit + 3, data);
    CHECK(reader.read(3 * unit + 3, 500) == data);
    reader.flush(); // covers the other connection's bytes
    CHECK(disk->read(3 * unit + 3, 500) == data);
  }
  SECTION("a disk each") {
    const auto one = image();
    const auto other = image();
    Client first(serving, "", one, unshared());
    Client second(serving, "", other, unshared());
    first.write(3 * unit + 3, data);
    CHECK(second.read(3 * unit + 3, 500) == std::vector<std::byte>(500));
    second.flush();
    first.flush();
    CHECK(other->read(3 * unit + 3, 500) == std::vector<std::byte>(500));
  }
  SECTION("the same disk without multi-conn, in the same blocks") {
    const auto disk = image();
    Client first(serving, "", disk, unshared());
    Client second(serving, "", disk, unshared());
    for (std::uint64_t i = 0; i < 200; ++i) {
      first.write(3 * unit + i * 20, pattern(10, static_cast<unsigned>(i)));
      second.write(3 * unit + i * 20 + 10, pattern(10, static_cast<unsigned>(i + 1000)));
      if (i % 7 == 0)
        first.flush();
      if (i % 5 == 0)
        second.flush();
    }
    first.flush();
    second.flush();
    for (std::uint64_t i = 0; i < 200; ++i) {
      auto expected = pattern(10, static_cast<unsigned>(i));
      const auto behind = pattern(10, static_cast<unsigned>(i + 1000));
      expected.insert(expected.end(), behind.begin(), behind.end());
      REQUIRE(disk->read(3 * unit + i * 20, 20) == expected);
    }
  }
}

TEST_CASE("a flush that fails when the last connection ends is told to whoever comes next",
          "[connection]") {
  const ScratchDirectory scratch;
  UncleanFile unclean(scratch.file("unclean"), [](const std::string& /*line*/) {});
  unclean.open();
  Serving serving(64 * unit, GENERATE(0U, 4U), WriteCache::Settings().retry, &unclean);
  Capabilities capabilities = MemoryStorage::everything(disk_size);
  const auto disk = image();
  const auto refuses_flushes = MemoryStorage::refusal(Kind::flush, EIO);
  SECTION("nobody else could flush") {
    capabilities.can_multi_conn = GENERATE(true, false);
    {
      Client client(serving, "a", disk, capabilities, refuses_flushes);
      client.write(3 * unit, pattern(500, 1));
    }
    CHECK_THROWS_AS(unclean.refuse_if_lost("a"), UncleanFile::Lost);
    CHECK(scratch.content("unclean").find("\"a\"") == 0);
    CHECK(serving.other_disks == 1);
  }
  SECTION("another, who has written nothing, does") {
    Client reader(serving, "a", disk, capabilities);
    CHECK(reader.read(unit, 1).size() == 1);
    {
      Client client(serving, "a", disk, capabilities, refuses_flushes);
      client.write(3 * unit, pattern(500, 1));
    }
    CHECK(scratch.content("unclean").find("\"a\"") == 0);
    reader.leave();
    CHECK_NOTHROW(unclean.refuse_if_lost("a"));
    CHECK(scratch.content("unclean").empty());
  }
  CHECK(disk->read(3 * unit, 500) == pattern(500, 1));
  CHECK(serving.budget().used() == 0);
}

TEST_CASE("refused bytes wait for the next connection", "[connection]") {
  Serving serving(64 * unit, GENERATE(0U, 4U));
  const auto disk = image();
  const auto data = pattern(500, 1);
  {
    Client client(serving, "a", disk, MemoryStorage::refusal(Kind::write, ENOSPC));
    client.write(unit, data);
  }
  SECTION("that comes") {
    Client next(serving, "a", disk);
    CHECK(next.read(unit, 500) == data);
    next.flush();
    CHECK(disk->read(unit, 500) == data);
    CHECK(serving.lost == 0);
  }
  SECTION("that never comes") {
    serving.exports().report_left();
    CHECK(serving.lost == 500);
  }
}

TEST_CASE("refused bytes that only a larger connection can store wait for one", "[connection]") {
  Serving serving(64 * unit, GENERATE(0U, 2U));
  const auto disk = image();
  const Capabilities large = MemoryStorage::everything(disk_size);
  const Capabilities small = MemoryStorage::everything(20 * unit);
  const auto data = pattern(500, 1);
  {
    Client stays(serving, "a", disk, small);
    CHECK(stays.read(unit, 1) == std::vector<std::byte>(1));
    {
      Client client(serving, "a", disk, large, MemoryStorage::refusal(Kind::write, ENOSPC));
      client.write(30 * unit, data);
    }
    stays.write(unit, data);
    // It cannot promise what the other one was told.
    CHECK(error_of([&] { stays.flush(); }) == EIO);
  }
  CHECK(serving.lost == 0);
  Client next(serving, "a", disk, large);
  CHECK(next.read(30 * unit, 500) == data);
  next.flush();
  CHECK(disk->read(30 * unit, 500) == data);
}

TEST_CASE("refused bytes of a connection with a disk of its own are reported lost",
          "[connection]") {
  Serving serving(64 * unit, GENERATE(0U, 2U));
  {
    Client client(serving, "a", image(), unshared(), MemoryStorage::refusal(Kind::write, EIO));
    client.write(unit, pattern(321, 1));
  }
  CHECK(serving.lost == 321);
  serving.stop_writers();
  CHECK(serving.budget().used() == 0);
}

TEST_CASE("nothing of who writes to a new disk goes through who still reads the old one",
          "[connection]") {
  Serving serving(64 * unit, GENERATE(0U, 2U));
  const auto old_disk = std::make_shared<MemoryDisk>(disk_size);
  const auto new_disk = std::make_shared<MemoryDisk>(disk_size);
  const std::vector<std::byte> empty = old_disk->now();
  Client reader(serving, "a", old_disk);
  CHECK(reader.read(unit, 4096) == std::vector<std::byte>(4096));
  const auto data = pattern(20 * unit, 1);
  {
    Client writer(serving, "a", new_disk);
    writer.write(0, qcow2_header(16));
    std::size_t done = 0;
    const auto write_up_to = [&](std::size_t end) {
      for (; done < end; done += std::min<std::size_t>(9001, end - done))
        writer.write(unit + done,
                     std::span(data).subspan(done, std::min<std::size_t>(9001, end - done)));
    };
    write_up_to(data.size() / 2);
    reader.leave();
    write_up_to(data.size());
    writer.flush();
    CHECK(new_disk->read(unit, data.size()) == data);
  }
  CHECK(reader.storage().calls(Kind::write).empty());
  CHECK(old_disk->now() == empty);
  CHECK(serving.lost == 0);
}

TEST_CASE("who wakes up after its disk was replaced writes to its own, and nobody else's",
          "[connection]") {
  Serving serving(64 * unit, GENERATE(0U, 2U));
  const auto old_disk = image();
  const auto new_disk = std::make_shared<MemoryDisk>(disk_size);
  const bool stored_before = GENERATE(true, false);
  const bool stale_first = GENERATE(true, false);
  Client stale(serving, "a", old_disk);
  stale.write(3 * unit, pattern(5000, 1));
  if (stored_before)
    stale.flush();
  Client writer(serving, "a", new_disk);
  writer.write(0, qcow2_header(16));
  writer.write(3 * unit, pattern(5000, 2));
  stale.write(3 * unit + 4000, pattern(50, 3));
  writer.write(5 * unit, pattern(5000, 4));
  auto of_stale = pattern(5000, 1);
  std::ranges::copy(pattern(50, 3), of_stale.begin() + 4000);
  CHECK(stale.read(3 * unit, 5000) == of_stale);
  CHECK(writer.read(3 * unit, 5000) == pattern(5000, 2));
  for (Client* client : {stale_first ? &stale : &writer, stale_first ? &writer : &stale})
    client->flush();
  stale.leave();
  CHECK(old_disk->read(3 * unit, 5000) == of_stale);
  CHECK(new_disk->read(3 * unit, 5000) == pattern(5000, 2));
  CHECK(old_disk->read(5 * unit, 5000) == std::vector<std::byte>(5000));
  CHECK(new_disk->read(5 * unit, 5000) == pattern(5000, 4));
  CHECK(wrote_only(stale, {3}));
  CHECK(serving.other_disks == 1);
  CHECK(serving.lost == 0);
}

TEST_CASE("what is left of a disk is stored there, and nowhere else", "[connection]") {
  Serving serving(64 * unit, GENERATE(0U, 2U));
  const auto disk = image();
  const auto restored = std::make_shared<MemoryDisk>(disk->now());
  const auto left = pattern(500, 2);
  {
    Client unlucky(serving, "a", disk, [](const MemoryStorage::Call& call) {
      if (call.kind == Kind::write && call.range.begin >= 20 * unit)
        throw std::system_error(ENOSPC, std::generic_category(), "refused");
    });
    unlucky.write(unit, pattern(5000, 1));
    unlucky.flush();
    unlucky.write(20 * unit, left);
  }
  CHECK(serving.lost == 0);
  // The first request of the next connection is a read, a write, or a flush.
  const unsigned request = GENERATE(0U, 1U, 2U);
  const auto begin = [&](Client& next) {
    if (request == 1)
      next.write(30 * unit, pattern(100, 3));
    else if (request == 2)
      next.flush();
  };

  SECTION("kept for the same disk") {
    Client next(serving, "a", disk);
    begin(next);
    CHECK(next.read(20 * unit, 500) == left);
    next.flush();
    CHECK(disk->read(20 * unit, 500) == left);
    CHECK(serving.lost == 0);
  }
  SECTION("lost where there is another") {
    const unsigned which = GENERATE(0U, 1U, 2U);
    const auto other = which == 0 ? std::make_shared<MemoryDisk>(disk_size) : restored;
    if (which == 2) {
      disk->write(0, qcow2_header(16), true);
      other->write(0, qcow2_header(21), true);
      other->write(unit, pattern(5000, 1), true);
    }
    const auto before = other->read(20 * unit, 500);
    Client next(serving, "a", other);
    begin(next);
    CHECK(next.read(20 * unit, 500) == before);
    CHECK(serving.lost == 500);
    next.flush();
    next.leave();
    CHECK(other->read(20 * unit, 500) == before);
    CHECK(wrote_only(next, {30}));
  }
}

TEST_CASE("a connection that ends stores what it wrote, and what others wrote stays in memory",
          "[connection]") {
  Serving serving(64 * unit, 0); // nobody writes in the background
  const auto disk = image();
  Client leaves(serving, "a", disk);
  Client stays(serving, "a", disk);
  leaves.write(3 * unit, pattern(5000, 1));
  stays.write(5 * unit, pattern(5000, 2));
  leaves.write(7 * unit, pattern(5000, 3));
  stays.write(9 * unit, pattern(5000, 4)); // and last: nothing after this makes old units due
  leaves.leave();
  CHECK(disk->read(3 * unit, 5000) == pattern(5000, 1));
  CHECK(disk->read(7 * unit, 5000) == pattern(5000, 3));
  CHECK(disk->read(9 * unit, 5000) == std::vector<std::byte>(5000));
  CHECK(wrote_only(leaves, {3, 7}));
  CHECK(stays.read(9 * unit, 5000) == pattern(5000, 4));
  stays.leave();
  CHECK(disk->read(5 * unit, 5000) == pattern(5000, 2));
  CHECK(disk->read(9 * unit, 5000) == pattern(5000, 4));
  CHECK(wrote_only(stays, {5, 9}));
}

TEST_CASE("a flush stores what others wrote through their own connections", "[connection]") {
  Serving serving(64 * unit, GENERATE(0U, 2U));
  const auto disk = image();
  Client first(serving, "a", disk);
  Client second(serving, "a", disk);
  for (unsigned i = 3; i < 19; ++i)
    (i % 4 == 1 ? second : first).write(i * unit, pattern(5000, i));
  second.flush();
  for (unsigned i = 3; i < 19; ++i)
    CHECK(disk->read(i * unit, 5000) == pattern(5000, i));
  CHECK(wrote_only(second, {5, 9, 13, 17}));
  CHECK(wrote_only(first, {3, 4, 6, 7, 8, 10, 11, 12, 14, 15, 16, 18}));
}

TEST_CASE("an onlooker asks storage for nothing, and keeps nothing", "[connection]") {
  Serving serving(64 * unit, 0);
  const auto disk = image();
  Client stays(serving, "a", disk);
  {
    Client writer(serving, "a", disk);
    writer.write(3 * unit, pattern(5000, 1));
    {
      Client looks(serving, "a", disk);
      looks.leave();
      CHECK(looks.storage().calls().empty());
    }
    CHECK(disk->read(3 * unit, 5000) == std::vector<std::byte>(5000));
    CHECK(writer.storage().calls(Kind::write).empty());
  }
  CHECK(disk->read(3 * unit, 5000) == pattern(5000, 1));
  CHECK(serving.budget().used() == 0);
  disk->write(3 * unit, pattern(5000, 2), true); // while nobody uses it
  Client next(serving, "a", disk);
  CHECK(next.read(3 * unit, 5000) == pattern(5000, 2));
  stays.leave();
  CHECK(stays.storage().calls().empty());
}

TEST_CASE("to recognise a connection costs a few reads, and one unit that is written early",
          "[connection]") {
  Serving serving(64 * unit, 0); // nobody writes in the background
  const auto disk = image();
  Client writer(serving, "a", disk);
  for (unsigned i = 1; i < 15; ++i)
    writer.write(2 * i * unit, pattern(5000, i));
  const std::size_t before = writer.storage().calls(Kind::write).size();
  Client newcomer(serving, "a", disk);
  CHECK(newcomer.read(28 * unit, 5000) == pattern(5000, 14));
  CHECK(newcomer.storage().calls(Kind::read).size() <= Witnesses::most);
  CHECK(newcomer.storage().calls(Kind::write).empty());
  const std::size_t early = writer.storage().calls(Kind::write).size() - before;
  CHECK(early == 1);
  // From now on it is known.
  const std::size_t calls = newcomer.storage().calls().size();
  CHECK(newcomer.read(28 * unit, 5000) == pattern(5000, 14));
  CHECK(newcomer.storage().calls().size() == calls);
}

TEST_CASE("an export that holds all memory and idles does not starve another", "[connection]") {
  Serving serving(8 * (unit + 8192), GENERATE(0U, 4U));
  const auto idle_disk = image();
  Client idle(serving, "idle", idle_disk);
  for (std::uint64_t i = 1; i < 30; ++i)
    idle.write(i * unit + 5, pattern(100, static_cast<unsigned>(i)));
  const auto disk = image();
  Client busy(serving, "busy", disk);
  const auto data = pattern(30 * unit, 7);
  write_in_pieces(busy, data, 3000);
  CHECK(busy.read(unit, data.size()) == data);
  busy.flush();
  idle.flush();
  for (std::uint64_t i = 1; i < 30; ++i)
    CHECK(idle.read(i * unit + 5, 100) == pattern(100, static_cast<unsigned>(i)));
}

TEST_CASE("an export whose storage refuses and that fills all memory does not stop another",
          "[connection]") {
  Serving serving(8 * (unit + 8192), GENERATE(0U, 4U));
  std::atomic<bool> refuses = true;
  const auto full_disk = image();
  Client full(serving, "full", full_disk, [&](const MemoryStorage::Call& call) {
    if (refuses && call.kind == Kind::write)
      throw std::system_error(ENOSPC, std::generic_category(), "refused");
  });
  std::vector<std::uint64_t> taken;
  int error = 0;
  for (std::uint64_t i = 1; i < 30 && error == 0; ++i) {
    error = error_of([&] { full.write(i * unit + 5, pattern(100, static_cast<unsigned>(i))); });
    if (error == 0)
      taken.push_back(i);
  }
  CHECK(error == ENOSPC); // storage's answer, since there is no memory left
  CHECK(taken.size() >= 2);

  const auto disk = image();
  Client other(serving, "other", disk);
  const auto data = pattern(30 * unit, 7);
  write_in_pieces(other, data, 3000);
  other.flush();
  CHECK(disk->read(unit, data.size()) == data);

  refuses = false;
  for (const std::uint64_t i : taken)
    CHECK(full.read(i * unit + 5, 100) == pattern(100, static_cast<unsigned>(i)));
  full.flush();
  for (const std::uint64_t i : taken)
    CHECK(full_disk->read(i * unit + 5, 100) == pattern(100, static_cast<unsigned>(i)));
}

TEST_CASE("storage that hangs does not make reads of cached bytes hang", "[connection]") {
  Serving serving(64 * unit, 2);
  const auto disk = image();
  Gate gate(Kind::write);
  Client client(serving, "a", disk, gate.hook());
  const auto data = pattern(2 * unit, 1);
  client.write(unit, data);
  gate.wait_until_reached();
  CHECK(client.read(unit, data.size()) == data);
  client.write(unit + 100, pattern(50, 2)); // into a unit that is being written
  CHECK(client.read(unit + 100, 50) == pattern(50, 2));
  gate.let_go();
  client.flush();
}

TEST_CASE("storage of one export that hangs does not stop another", "[connection]") {
  Serving serving(6 * (unit + 8192), 2);
  std::latch both_hang(2);
  std::latch go_on(1);
  std::atomic<int> caught = 0;
  Client hanging(serving, "a", image(), [&](const MemoryStorage::Call& call) {
    if (call.kind == Kind::write && caught.fetch_add(1) < 2) {
      both_hang.count_down();
      go_on.wait();
    }
  });
  // Not side by side, so that each of the writers gets caught by one.
  hanging.write(2 * unit, pattern(unit, 1));
  hanging.write(4 * unit, pattern(unit, 2));
  both_hang.wait();
  const auto disk = image();
  Client other(serving, "b", disk);
  const auto data = pattern(20 * unit, 3);
  write_in_pieces(other, data, unit / 2);
  other.flush();
  CHECK(disk->read(unit, data.size()) == data);
  go_on.count_down();
}

TEST_CASE("who has to be recognised first is not overtaken meanwhile", "[connection]") {
  Serving serving(64 * unit, 0);
  const auto disk = image();
  Gate gate(Kind::read);
  Client client(serving, "a", disk);
  client.write(8 * unit, pattern(5000, 1));
  Client early(serving, "a", disk, gate.hook());
  WatchedThread writes_early([&] { early.write(3 * unit + 100, pattern(700, 2)); });
  gate.wait_until_reached(); // it is compared
  WatchedThread also_early([&] { early.write(4 * unit + 100, pattern(700, 3)); });
  CHECK(also_early.waits());
  WatchedThread writes_late([&] {
    client.write(3 * unit + 200, pattern(100, 4));
    client.write(4 * unit + 200, pattern(100, 4));
  });
  CHECK(writes_late.waits());
  client.write(5 * unit, pattern(100, 5)); // nobody else has asked for this
  gate.let_go();
  CHECK(writes_early.ends());
  CHECK(also_early.ends());
  CHECK(writes_late.ends());
  CHECK(client.read(3 * unit + 200, 100) == pattern(100, 4));
  CHECK(client.read(4 * unit + 200, 100) == pattern(100, 4));
}

TEST_CASE("who waits for memory is not overtaken by a connection that shares nothing with it",
          "[connection]") {
  Serving serving(6 * (unit + 8192), 1);
  const auto disk = image();
  Gate gate(Kind::write);
  Client early(serving, "a", disk, unshared(), gate.hook());
  WatchedThread fills([&] {
    for (unsigned i = 10; i < 20; ++i)
      early.write(i * unit, pattern(unit, i));
  });
  gate.wait_until_reached();
  CHECK(fills.waits());
  WatchedThread writes_early([&] { early.write(3 * unit + 100, pattern(700, 2)); });
  CHECK(writes_early.waits());
  Client late(serving, "a", disk, unshared());
  WatchedThread writes_late([&] { late.write(3 * unit + 200, pattern(100, 4)); });
  CHECK(writes_late.waits());
  late.write(5 * unit, pattern(100, 5), true); // nobody else has asked for this
  gate.let_go();
  CHECK(fills.ends());
  CHECK(writes_early.ends());
  CHECK(writes_late.ends());
  early.flush();
  late.flush();
  CHECK(disk->read(3 * unit + 200, 100) == pattern(100, 4));
}

TEST_CASE("partial units that nobody comes back to are written in the background", "[connection]") {
  Serving serving(64 * unit, 2);
  const auto disk = image();
  std::latch written(1);
  Client client(serving, "a", disk, [&](const MemoryStorage::Call& call) {
    if (call.kind == Kind::write)
      written.count_down();
  });
  client.write(unit, pattern(100, 1));
  written.wait(); // no flush, no further write: time alone does it
}

TEST_CASE("a request that is busy with an image that its connection has left is a guest's there",
          "[connection]") {
  Serving serving(64 * unit, GENERATE(0U, 2U));
  const auto old_disk = image();
  const auto new_disk = image(); // it begins alike
  const auto of_old = pattern(500, 1);
  const auto of_new = pattern(500, 2);
  Client stays(serving, "a", old_disk);
  stays.read(0, 512);
  {
    const Connection::InUse busy = stays.connection().in_use({true});
    Client newcomer(serving, "a", new_disk);
    newcomer.write(3 * unit, of_new);
    stays.write(5 * unit, of_old); // it has found out by now that it sees another disk
    REQUIRE(&stays.connection().image()->cache() != &busy.cache);
    busy.cache.write(busy.use.storage(), 7 * unit, of_old, false);
    std::vector<std::byte> read(500);
    busy.cache.read(busy.use.storage(), 3 * unit, read);
    CHECK(read == std::vector<std::byte>(500));
    newcomer.flush();
  }
  stays.flush();
  CHECK(old_disk->read(7 * unit, 500) == of_old);
  CHECK(new_disk->read(7 * unit, 500) == std::vector<std::byte>(500));
}

TEST_CASE("a connection that cannot write does not make clusters good that cannot be read",
          "[connection]") {
  Verifying server;
  const auto disk = std::make_shared<MemoryDisk>(4 * unit);
  Capabilities capabilities = MemoryStorage::everything(4 * unit);
  VerifiedClient(server, "a", disk, capabilities).write(0, damaged_image());
  CHECK(server.told.size() == 1);
  capabilities.can_write = false;
  { const VerifiedClient reader(server, "a", disk, capabilities); }
  capabilities.can_write = true;
  CHECK(VerifiedClient(server, "a", disk, capabilities).check() == Verifier::Outcome::damaged);
  CHECK(VerifiedClient(server, "b", disk, capabilities).check() == Verifier::Outcome::clean);
}

TEST_CASE("when clusters cannot be checked at the end of a connection the operator is told",
          "[connection]") {
  Verifying server;
  const auto disk = std::make_shared<MemoryDisk>(4 * unit);
  disk->write(0, damaged_image(), true);
  disk->write(unit, std::vector<std::byte>(8), true);
  {
    VerifiedClient client(server, "a", disk);
    client.refuses_reads = true;
    const std::vector<std::byte> image = damaged_image();
    client.write(unit, std::span(image).subspan(unit, 8)); // names a table
  }
  REQUIRE(server.told.size() == 1);
  CHECK(server.told.front().starts_with("a: compressed clusters could not be checked: "));
}

TEST_CASE("the verifiers of all exports share one memory", "[connection]") {
  Verifying server;
  std::vector<std::unique_ptr<VerifiedClient>> clients;
  const std::vector<std::byte> entries{std::byte{0}, std::byte{0}, std::byte{0x10}, std::byte{0}};
  std::size_t before = 0;
  for (unsigned i = 0; i < 6; ++i) {
    const auto disk = image();
    disk->write(36, entries, true); // of the L1 table: 48 KiB in memory
    disk->write(46, std::vector{std::byte{1}}, true);
    disk->write(unit + 1, std::vector{std::byte{2}}, true);
    clients.push_back(std::make_unique<VerifiedClient>(server, std::to_string(i), disk));
    clients.back()->write(30 * unit, pattern(100, 1));
    CHECK(server.verify_memory->taken() > before);
    before = server.verify_memory->taken();
    CHECK(before <= server.budget().limit() / 8);
  }
  clients.clear();
  CHECK(server.verify_memory->taken() == 0);
}

TEST_CASE("who writes data does not wait for who decodes", "[connection]") {
  Verifying server;
  server.writeback.start(1);
  server.decoders.start(1);
  const auto hostile_disk = std::make_shared<MemoryDisk>(disk_size);
  hostile_disk->write(0, damaged_image(), true);
  const auto disk = image();
  VerifiedClient hostile(server, "hostile", hostile_disk);
  VerifiedClient healthy(server, "healthy", disk);
  DecompressorPool::Account account;
  auto loan = std::make_unique<DecompressorPool::Loan>(server.decompressors->borrow(account));
  for (unsigned i = 0; i < 10; ++i) {
    const auto stream = deflated(compressible(1000, i));
    hostile.write(10 * unit + i * 2000, stream);
    healthy.write(10 * unit + i * 2000, stream);
  }
  const auto data = pattern(unit, 1);
  healthy.write(20 * unit, data);
  std::vector<std::byte> stored(unit);
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (stored != data && std::chrono::steady_clock::now() < give_up) {
    std::this_thread::yield();
    disk->read(20 * unit, stored);
  }
  CHECK(stored == data);
  WatchedThread stop([&] { server.writeback.stop(); });
  CHECK(stop.ends()); // no writer is caught
  loan.reset();
}

TEST_CASE("a check that nobody waits for ends, and so does the one at the connection's end",
          "[connection]") {
  Verifying server;
  const auto disk = std::make_shared<MemoryDisk>(disk_size);
  auto bytes = damaged_image();
  // Many entries, with a stream each that takes a while.
  for (std::size_t i = 0; i < 8192; ++i) {
    const std::uint64_t entry =
        std::uint64_t{0x40} << 56U | std::uint64_t{0xff} << 54U | (std::uint64_t{4} * 65536 + i);
    for (unsigned byte = 0; byte < 8; ++byte)
      bytes[std::size_t{2} * 65536 + i * 8 + byte] =
          static_cast<std::byte>(entry >> (56 - 8 * byte) & 0xffU);
  }
  {
    VerifiedClient client(server, "", disk);
    client.write(4 * unit, deflated(std::vector<std::byte>(unit)));
    client.write(6 * unit, pattern(unit, 1)); // nothing more is to come
    client.write(0, bytes);
    server.interrupted = true;
    CHECK_THROWS_AS(client.check(), Verifier::Interrupted);
    CHECK(server.told.empty());
    VerifiedClient another(server, "", disk);
    server.interrupted = false;
    another.write(8 * unit, pattern(100, 2));
    server.interrupted = true;
  }
  CHECK(server.told.size() == 1); // for both of them
}

TEST_CASE("of any number of exports with clusters that cannot be read none is forgotten",
          "[connection]") {
  Verifying server;
  constexpr std::size_t names = 80;
  std::vector<std::shared_ptr<MemoryDisk>> disks;
  for (std::size_t i = 0; i < names; ++i) {
    disks.push_back(std::make_shared<MemoryDisk>(4 * unit));
    VerifiedClient(server, std::to_string(i), disks[i]).write(0, damaged_image());
  }
  // One line each, and one when there were more than are remembered by name.
  REQUIRE(server.told.size() == names + 1);
  CHECK(server.told[64 + 1].starts_with("64: too many exports"));
  for (std::size_t i = 0; i < names; ++i)
    CHECK(VerifiedClient(server, std::to_string(i), disks[i]).check() ==
          Verifier::Outcome::damaged);
  const auto sound = std::make_shared<MemoryDisk>(4 * unit);
  sound->write(0, qcow2_header(16), true);
  CHECK(VerifiedClient(server, "another", sound).check() == Verifier::Outcome::clean);
}
