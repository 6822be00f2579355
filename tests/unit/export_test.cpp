#include "export.hpp"

#include "as_text.hpp"
#include "catch.hpp"
#include "error_of.hpp"
#include "gate.hpp"
#include "image_bytes.hpp"
#include "memory_storage.hpp"
#include "scratch_directory.hpp"
#include "watched_thread.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <latch>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

using namespace qcowcache;
using Kind = MemoryStorage::Kind;

namespace {

constexpr std::uint64_t unit = WriteCache::least_unit_size;
constexpr std::uint64_t disk_size = 16 * unit;

Capabilities shared(std::uint64_t size = disk_size) {
  return MemoryStorage::everything(size);
}

Capabilities unshared(std::uint64_t size = disk_size) {
  Capabilities capabilities = MemoryStorage::everything(size);
  capabilities.can_multi_conn = false;
  return capabilities;
}

/// A server with nothing but exports, which caches without looking for a qcow2 header.
class Server {
public:
  explicit Server(UncleanFile* unclean = nullptr) : unclean_(unclean) {}
  [[nodiscard]] Exports& exports() { return exports_; }
  [[nodiscard]] MemoryBudget& budget() { return budget_; }
  /// "name 100 bytes: 0-100" for each loss that was reported; they are then forgotten.
  std::string losses() { return std::exchange(losses_, {}); }
  /// What was counted for an export.
  [[nodiscard]] Totals totals(const std::string& name) const {
    Totals found;
    for (const Snapshot::Export& of : statistics_.snapshot().exports) {
      if (of.name == name)
        found = of.totals;
    }
    return found;
  }

private:
  Export::Settings settings() {
    Export::Settings settings;
    settings.cluster_size = unit;
    settings.report_loss = [this](const std::string& name, const Unsaved& lost) {
      losses_ += name + " " + std::to_string(lost.bytes) +
                 " bytes: " + as_text::ranges(lost.ranges) + "\n";
    };
    settings.statistics = &statistics_;
    settings.unclean = unclean_;
    return settings;
  }

  UncleanFile* unclean_;
  Statistics statistics_;
  MemoryBudget budget_{std::size_t{16} * 1024 * 1024};
  std::string losses_;
  Exports exports_{settings(), budget_};
};

/// A client's connection to one export, which uses it from the start.
class Visitor {
public:
  Visitor(Server& server, const std::string& name, const Capabilities& capabilities,
          std::shared_ptr<MemoryDisk> disk, bool onlooker = false)
      : exports_(server.exports()), of_(exports_.visit(name)),
        owned_(std::make_unique<MemoryStorage>(capabilities, std::move(disk))), storage_(*owned_),
        handle_(std::make_shared<Handle>(std::move(owned_))) {
    if (!onlooker)
      enter(true);
  }
  Visitor(const Visitor&) = delete;
  Visitor& operator=(const Visitor&) = delete;
  ~Visitor() { leave(); }

  /// Ends the connection as nbdkit does, but for writing what is left.
  void leave() {
    if (!of_)
      return;
    handle_->retire();
    exports_.leave(of_, *handle_, image_);
    image_.reset();
    of_.reset();
  }

  void write(std::uint64_t offset, std::string_view text, bool fua = false) {
    enter(true);
    cache().write(storage_, offset, as_text::parse(text), fua);
  }
  [[nodiscard]] std::string read(std::uint64_t offset, std::size_t size) {
    enter(false);
    std::vector<std::byte> data(size);
    cache().read(storage_, offset, data);
    return as_text::bytes(data);
  }
  /// Storage's answer.
  int flush() {
    return error_of([&] {
      enter(false);
      cache().flush(storage_);
    });
  }
  void storage_refuses_writes() { storage_.before = MemoryStorage::refusal(Kind::write, ENOSPC); }

  /// A unit that waits to be written, this client having written to it last.
  [[nodiscard]] WriteCache::Next waiting(const ByteRange& range, bool was_refused) const {
    return {static_cast<const Storage*>(&storage_), range, std::min(range.end, cache().size()),
            was_refused};
  }

  [[nodiscard]] WriteCache& cache() const { return image_->cache(); }
  [[nodiscard]] const Image& image() const { return *image_; }
  [[nodiscard]] bool is_guest() const { return handle_->is_guest(); }
  [[nodiscard]] MemoryStorage& storage() const { return storage_; }
  [[nodiscard]] const std::shared_ptr<Export>& of() const { return of_; }

private:
  void enter(bool changes) {
    if (!image_ || handle_->is_guest())
      image_ = of_->enter(handle_, image_, {changes});
  }

  Exports& exports_;
  std::shared_ptr<Export> of_;
  std::unique_ptr<MemoryStorage> owned_;
  MemoryStorage& storage_;
  std::shared_ptr<Handle> handle_;
  std::shared_ptr<Image> image_;
};

std::shared_ptr<MemoryDisk> new_disk(std::uint64_t size = disk_size) {
  return std::make_shared<MemoryDisk>(size);
}

std::string on(const MemoryDisk& disk, std::uint64_t offset, std::size_t size) {
  return as_text::bytes(disk.read(offset, size));
}

} // namespace

TEST_CASE("exports of different names have nothing in common", "[export]") {
  Server server;
  Visitor a(server, "a", shared(), new_disk());
  Visitor b(server, "b", shared(), new_disk());
  CHECK(a.of() != b.of());
  CHECK(&a.cache() != &b.cache());
  a.write(100, "hello");
  b.write(100, "world");
  CHECK(a.flush() == 0);
  CHECK(b.flush() == 0);
  CHECK(a.read(100, 5) == "hello");
  CHECK(on(b.storage().disk(), 100, 5) == "world");
}

TEST_CASE("what one connection changes on a common disk, another one does not remember",
          "[export]") {
  const Capabilities first = GENERATE(shared(), unshared());
  Server server;
  const auto disk = new_disk();
  Visitor remembers(server, "a", first, disk);
  Visitor changes(server, "a", unshared(), disk);
  remembers.write(100, "hello");
  REQUIRE(remembers.flush() == 0);

  SECTION("by a write that goes through") {
    changes.write(102, "XY", true);
  }
  SECTION("by a write that is flushed") {
    changes.write(102, "XY");
    REQUIRE(changes.flush() == 0);
  }
  CHECK(remembers.read(100, 5) == "heXYo");
}

TEST_CASE("what one connection has not stored yet stays when another one changes the disk",
          "[export]") {
  Server server;
  const auto disk = new_disk();
  Visitor dirty(server, "a", unshared(), disk);
  Visitor changes(server, "a", unshared(), disk);
  dirty.write(100, "hello");
  changes.write(98, "abcdefghi", true);
  CHECK(dirty.read(98, 9) == "abhellohi");
  CHECK(dirty.flush() == 0);
  CHECK(on(*disk, 98, 9) == "abhellohi");
}

TEST_CASE("a connection remembers what it wrote itself, though others may share the disk",
          "[export]") {
  Capabilities capabilities = unshared();
  capabilities.can_extents = false;
  Server server;
  const auto disk = new_disk();
  Visitor writer(server, "a", capabilities, disk);
  const Visitor other(server, "a", capabilities, disk);
  writer.write(100, "hello");
  REQUIRE(writer.flush() == 0);
  const std::size_t reads = writer.storage().calls(Kind::read).size();
  writer.write(105, "world");
  REQUIRE(writer.flush() == 0);
  CHECK(writer.storage().calls(Kind::read).size() == reads);
  CHECK(on(*disk, 100, 10) == "helloworld");
}

TEST_CASE("connections that do not share a cache wait for each other's ranges", "[export]") {
  Server server;
  const auto disk = new_disk();
  Visitor slow(server, "a", unshared(), disk);
  Visitor waiting(server, "a", unshared(), disk);
  Gate gate(slow.storage(), Kind::write);
  // Both change the same block of 4096 bytes, which each has to read before.
  WatchedThread first([&] { slow.write(100, "hello", true); });
  gate.wait_until_reached();
  WatchedThread second([&] { waiting.write(200, "world", true); });
  const bool waited = second.waits();
  const std::size_t too_early = waiting.storage().calls(Kind::write).size();
  gate.let_go();
  CHECK(first.ends());
  CHECK(second.ends());
  CHECK(waited);
  CHECK(too_early == 0);
  CHECK(on(*disk, 100, 5) == "hello");
  CHECK(on(*disk, 200, 5) == "world");
}

TEST_CASE("beside bytes that storage refused nothing is remembered", "[export]") {
  // In the same unit, and in another one.
  const std::uint64_t clean[] = {unit / 2, 2 * unit + unit / 2};
  Server server;
  const auto disk = new_disk();
  {
    Visitor unlucky(server, "a", shared(), disk);
    for (const std::uint64_t offset : clean) {
      unlucky.write(offset - 4096, "the disk is recognised by this");
      unlucky.write(offset, "known");
    }
    REQUIRE(unlucky.flush() == 0);
    unlucky.storage_refuses_writes();
    unlucky.write(100, "hello");
    CHECK(unlucky.flush() == ENOSPC);
  }
  for (const std::uint64_t offset : clean)
    disk->write(offset, as_text::parse("OTHER"), true);
  Visitor next(server, "a", shared(), disk);
  for (const std::uint64_t offset : clean)
    CHECK(next.read(offset, 5) == "OTHER");
  CHECK(next.read(100, 5) == "hello");
}

TEST_CASE("bytes that storage refused are lost when the export comes back with another size",
          "[export]") {
  const std::uint64_t new_size = GENERATE(disk_size / 2, disk_size * 2);
  Server server;
  {
    Visitor unlucky(server, "a", shared(), new_disk());
    unlucky.storage_refuses_writes();
    unlucky.write(100, "hello");
  }
  CHECK(server.losses().empty());
  Visitor next(server, "a", shared(new_size), new_disk(new_size));
  CHECK(server.losses() == "a 5 bytes: 100-105\n");
  CHECK(next.cache().size() == new_size);
  CHECK(next.read(100, 5) == "00000");
  CHECK(next.cache().unsaved().bytes == 0);
}

TEST_CASE("what storage never took is found by who comes back for it, and by the next server",
          "[export]") {
  const ScratchDirectory scratch;
  UncleanFile unclean(scratch.file("unclean"), [](const std::string& /*line*/) {});
  unclean.open();
  const auto refuses = [&] { return error_of([&] { unclean.refuse_if_lost("a"); }) != 0; };
  const auto named = [&] { return scratch.content("unclean").find("\"a\"") != std::string::npos; };
  Server server(&unclean);
  const bool shares = GENERATE(true, false);
  const auto disk = new_disk();
  {
    Visitor unlucky(server, "a", shares ? shared() : unshared(), disk);
    unlucky.write(100, "hello");
    CHECK(named());
    CHECK(unlucky.flush() == 0);
    CHECK_FALSE(named());
    unlucky.storage_refuses_writes();
    unlucky.write(200, "world");
  }
  CHECK(named());
  CHECK_FALSE(refuses() == shares); // what is left waits for the next connection, or is lost
  server.exports().report_left();
  CHECK(named());
  if (shares) {
    Visitor next(server, "a", shared(disk_size), disk);
    CHECK(next.flush() == 0);
    CHECK_FALSE(named());
  }
}

TEST_CASE("what was left of a disk that is gone is no loss of the new one", "[export]") {
  const ScratchDirectory scratch;
  UncleanFile unclean(scratch.file("unclean"), [](const std::string& line) { FAIL(line); });
  unclean.open();
  Server server(&unclean);
  {
    Visitor unlucky(server, "a", shared(), new_disk());
    unlucky.write(100, "hello");
    CHECK(unlucky.flush() == 0);
    unlucky.storage_refuses_writes();
    unlucky.write(200, "world");
  }
  Visitor next(server, "a", shared(), new_disk());
  next.write(300, "new");
  CHECK(server.losses() == "a 5 bytes: 200-205\n");
  CHECK(next.flush() == 0);
  CHECK_NOTHROW(unclean.refuse_if_lost("a"));
  CHECK(scratch.content("unclean").empty());
}

TEST_CASE("what is left at the end of the server is reported, export by export", "[export]") {
  Server server;
  const auto leave_behind = [&](const std::string& name, std::string_view text) {
    Visitor client(server, name, shared(), new_disk());
    client.write(100, text);
  };
  leave_behind("a", "hello");
  leave_behind("b", "hi");
  Visitor stored(server, "c", shared(), new_disk());
  stored.write(0, "stored");
  REQUIRE(stored.flush() == 0);
  server.exports().report_left();
  CHECK(server.losses() == "a 5 bytes: 100-105\nb 2 bytes: 100-102\n");
}

TEST_CASE("what connections ask for, do and lose is counted for their export", "[export]") {
  Server server;
  const Capabilities capabilities = GENERATE(shared(), unshared());
  for (int i = 0; i < 3; ++i) {
    Visitor client(server, "a", capabilities, new_disk());
    client.write(100, "hello");
    CHECK(client.flush() == 0);
  }
  {
    Visitor client(server, "a", capabilities, new_disk());
    client.storage_refuses_writes();
    client.write(100, "gone");
    CHECK(client.flush() == ENOSPC);
  }
  server.exports().report_left();
  const Totals totals = server.totals("a");
  CHECK(totals[Count::client_writes] == 4);
  CHECK(totals[Count::client_flushes] == 4);
  CHECK(totals[Count::storage_writes] == 3);
  CHECK(totals[Count::refused_writes] == 1);
  CHECK(totals[Count::lost_bytes] == 4);
  CHECK(server.totals("b")[Count::client_writes] == 0);
}

TEST_CASE("a shared cache is as large as its largest connection", "[export]") {
  Server server;
  const auto disk = new_disk(2 * disk_size);
  Visitor small(server, "a", shared(), disk);
  CHECK(small.cache().size() == disk_size);
  {
    Visitor large(server, "a", shared(2 * disk_size), disk);
    CHECK(small.cache().size() == 2 * disk_size);
    Visitor another(server, "a", shared(), disk);
    CHECK(small.cache().size() == 2 * disk_size);
  }
  CHECK(small.cache().size() == disk_size);
}

TEST_CASE("connections that share a cache do not care about the size of those that do not",
          "[export]") {
  Server server;
  const Visitor own(server, "a", unshared(2 * disk_size), new_disk(2 * disk_size));
  const Visitor sharing(server, "a", shared(), new_disk());
  CHECK(own.cache().size() == 2 * disk_size);
  CHECK(sharing.cache().size() == disk_size);
  Visitor(server, "a", shared(disk_size / 2), new_disk()).leave();
  CHECK(sharing.cache().size() == disk_size);
  CHECK(own.cache().size() == 2 * disk_size);
}

TEST_CASE("an export lives as long as somebody is connected", "[export]") {
  const Capabilities capabilities = GENERATE(shared(), unshared());
  Server server;
  const auto disk = new_disk();
  Visitor first(server, "a", capabilities, disk);
  Visitor second(server, "a", capabilities, disk);
  const std::weak_ptr<Export> watch = first.of();
  first.leave();
  REQUIRE_FALSE(watch.expired());
  CHECK(second.of() == watch.lock());
  second.leave();
  CHECK(watch.expired());
  server.exports().report_left();
  CHECK(server.losses().empty());
}

TEST_CASE("clean data of all exports is given back when memory is needed", "[export]") {
  Server server;
  Visitor a(server, "a", shared(), new_disk());
  Visitor b(server, "b", unshared(), new_disk());
  for (Visitor* client : {&a, &b}) {
    client->write(100, "hello");
    REQUIRE(client->flush() == 0);
  }
  const std::size_t both = server.budget().used();
  REQUIRE(both > 2 * unit);
  CHECK(server.budget().reclaim(both));
  CHECK(server.budget().used() == 0);
  CHECK(a.read(100, 5) == "hello");
  CHECK(b.read(100, 5) == "hello");
}

TEST_CASE("dirty data is not given back when memory is needed", "[export]") {
  Server server;
  Visitor client(server, "a", shared(), new_disk());
  client.write(100, "hello");
  CHECK_FALSE(server.budget().reclaim(1));
  CHECK(client.read(100, 5) == "hello");
}

TEST_CASE("a unit is written through the connection that wrote to it last, or where that was "
          "refused, through another",
          "[export]") {
  Server server;
  const auto disk = new_disk();
  Visitor first(server, "a", shared(), disk);
  Visitor second(server, "a", shared(), disk, true);
  first.write(0, "hello");
  second.write(unit, "hello"); // it sees what the first one has stored
  const auto lent = [&](const WriteCache::Next& next) -> const Storage* {
    const auto use = first.image().lend(next);
    return use ? &use->storage() : nullptr;
  };
  CHECK(lent(first.waiting({0, unit}, false)) == &first.storage());
  CHECK(lent(second.waiting({0, unit}, false)) == &second.storage());
  CHECK(lent(first.waiting({0, unit}, true)) == &second.storage());
  CHECK(lent(second.waiting({0, unit}, true)) == &first.storage());

  const WriteCache::Next of_second = second.waiting({0, unit}, false);
  second.leave();
  CHECK(lent(of_second) == &first.storage());
  CHECK(lent(first.waiting({0, unit}, true)) == &first.storage());
}

TEST_CASE("a connection is lent only when its storage can take the unit", "[export]") {
  Server server;
  Capabilities odd = shared(disk_size + 100);
  Capabilities read_only = odd;
  read_only.can_write = false;
  const auto disk = new_disk(odd.size);
  Visitor writer(server, "a", odd, disk);
  writer.write(0, "hello");
  Visitor cannot_write(server, "a", read_only, disk);
  writer.write(0, "hello");
  Visitor too_small(server, "a", shared(), disk);
  Visitor with_another_cache(server, "a", unshared(odd.size), disk);
  const ByteRange last{disk_size, disk_size + unit};
  const auto lent = [&](const WriteCache::Next& next) -> const Storage* {
    const auto use = cannot_write.image().lend(next);
    return use ? &use->storage() : nullptr;
  };
  // The end of the unit lies behind the end of the export.
  CHECK(lent(writer.waiting(last, false)) == &writer.storage());
  CHECK(lent(too_small.waiting(last, false)) == &writer.storage());
  CHECK(lent(writer.waiting(last, true)) == &writer.storage());
  const WriteCache::Next next = writer.waiting(last, false);
  writer.leave();
  CHECK(lent(next) == nullptr);
  CHECK(lent(too_small.waiting({0, unit}, false)) == &too_small.storage());
}

TEST_CASE("a guest is lent for nothing, whoever seems to have written last", "[export]") {
  Server server;
  const auto disk = new_disk();
  Visitor writer(server, "a", shared(), disk);
  writer.write(0, "hello");
  REQUIRE(writer.flush() == 0);
  Visitor guest(server, "a", shared(), disk, true);
  CHECK(guest.read(100, 5) == "00000");
  REQUIRE(guest.is_guest());
  Visitor another(server, "a", shared(), disk, true); // who is alone is trusted
  CHECK(another.read(100, 5) == "00000");
  // Its storage may have been made where that of a connection was that has ended.
  const bool was_refused = GENERATE(true, false);
  const WriteCache::Next next = guest.waiting({0, unit}, was_refused);
  {
    const auto use = guest.image().lend(next);
    REQUIRE(use);
    CHECK(&use->storage() == &writer.storage());
  }
  writer.leave();
  CHECK_FALSE(guest.image().lend(next));
}

TEST_CASE("what may be the same disk is recognised though others have changed it", "[export]") {
  Server server;
  const auto disk = new_disk();
  Visitor first(server, "a", shared(), disk);
  first.write(100, "hello");
  REQUIRE(first.flush() == 0);
  Visitor own(server, "a", unshared(), disk);
  own.write(102, "XY", true);
  first.write(5 * unit, "held"); // there is something to lose
  Visitor second(server, "a", shared(), disk);
  second.write(3 * unit, "mine");
  CHECK(first.read(3 * unit, 4) == "mine");
}

TEST_CASE("clients that come and go at once find one export, and leave none behind", "[export]") {
  Server server;
  const auto disk = new_disk();
  std::atomic<int> wrong = 0;
  constexpr unsigned clients = 4;
  std::latch all_there(clients);
  {
    std::vector<std::jthread> threads;
    for (unsigned self = 0; self < clients; ++self) {
      threads.emplace_back([&, self] {
        all_there.arrive_and_wait();
        for (unsigned round = 0; round < 100; ++round) {
          Visitor client(server, "a", self % 2 == 0 ? shared() : unshared(), disk);
          // Side by side in one block.
          const std::string text = std::to_string(1000 + round);
          client.write(self * 4, text);
          if (client.read(self * 4, 4) != text || client.flush() != 0)
            ++wrong;
        }
      });
    }
  }
  CHECK(wrong == 0);
  CHECK(on(*disk, 0, 16) == "1099109910991099");
  CHECK(server.budget().used() == 0);
  CHECK(server.losses().empty());
}
