#include "util/events.hpp"

#include "cache/write_cache.hpp"
#include "catch.hpp"
#include "image_bytes.hpp"
#include "memory_storage.hpp"

#include <cerrno>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

using namespace qcowcache;

namespace {

constexpr std::uint64_t unit = WriteCache::least_unit_size;

using Lines = std::vector<std::string>;

Events::Listener listener(Lines& lines) {
  return [&lines](const std::string& line) { lines.push_back(line); };
}

/// A cache that looks for a header on a disk in memory, and those who listen to it.
struct Told {
  explicit Told(std::size_t memory = 32 * 1024 * 1024) : budget(memory) {
    WriteCache::Settings settings;
    settings.events.decision = listener(decisions);
    settings.events.trace = listener(traces);
    cache =
        std::make_shared<WriteCache>(std::move(settings), storage.capabilities(), ranges, budget);
    budget.add_holder(cache);
    storage.count_in(cache->counters());
  }

  void write(std::uint64_t offset, std::size_t size) {
    cache->write(storage, offset, pattern(size, 1), false);
  }
  void write_header(unsigned cluster_bits) {
    cache->write(storage, 0, qcow2_header(cluster_bits), false);
  }
  Lines next_decisions() { return std::exchange(decisions, {}); }
  Lines next_traces() { return std::exchange(traces, {}); }

  Lines decisions;
  Lines traces;
  RangeLock ranges;
  MemoryBudget budget;
  MemoryStorage storage{MemoryStorage::everything(64 * unit)};
  std::shared_ptr<WriteCache> cache;
};

} // namespace

TEST_CASE("a line is only made when somebody listens", "[events]") {
  tell(nullptr, []() -> std::string { throw std::logic_error("made for nobody"); });
  Lines lines;
  tell(listener(lines), [] { return "made"; });
  CHECK(lines == Lines{"made"});
}

TEST_CASE("lines can say what they are about", "[events]") {
  Lines lines;
  Events events;
  events.trace = listener(lines);
  const Events about = events.about("this: ");
  CHECK_FALSE(about.decision);
  about.trace("line");
  CHECK(lines == Lines{"this: line"});
}

TEST_CASE("it is told what is cached, whenever that changes", "[events]") {
  Told told;
  told.cache->learn_layout(told.storage);
  told.cache->learn_layout(told.storage);
  CHECK(told.next_decisions() == Lines{"no qcow2 header: passing writes through"});
  told.write(5 * unit, 100);
  CHECK(told.next_decisions().empty());
  told.write_header(16);
  told.write_header(16);
  CHECK(
      told.next_decisions() ==
      Lines{"qcow2 header of version 3, clusters of 65536 bytes: caching in units of 65536 bytes"});
  told.budget.set_limit(1000);
  told.cache->tick();
  told.cache->tick();
  CHECK(told.next_decisions() ==
        Lines{"qcow2 header of version 3, clusters of 65536 bytes, but 1000 bytes of memory are "
              "less than two units of 65536 and their bookkeeping: passing writes through"});
}

TEST_CASE("a flush tells in one line what was written and why", "[events]") {
  Told told;
  told.write_header(16);
  told.next_decisions();
  told.cache->flush(told.storage);
  told.next_decisions();
  told.write(unit, unit);
  for (std::uint64_t i = 2; i < 10; ++i)
    told.write(i * unit, 100);
  told.cache->flush(told.storage);
  CHECK(told.next_decisions() ==
        Lines{"flush; units written since the last line: 1 whole, 8 partial for a flush"});
  told.cache->flush(told.storage);
  CHECK(told.next_decisions().empty());
  told.write(unit, 100);
  told.cache->drain(told.storage);
  CHECK(told.next_decisions() ==
        Lines{"disconnect; units written since the last line: 1 partial for a disconnect"});
}

TEST_CASE("of many refusals the first is told, and how many they were", "[events]") {
  Told told;
  told.write_header(16);
  told.cache->flush(told.storage);
  told.next_decisions();
  told.storage.before = [](const MemoryStorage::Call& call) {
    if (call.kind == MemoryStorage::Kind::write)
      throw std::system_error(ENOSPC, std::generic_category(), "refused");
  };
  for (std::uint64_t i = 1; i <= 5; ++i)
    told.write(i * unit, 100);
  CHECK_THROWS(told.cache->flush(told.storage));
  CHECK(told.next_decisions() ==
        Lines{"keeping 65536-131071 in memory: refused: No space left on device",
              "flush; units written since the last line: 1 writes refused"});
}

TEST_CASE("a trace has every write absorbed, written and filled up", "[events]") {
  Told told;
  told.storage.disk().write(0, std::vector<std::byte>(64 * unit, std::byte{9}), true);
  told.write_header(16);
  told.cache->flush(told.storage);
  told.next_traces();
  told.write(unit + 1, 100);
  CHECK(told.next_traces() == Lines{"absorbed 65537-65636"});
  told.cache->flush(told.storage);
  CHECK(told.next_traces() == Lines{"filled up 65536-69631", "writing 65536-69631 of 1 unit"});
  told.cache->write(told.storage, 2 * unit + 1, pattern(100, 1), true);
  CHECK(told.next_traces() == Lines{"writing through 131073-131172", "filled up 131072-135167"});
}
