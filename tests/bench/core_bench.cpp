// What the core costs by itself: against storage that takes no time, so that all that is measured
// is ours. Prints nanoseconds per extent and bytes per second.

#include "cache/write_cache.hpp"

// Version 2 of Catch2 compiles benchmarks, and its own code, only where it is told to; version 3
// does not look.
#define CATCH_CONFIG_ENABLE_BENCHMARKING
#define CATCH_CONFIG_RUNNER
#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif

#include <algorithm>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

using namespace qcowcache;

#if defined(CATCH_VERSION_MAJOR) && CATCH_VERSION_MAJOR >= 3
using Listener = Catch::EventListenerBase;
#else
using Listener = Catch::TestEventListenerBase;
#endif

namespace {

constexpr std::uint64_t unit = WriteCache::least_unit_size;
constexpr std::uint64_t disk_size = std::uint64_t{1} << 40;
constexpr std::size_t memory = std::size_t{64} * 1024 * 1024;

/// Takes everything at once and holds nothing but zeros.
class NullStorage final : public Storage {
public:
  NullStorage() {
    capabilities_.size = disk_size;
    capabilities_.can_write = true;
    capabilities_.can_flush = true;
    capabilities_.can_extents = true;
    capabilities_.can_multi_conn = true;
  }
  [[nodiscard]] const Capabilities& capabilities() const noexcept override { return capabilities_; }

protected:
  void do_read(std::uint64_t, std::span<std::byte> data) override {
    std::ranges::fill(data, std::byte{0});
  }
  void do_write(std::uint64_t, std::span<const std::byte>, bool) override {}
  void do_flush() override {}
  void do_zero(const ByteRange&, const ZeroOptions&) override {}
  void do_trim(const ByteRange&, bool) override {}
  void do_cache(const ByteRange&) override {}
  Extents do_extents(const ByteRange& range, bool) override {
    return {{range, ExtentType::hole_and_zero}};
  }

private:
  Capabilities capabilities_;
};

/// A cache that writes units in the thread that completes them: no other thread blurs the figures.
struct Core {
  explicit Core(std::size_t units_written) {
    const std::vector<std::byte> data(unit, std::byte{1});
    for (std::size_t i = 0; i < units_written; ++i)
      cache->write(storage, i * unit, data, false);
  }

  static WriteCache::Settings settings() {
    WriteCache::Settings settings;
    settings.cluster_size = unit;
    return settings;
  }

  NullStorage storage;
  RangeLock ranges;
  MemoryBudget budget{memory};
  std::shared_ptr<WriteCache> cache =
      std::make_shared<WriteCache>(settings(), storage.capabilities(), ranges, budget);
};

/// What one iteration of the benchmark that is running does. Global, for Catch2 makes its listeners
/// itself: there is no other way to tell them.
struct Batch {
  std::size_t extents = 0;
  std::uint64_t bytes = 0;
};
Batch batch;

class PerExtent final : public Listener {
public:
  using Listener::Listener;
  void benchmarkEnded(const Catch::BenchmarkStats<>& stats) override {
    const double mean = stats.mean.point.count();
    const auto extents = static_cast<double>(batch.extents);
    std::printf("%-76s %9.1f ns [%.1f-%.1f] %8.3f GB/s\n", stats.info.name.c_str(), mean / extents,
                stats.mean.lower_bound.count() / extents, stats.mean.upper_bound.count() / extents,
                static_cast<double>(batch.bytes) / mean);
  }
};

CATCH_REGISTER_LISTENER(PerExtent)

struct Workload {
  const char* name;
  std::size_t extent_size;
  /// Extents are shuffled within as many.
  std::size_t window;
};

constexpr Workload workloads[] = {
    {"small (70 bytes)", 70, 1},
    {"typical (26 700 bytes)", 26'700, 1},
    {"border-crossing (65 536 bytes, odd offsets)", unit, 1},
    {"out of order (26 700 bytes, 16 at once)", 26'700, 16},
};

/// Where the extents of a batch begin, counted from where the batch does.
std::vector<std::uint64_t> layout(const Workload& workload, std::size_t extents) {
  std::vector<std::uint64_t> offsets(extents);
  for (std::size_t i = 0; i < extents; ++i)
    offsets[i] = i * workload.extent_size;
  std::mt19937 random(1); // the same order each time
  for (std::size_t i = 0; i < extents; i += workload.window) {
    const auto first = offsets.begin() + static_cast<std::ptrdiff_t>(i);
    std::shuffle(first, first + static_cast<std::ptrdiff_t>(workload.window), random);
  }
  return offsets;
}

/// Does `work(thread)` in this many threads at once; in this one when it is one.
template <typename Work>
void in_threads(std::size_t threads, const Work& work) {
  std::vector<std::jthread> others;
  for (std::size_t i = 1; i < threads; ++i)
    others.emplace_back(work, i);
  work(0);
}

std::string title(const std::string& what, std::size_t threads, std::size_t units) {
  return what + ", " + std::to_string(threads) + (threads == 1 ? " thread, " : " threads, ") +
         std::to_string(units) + " units";
}

constexpr std::size_t images[] = {1'000, 100'000};
constexpr std::size_t thread_counts[] = {1, 8};
constexpr std::size_t extents_per_batch = 4096;

} // namespace

TEST_CASE("absorb") {
  for (const std::size_t units : images) {
    Core core(units);
    for (const Workload& workload : workloads) {
      for (const std::size_t threads : thread_counts) {
        const std::size_t each = extents_per_batch / threads;
        const std::vector<std::uint64_t> offsets = layout(workload, each);
        const std::vector<std::byte> data(workload.extent_size, std::byte{1});
        // Each thread appends in a place of its own, as clients with an image each do.
        std::vector<std::uint64_t> ends(threads);
        for (std::size_t i = 0; i < threads; ++i)
          ends[i] = (units + 1) * unit + 1'000 + i * (disk_size / 16);
        batch = {extents_per_batch, extents_per_batch * workload.extent_size};
        BENCHMARK(title(std::string("absorb ") + workload.name, threads, units)) {
          in_threads(threads, [&](std::size_t thread) {
            for (const std::uint64_t offset : offsets)
              core.cache->write(core.storage, ends[thread] + offset, data, false);
            ends[thread] += each * workload.extent_size;
          });
        };
      }
    }
  }
}

TEST_CASE("read hit") {
  constexpr std::size_t read_size = 4096;
  constexpr std::size_t cached_units = 256;
  for (const std::size_t units : images) {
    Core core(units);
    // All but one byte, so that the units stay.
    const std::vector<std::byte> most(unit - 1, std::byte{1});
    for (std::size_t i = 0; i < cached_units; ++i)
      core.cache->write(core.storage, (units + i) * unit, most, false);
    for (const std::size_t threads : thread_counts) {
      batch = {extents_per_batch, extents_per_batch * read_size};
      BENCHMARK(title("read hit (4 096 bytes)", threads, units)) {
        in_threads(threads, [&](std::size_t thread) {
          std::vector<std::byte> data(read_size);
          for (std::size_t i = thread; i < extents_per_batch; i += threads)
            core.cache->read(core.storage, (units + i * 7 % cached_units) * unit + i % 1'000, data);
        });
      };
    }
  }
}

TEST_CASE("flush") {
  // As many as one flush of a tar's conversion has to write.
  constexpr std::size_t partial_units = 112;
  constexpr std::size_t extent_size = 700;
  const std::vector<std::byte> data(extent_size, std::byte{1});
  for (const std::size_t units : images) {
    for (const std::size_t threads : thread_counts) {
      Core core(units);
      std::uint64_t place = 0;
      batch = {partial_units * threads, partial_units * threads * extent_size};
      BENCHMARK(title("absorb into partial units and flush, per unit", threads, units)) {
        const std::uint64_t within = place++ * extent_size % (unit - 2 * extent_size) + 1;
        in_threads(threads, [&](std::size_t thread) {
          const std::uint64_t begin = (units + thread * partial_units) * unit + within;
          for (std::size_t i = 0; i < partial_units; ++i)
            core.cache->write(core.storage, begin + i * unit, data, false);
          core.cache->flush(core.storage);
        });
      };
    }
  }
}

namespace {

/// Appends so many extents of so many bytes, and does nothing else: for those who count
/// instructions.
void only_absorb(std::size_t extent_size, std::size_t extents) {
  Core core(0);
  const std::vector<std::byte> data(extent_size, std::byte{1});
  for (std::size_t i = 0; i < extents; ++i)
    core.cache->write(core.storage, unit + i * extent_size, data, false);
}

} // namespace

int main(int argc, char* argv[]) {
  if (argc == 4 && std::string(argv[1]) == "--only-absorb") {
    only_absorb(std::stoul(argv[2]), std::stoul(argv[3]));
    return 0;
  }
  // Catch2's own report is a screen for each benchmark; ours is a line.
  std::vector<const char*> options(argv, argv + argc);
  if (argc == 1) {
    for (const char* option :
         {"--reporter", "compact", "--benchmark-samples", "20", "--benchmark-resamples", "1000"})
      options.push_back(option);
  }
  return Catch::Session().run(static_cast<int>(options.size()), options.data());
}
