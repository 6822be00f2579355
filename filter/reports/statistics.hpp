#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace qcowcache {

/// What is counted, for each export. The table in statistics.cpp says of each what it is, in which
/// unit, and under which name reports show it; a new one is a line there and a line here.
enum class Count : std::size_t {
  client_writes,
  client_odd_writes,
  client_written_bytes,
  client_reads,
  client_read_bytes,
  client_flushes,
  client_zeros,
  client_trims,
  storage_writes,
  storage_written_bytes,
  merged_writes,
  whole_units,
  partial_units_flush,
  partial_units_disconnect,
  partial_units_expiry,
  partial_units_memory,
  partial_units_cluster_end,
  partial_units_many_pieces,
  partial_units_new_layout,
  partial_units_comparison,
  writes_through,
  storage_reads,
  storage_read_bytes,
  fill_up_reads,
  fill_up_read_bytes,
  storage_flushes,
  storage_zeros,
  storage_trims,
  reservations,
  reserved_bytes,
  refused_reservations,
  memory_wait,
  verified_deflate_clusters,
  verified_deflate_bytes,
  verified_zstd_clusters,
  verified_zstd_bytes,
  unreadable_clusters,
  unreadable_alarms,
  refused_writes,
  retries,
  lost_bytes,
};
inline constexpr std::size_t counts = static_cast<std::size_t>(Count::lost_bytes) + 1;

/// A write of clients counts as odd unless it begins and ends on a multiple of this, in bytes.
inline constexpr std::uint64_t odd_grid = 4096;

/// The values of all counts at one moment. Times are nanoseconds.
class Totals {
public:
  [[nodiscard]] std::uint64_t operator[](Count what) const noexcept {
    return values_[static_cast<std::size_t>(what)];
  }
  [[nodiscard]] std::uint64_t& operator[](Count what) noexcept {
    return values_[static_cast<std::size_t>(what)];
  }
  Totals& operator+=(const Totals& other) noexcept;
  Totals& operator-=(const Totals& other) noexcept;

private:
  std::array<std::uint64_t, counts> values_{};
};

/// Where all that is done for an export name is counted. Thread safe.
class Counters {
public:
  void add(Count what, std::uint64_t more = 1) noexcept {
    value(what).fetch_add(more, std::memory_order_relaxed);
  }
  [[nodiscard]] Totals totals() const noexcept;

  /// Adds the nanoseconds that it lives.
  class Stopwatch {
  public:
    Stopwatch(Counters& counters, Count what) noexcept : counters_(counters), what_(what) {}
    Stopwatch(const Stopwatch&) = delete;
    Stopwatch& operator=(const Stopwatch&) = delete;
    ~Stopwatch() {
      const std::chrono::nanoseconds passed = std::chrono::steady_clock::now() - since_;
      counters_.add(what_, static_cast<std::uint64_t>(passed.count()));
    }

  private:
    Counters& counters_;
    const Count what_;
    const std::chrono::steady_clock::time_point since_ = std::chrono::steady_clock::now();
  };

private:
  std::atomic<std::uint64_t>& value(Count what) noexcept {
    return values_[static_cast<std::size_t>(what)];
  }

  std::array<std::atomic<std::uint64_t>, counts> values_{};
};

/// What reports show.
struct Snapshot {
  struct Export {
    std::string name;
    Totals totals;
  };
  /// Sorted by name.
  std::vector<Export> exports;
  /// Exports beyond `Statistics::most_names`, added up.
  std::optional<Totals> others;

  /// Since nbdkit began to serve.
  std::uint64_t elapsed_nanoseconds = 0;
  /// As `MemoryBudget` knows it.
  std::uint64_t memory_limit_bytes = 0;
  std::uint64_t memory_used_bytes = 0;
  std::uint64_t memory_peak_bytes = 0;
};

/// Counts of all exports since nbdkit began to serve. Thread safe.
class Statistics {
public:
  /// Clients choose the names of exports: no more than so many are kept apart.
  static constexpr std::size_t most_names = 1000;

  /// The counters of this name, or those that all names share which came after the most.
  std::shared_ptr<Counters> counters(const std::string& export_name);

  /// The exports' part of a snapshot.
  [[nodiscard]] Snapshot snapshot() const;

private:
  mutable std::mutex mutex_;
  std::map<std::string, std::shared_ptr<Counters>> exports_;
  /// nullptr: there are none.
  std::shared_ptr<Counters> others_;
};

/// A name that a client chose, made fit to print: UTF-8 without control characters. A backslash and
/// whatever is neither are written as \xHH, byte by byte, so that two names stay two.
[[nodiscard]] std::string printable(std::string_view name);

// A snapshot in three forms. All show the same counts and, of the server as a whole, the time and
// the memory.
//
// For people, a line a count; after the counts what follows from them (average sizes, bytes written
// per byte of clients).
//
// JSON: one object with
//   version                     1; another number when a key below changes its meaning
//   elapsed_seconds, memory_limit_bytes, memory_used_bytes, memory_peak_bytes
//   exports                     an array of objects, sorted by name
//   others                      the same object for exports beyond the first 1000 names, or null
//   total                       the same object for all together
// An export's object has `name` (see `printable`; null but in `exports`), each count by its name in
// the table as a number, `partial_units` as an object by cause, and average_client_write_bytes,
// average_storage_write_bytes and write_amplification, null where there is nothing to divide by.
//
// Prometheus' text exposition format: each count as qcowcache_NAME_total, labelled with `server`,
// `export` and, for partial units, `cause`. `server` keeps the reports of several nbdkits apart
// that one collector reads. The exports beyond the first 1000 names have the label `\other`, which
// no name is written as. What follows from counts is left to queries.
[[nodiscard]] std::string text_report(const Snapshot& snapshot);
[[nodiscard]] std::string json_report(const Snapshot& snapshot);
[[nodiscard]] std::string prometheus_report(const Snapshot& snapshot, std::string_view server);

} // namespace qcowcache
