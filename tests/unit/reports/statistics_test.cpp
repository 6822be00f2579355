#include "reports/statistics.hpp"

#include "cache/write_cache.hpp"
#include "catch.hpp"
#include "image_bytes.hpp"
#include "memory_storage.hpp"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <memory>
#include <numeric>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

using namespace qcowcache;
using Kind = MemoryStorage::Kind;

namespace {

constexpr std::uint64_t unit = WriteCache::least_unit_size;

bool has(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

/// A snapshot of one export whose n-th count is n * 1000.
Snapshot example(const std::string& name) {
  Totals totals;
  for (std::size_t i = 0; i < counts; ++i)
    totals[static_cast<Count>(i)] = (i + 1) * 1000;
  Snapshot snapshot;
  snapshot.exports.push_back({name, totals});
  snapshot.elapsed_nanoseconds = 12'034'567'890;
  snapshot.memory_limit_bytes = 1 << 26;
  snapshot.memory_peak_bytes = 1 << 20;
  return snapshot;
}

/// A cache that counts, over a disk in memory.
struct Counting {
  explicit Counting(std::size_t memory = 32 * 1024 * 1024, WriteCache::Settings settings = {})
      : budget(memory) {
    if (!settings.cluster_size)
      settings.cluster_size = unit;
    cache =
        std::make_shared<WriteCache>(std::move(settings), storage.capabilities(), ranges, budget);
    budget.add_holder(cache);
    storage.count_in(cache->counters());
  }

  void write(std::uint64_t offset, std::size_t size, bool fua = false) {
    cache->write(storage, offset, pattern(size, 1), fua);
  }
  [[nodiscard]] std::uint64_t operator[](Count what) const {
    return cache->counters()->totals()[what];
  }
  [[nodiscard]] std::uint64_t partial_units() const {
    std::uint64_t all = 0;
    for (const Count cause : {Count::partial_units_flush, Count::partial_units_disconnect,
                              Count::partial_units_expiry, Count::partial_units_memory,
                              Count::partial_units_cluster_end, Count::partial_units_many_pieces,
                              Count::partial_units_new_layout, Count::partial_units_comparison})
      all += (*this)[cause];
    return all;
  }

  RangeLock ranges;
  MemoryBudget budget;
  MemoryStorage storage{MemoryStorage::everything(64 * unit)};
  std::shared_ptr<WriteCache> cache;
};

/// What the form for Prometheus has for the export's writes.
std::string prometheus_line(const std::string& export_name) {
  const std::string report = prometheus_report(example(export_name), "s");
  const std::size_t begin = report.find("qcowcache_client_writes_total{");
  return report.substr(begin, report.find('\n', begin) - begin);
}

} // namespace

TEST_CASE("what was counted stays when its counters have gone", "[statistics]") {
  Statistics statistics;
  {
    const auto first = statistics.counters("disk");
    const auto second = statistics.counters("disk");
    first->add(Count::client_writes);
    second->add(Count::client_writes, 10);
    CHECK(statistics.snapshot().exports.at(0).totals[Count::client_writes] == 11);
  }
  statistics.counters("disk")->add(Count::client_writes, 100);
  statistics.counters("another")->add(Count::lost_bytes, 7);
  const Snapshot snapshot = statistics.snapshot();
  REQUIRE(snapshot.exports.size() == 2);
  CHECK(snapshot.exports[0].name == "another");
  CHECK(snapshot.exports[0].totals[Count::lost_bytes] == 7);
  CHECK(snapshot.exports[1].totals[Count::client_writes] == 111);
  CHECK_FALSE(snapshot.others);
}

TEST_CASE("no count is missed when many threads count and one looks", "[statistics]") {
  Statistics statistics;
  constexpr std::uint64_t each = 20'000;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      const auto shared = statistics.counters("disk");
      for (std::uint64_t j = 0; j < each; ++j)
        shared->add(Count::storage_writes);
    });
  }
  std::uint64_t last = 0;
  for (int i = 0; i < 100; ++i) {
    const Snapshot snapshot = statistics.snapshot();
    const std::uint64_t now =
        snapshot.exports.empty() ? 0 : snapshot.exports[0].totals[Count::storage_writes];
    REQUIRE(now >= last);
    last = now;
  }
  for (std::thread& thread : threads)
    thread.join();
  CHECK(statistics.snapshot().exports[0].totals[Count::storage_writes] == 4 * each);
}

TEST_CASE("clients cannot make it remember more names than it wants to", "[statistics]") {
  Statistics statistics;
  for (std::size_t i = 0; i < Statistics::most_names; ++i)
    statistics.counters("name " + std::to_string(i))->add(Count::client_writes);
  CHECK_FALSE(statistics.snapshot().others);
  for (std::size_t i = 0; i < 50; ++i)
    statistics.counters("further name " + std::to_string(i))->add(Count::client_writes);
  statistics.counters("name 5")->add(Count::client_writes);

  const Snapshot snapshot = statistics.snapshot();
  CHECK(snapshot.exports.size() == Statistics::most_names);
  REQUIRE(snapshot.others);
  CHECK((*snapshot.others)[Count::client_writes] == 50);
  CHECK(has(prometheus_report(snapshot, "s"),
            "qcowcache_client_writes_total{server=\"s\",export=\"\\\\other\"} 50\n"));
  CHECK(has(prometheus_report(snapshot, "s"), "export=\"name 5\"} 2\n"));
  CHECK(has(json_report(snapshot), R"("others": {"name": null, "client_writes": 50,)"));
  CHECK(has(json_report(snapshot), R"("total": {"name": null, "client_writes": 1051,)"));
  CHECK(has(text_report(snapshot), "exports with other names"));
  // No name is written as those others are.
  CHECK_FALSE(has(prometheus_line("\\other"), "export=\"\\\\other\""));
}

TEST_CASE("a name is printed as it is, but for what does not print", "[statistics]") {
  const std::vector<std::pair<std::string, std::string>> names = {
      {"", ""},
      {"disk 1", "disk 1"},
      {"\xc3\xbc\xe2\x82\xac\xf0\x9f\x98\x80", "\xc3\xbc\xe2\x82\xac\xf0\x9f\x98\x80"},
      {"a\"b", "a\"b"},
      {"a\nb\tc\x7f", "a\\x0ab\\x09c\\x7f"},
      {"back\\slash", "back\\x5cslash"},
      {"\xff", "\\xff"},
      {"cut \xe2\x82", "cut \\xe2\\x82"},
      {"\xc0\xaf too long", "\\xc0\\xaf too long"},
      {"\xed\xa0\x80 half of a pair", "\\xed\\xa0\\x80 half of a pair"},
      {"\xc2\x9b"
       "31m",
       "\\xc2\\x9b31m"},
      {std::string("\0zero", 5), "\\x00zero"},
  };
  std::set<std::string> printed;
  for (const auto& [name, expected] : names) {
    CHECK(printable(name) == expected);
    printed.insert(printable(name));
  }
  CHECK(printed.size() == names.size());
}

TEST_CASE("names are quoted as JSON and Prometheus want it", "[statistics]") {
  CHECK(prometheus_line("a\"b") ==
        "qcowcache_client_writes_total{server=\"s\",export=\"a\\\"b\"} 1000");
  CHECK(prometheus_line("a\nb") ==
        "qcowcache_client_writes_total{server=\"s\",export=\"a\\\\x0ab\"} 1000");
  CHECK(has(json_report(example("a\"b\\")), R"({"name": "a\"b\\x5c", "client_writes": 1000,)"));
  CHECK(has(text_report(example("a\nb")), "\nexport \"a\\x0ab\"\n"));
  CHECK(has(prometheus_report(example(""), "o\"clock"), "{server=\"o\\\"clock\"} "));
}

TEST_CASE("every count is in every report, once", "[statistics]") {
  const Snapshot snapshot = example("disk");
  const std::string prometheus = prometheus_report(snapshot, "s");
  const std::string json = json_report(snapshot);
  const std::string text = text_report(snapshot);
  // Times are in nanoseconds, and shown in seconds.
  const auto wait = static_cast<std::size_t>(Count::memory_wait);
  for (std::size_t i = 0; i < counts; ++i) {
    const std::string value =
        i == wait ? "0.0000" + std::to_string((i + 1) * 1000) : std::to_string((i + 1) * 1000);
    CHECK(has(prometheus, "} " + value + "\n"));
    CHECK(has(json, ": " + value));
  }
  const auto lines = static_cast<std::size_t>(std::count(text.begin(), text.end(), '\n'));
  CHECK(lines == 1 + 4 + 2 + counts + 3); // title, server, export's title, counts, what follows
}

TEST_CASE("the reports' forms", "[statistics]") {
  const Snapshot snapshot = example("disk");
  CHECK(has(prometheus_report(snapshot, "s"),
            "# HELP qcowcache_client_writes_total Write requests of clients\n"
            "# TYPE qcowcache_client_writes_total counter\n"
            "qcowcache_client_writes_total{server=\"s\",export=\"disk\"} 1000\n"
            "# HELP qcowcache_client_odd_writes_total "));
  CHECK(has(prometheus_report(snapshot, "s"),
            "# HELP qcowcache_partial_units_total Units written before clients had filled them\n"
            "# TYPE qcowcache_partial_units_total counter\n"
            "qcowcache_partial_units_total{server=\"s\",export=\"disk\",cause=\"flush\"} 13000\n"
            "qcowcache_partial_units_total{server=\"s\",export=\"disk\",cause=\"disconnect\"} "));
  CHECK(has(prometheus_report(snapshot, "s"),
            "# TYPE qcowcache_elapsed_seconds gauge\n"
            "qcowcache_elapsed_seconds{server=\"s\"} 12.034567890\n"));
  CHECK(has(json_report(snapshot), "{\"version\": 2,\n \"elapsed_seconds\": 12.034567890,\n"));
  CHECK(has(json_report(snapshot), R"("partial_units": {"flush": 13000, "disconnect": 14000,)"));
  CHECK(has(json_report(snapshot), "\"average_client_write_bytes\": 3.000000"));
  CHECK(has(json_report(Snapshot()), "\"exports\": [],\n \"others\": null"));
  CHECK(has(json_report(Snapshot()), "\"write_amplification\": null}"));
  CHECK(has(text_report(snapshot), "        12.035 s  Time since the server began\n"));
  CHECK(has(text_report(snapshot), "       64.00 MiB  Memory allowed"));
  CHECK(has(text_report(snapshot), "           13000  Units written before clients had filled "
                                   "them: flush\n"));
  CHECK(has(text_report(Snapshot()), "nbdkit-qcowcache-filter\n"));
  CHECK_FALSE(has(text_report(snapshot), "\nall exports\n")); // there is only one
}

TEST_CASE("a cache counts what clients ask for", "[statistics]") {
  Counting cache;
  cache.write(0, 4096);
  cache.write(4096, 100);
  cache.write(3 * unit + 1, 4095);
  std::vector<std::byte> data(77);
  cache.cache->read(cache.storage, 50, data);
  cache.cache->trim(cache.storage, {8 * unit, 9 * unit}, false);
  cache.cache->zero(cache.storage, {9 * unit + 5, 10 * unit}, {});
  cache.cache->flush(cache.storage);

  CHECK(cache[Count::client_writes] == 3); // not what a zero writes at its ends
  CHECK(cache[Count::client_odd_writes] == 2);
  CHECK(cache[Count::client_written_bytes] == 4096 + 100 + 4095);
  CHECK(cache[Count::client_reads] == 1);
  CHECK(cache[Count::client_read_bytes] == 77);
  CHECK(cache[Count::client_trims] == 1);
  CHECK(cache[Count::client_zeros] == 1);
  CHECK(cache[Count::client_flushes] == 1);
}

TEST_CASE("a cache counts what storage does, and why", "[statistics]") {
  SECTION("whole units, and for each partial one the reason") {
    Counting cache;
    cache.write(unit, unit);
    cache.cache->flush(cache.storage);
    CHECK(cache[Count::whole_units] == 1);
    cache.write(2 * unit, 100);
    cache.cache->flush(cache.storage);
    CHECK(cache[Count::partial_units_flush] == 1);
    cache.write(3 * unit, 100);
    cache.cache->drain(cache.storage);
    CHECK(cache[Count::partial_units_disconnect] == 1);
    CHECK(cache.partial_units() == 2);
    cache.cache->flush(cache.storage);
    CHECK(cache.partial_units() == 2); // nothing was left
  }
  SECTION("units left behind: by time, and because others were completed") {
    WriteCache::Settings settings;
    settings.expire = std::chrono::milliseconds(0);
    Counting by_time(32 * 1024 * 1024, settings);
    by_time.write(unit, 100);
    by_time.cache->tick();
    while (by_time.cache->write_next(by_time.storage)) {
    }
    CHECK(by_time[Count::partial_units_expiry] == 1);

    Counting by_others;
    by_others.write(unit, 100);
    for (std::uint64_t i = 0; i <= WriteCache::left_behind_after; ++i)
      by_others.write((i + 2) * unit, unit);
    CHECK(by_others[Count::partial_units_cluster_end] == 1);
    by_others.cache->flush(by_others.storage);
    CHECK(by_others[Count::whole_units] == WriteCache::left_behind_after + 1);
  }
  SECTION("for want of memory, and how long that took") {
    Counting cache(5 * unit);
    for (std::uint64_t i = 1; i < 20; ++i)
      cache.write(i * unit, 100);
    CHECK(cache[Count::partial_units_memory] > 10);
    CHECK(cache.partial_units() == cache[Count::partial_units_memory]);
    CHECK(cache[Count::memory_wait] > 0);
    CHECK(cache.budget.peak() > unit);
    CHECK(cache.budget.peak() <= 5 * unit);
  }
  SECTION("in many pieces") {
    Counting cache;
    for (std::uint64_t i = 0; i < 100; ++i)
      cache.write(unit + 2 * i, 1);
    CHECK(cache[Count::partial_units_many_pieces] > 0);
    CHECK(cache.partial_units() == cache[Count::partial_units_many_pieces]);
  }
  SECTION("an image that is replaced") {
    WriteCache::Settings settings;
    Counting cache;
    const auto looking = std::make_shared<WriteCache>(settings, cache.storage.capabilities(),
                                                      cache.ranges, cache.budget);
    looking->write(cache.storage, 0, qcow2_header(16), false);
    looking->write(cache.storage, unit, pattern(100, 1), false);
    looking->write(cache.storage, 0, qcow2_header(21), false);
    while (looking->write_next(cache.storage)) {
    }
    CHECK(looking->counters()->totals()[Count::partial_units_new_layout] == 2);
  }
  SECTION("merged writes") {
    std::size_t waiting = 0;
    WriteCache::Settings settings;
    settings.wake_writer = [&waiting](std::size_t now) { waiting = now; };
    Counting cache(32 * 1024 * 1024, settings);
    for (std::uint64_t i = 1; i <= 4; ++i)
      cache.write(i * unit, unit);
    CHECK(waiting == 4);
    CHECK(cache.cache->write_next(cache.storage));
    CHECK(cache[Count::merged_writes] == 1);
    CHECK(cache[Count::whole_units] == 4);
    CHECK(cache[Count::storage_writes] == 1);
    CHECK(cache[Count::storage_written_bytes] == 4 * unit);
  }
  SECTION("fill-up reads, and writes that go through") {
    Counting cache;
    const std::vector<std::byte> everywhere(cache.storage.capabilities().size, std::byte{9});
    cache.storage.disk().write(0, everywhere, true);
    cache.write(unit + 5, 100);
    cache.cache->flush(cache.storage);
    CHECK(cache[Count::fill_up_reads] == 1);
    CHECK(cache[Count::fill_up_read_bytes] == 4096);
    cache.write(2 * unit + 5, 100, true);
    CHECK(cache[Count::writes_through] == 1);
    CHECK(cache[Count::fill_up_reads] == 2);
    CHECK(cache[Count::storage_reads] == 2);
  }
}

TEST_CASE("a cache counts refusals, and what was tried again", "[statistics]") {
  Counting cache;
  cache.write(unit, unit - 1);
  cache.storage.before = MemoryStorage::refusal(Kind::write, ENOSPC);
  for (int i = 0; i < 3; ++i)
    CHECK_THROWS(cache.cache->flush(cache.storage));
  CHECK(cache[Count::refused_writes] == 3);
  CHECK(cache[Count::retries] == 2);
  CHECK(cache[Count::storage_writes] == 0);
  CHECK(cache.partial_units() == 0);
  cache.storage.before = nullptr;
  cache.cache->flush(cache.storage);
  CHECK(cache[Count::refused_writes] == 3);
  CHECK(cache[Count::retries] == 3);
  CHECK(cache.partial_units() == 1);
  CHECK(cache[Count::storage_writes] == 1);
}

TEST_CASE("what a cache counts of storage is what storage sees", "[statistics]") {
  Counting cache(8 * unit);
  cache.storage.disk().write(0, std::vector<std::byte>(64 * unit, std::byte{9}), true);
  for (std::uint64_t i = 0; i < 500; ++i) {
    const std::uint64_t offset = i * i * 7919 % (63 * unit);
    cache.write(offset, 1 + i * 131 % 20'000, i % 50 == 0);
    if (i % 40 == 0)
      cache.cache->flush(cache.storage);
    if (i % 60 == 0)
      cache.cache->zero(cache.storage, {offset, offset + 5000}, {});
    if (i % 70 == 0)
      cache.cache->trim(cache.storage, {offset, offset + unit}, false);
    std::vector<std::byte> data(1000);
    if (i % 30 == 0)
      cache.cache->read(cache.storage, offset, data);
  }
  cache.cache->flush(cache.storage);
  const auto seen = [&](Kind kind) { return cache.storage.calls(kind).size(); };
  const auto bytes = [&](Kind kind) {
    const auto calls = cache.storage.calls(kind);
    return std::accumulate(
        calls.begin(), calls.end(), std::uint64_t{0},
        [](std::uint64_t sum, const MemoryStorage::Call& call) { return sum + call.range.size(); });
  };
  CHECK(cache[Count::storage_writes] == seen(Kind::write));
  CHECK(cache[Count::storage_written_bytes] == bytes(Kind::write));
  CHECK(cache[Count::storage_reads] == seen(Kind::read));
  CHECK(cache[Count::storage_read_bytes] == bytes(Kind::read));
  CHECK(cache[Count::storage_flushes] == seen(Kind::flush));
  CHECK(cache[Count::storage_zeros] == seen(Kind::zero));
  CHECK(cache[Count::storage_trims] == seen(Kind::trim));
  CHECK(cache[Count::fill_up_reads] <= seen(Kind::read));
}
