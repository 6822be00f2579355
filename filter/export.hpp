#pragma once

#include "events.hpp"
#include "handle.hpp"
#include "memory_budget.hpp"
#include "range_lock.hpp"
#include "statistics.hpp"
#include "verifier.hpp"
#include "write_cache.hpp"
#include "writeback.hpp"

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace qcowcache {

/// One export name: who is connected to it, who owns which of its bytes, and its caches.
///
/// Connections to storage that says multi-conn share one cache. Others may see another disk under
/// the same name each, so each has a cache of its own; but since they may as well see the same
/// disk, the range lock is common to all, and what one changes the others forget.
///
/// Thread safe.
class Export : public std::enable_shared_from_this<Export> {
public:
  struct Settings {
    /// As in `WriteCache::Settings`.
    std::optional<std::uint64_t> cluster_size;
    std::uint64_t max_write = std::uint64_t{1024} * 1024;
    std::optional<std::chrono::milliseconds> expire;
    /// The background writers, which outlive the export; nullptr: requests write themselves.
    Writeback* writeback = nullptr;
    /// Tells the operator of bytes that were acknowledged and are lost. Must not throw.
    std::function<void(const std::string& export_name, const Unsaved& lost)> report_loss;
    /// Where caches count, which outlives the export; nullptr: each for itself.
    Statistics* statistics = nullptr;
    Events events{};
    /// Whether compressed clusters are checked, and how long a check waits for late data.
    bool verify = false;
    std::chrono::milliseconds patience{0};
    /// Tells the operator of a cluster that cannot be read. Must not throw.
    std::function<void(const std::string& export_name, const std::string& line)> report_damage = {};
    /// Those who decode compressed clusters in the background, which outlive the export, too: never
    /// the writers, who must not wait for a client's streams. nullptr: nobody does.
    Writeback* decoders = nullptr;
    /// As in `Verifier::Settings`.
    std::function<bool()> interrupted = {};
    bool verify_everything = false;
    /// As in `WriteCache::Settings`.
    std::chrono::milliseconds retry = WriteCache::Settings().retry;
    /// Who decodes compressed clusters, for all exports.
    std::shared_ptr<DecompressorPool> decompressors = std::make_shared<DecompressorPool>();
    /// The verifiers' memory, for all exports.
    std::shared_ptr<MemoryShare> verify_memory = Verifier::usual_memory();
  };

  /// The budget outlives the export. `left` is what is known of its clusters from earlier.
  Export(std::string name, Settings settings, MemoryBudget& budget, Verifier::Left left = {})
      : name_(std::move(name)), settings_(std::move(settings)), budget_(budget),
        left_(std::move(left)) {}

  /// A connection begins; returns its cache.
  std::shared_ptr<WriteCache> attach(const std::shared_ptr<Handle>& handle);
  /// Who checks what is written through the cache; nullptr: nobody.
  [[nodiscard]] std::shared_ptr<Verifier> verifier_of(const WriteCache* cache);
  /// It ends. With the last connection of a cache goes what the cache has learned; bytes that
  /// storage refused stay for the next connection where the cache is shared, for an export of the
  /// same size, and are reported lost where it is not. REQUIRES: the handle is retired.
  void detach(const std::shared_ptr<Handle>& handle, const std::shared_ptr<WriteCache>& cache);

  /// A connection whose storage can take the unit that `cache` wants written: the one that last
  /// wrote to it, or another when storage refused it there; nothing when there is none.
  std::optional<Handle::Use> borrow(const WriteCache& cache, const WriteCache::Next& next) const;

  /// What an export is needed for.
  enum class Need {
    /// Somebody is connected, or bytes are left that storage refused.
    use,
    /// Clusters are left that cannot be read, and nothing else is.
    failures,
    none,
  };
  [[nodiscard]] Need need() const;
  /// Reports all that is left as lost: the server ends.
  void report_left() const;

private:
  struct Member {
    std::shared_ptr<Handle> handle;
    std::shared_ptr<WriteCache> cache;
  };
  struct Entry {
    std::shared_ptr<WriteCache> cache;
    /// Owned by the background writers.
    std::weak_ptr<Writeback::Source> source;
    std::shared_ptr<Verifier> verifier;
    std::weak_ptr<Writeback::Source> decoding;
  };
  class Source;
  class Decoding;

  [[nodiscard]] std::vector<Entry>::iterator entry_of(const WriteCache* cache);
  void follow_size();
  std::shared_ptr<WriteCache> make_cache(const Capabilities& capabilities);
  void report_lost(const WriteCache& cache) const;
  void add_verifier(Entry& entry, const Capabilities& capabilities);
  void remove_verifier(Entry& entry);
  void remove(const WriteCache* removed);
  void changed_storage(const WriteCache* by, const ByteRange& range) const;
  /// The size that the largest connection sees which shares the cache; nothing when there is none.
  [[nodiscard]] std::optional<std::uint64_t> shared_size() const;

  const std::string name_;
  const Settings settings_;
  MemoryBudget& budget_;
  RangeLock ranges_;

  mutable std::mutex mutex_;
  std::vector<Member> members_;
  std::vector<Entry> caches_;
  std::shared_ptr<WriteCache> shared_cache_;
  /// What could not be read when the last connection of the shared cache ended.
  Verifier::Left left_;
};

/// All exports that somebody is connected to, or that have bytes left, or clusters that cannot be
/// read.
///
/// Clients choose names: so no more than 64 are kept for such clusters only. When there would be
/// more the operator is told, and from then on all clusters of an export are looked at when it
/// is opened anew.
///
/// Thread safe.
class Exports {
public:
  Exports(Export::Settings settings, MemoryBudget& budget)
      : settings_(std::move(settings)), budget_(budget) {}

  struct Membership {
    std::shared_ptr<Export> of;
    std::shared_ptr<WriteCache> cache;
    std::shared_ptr<Verifier> verifier;
  };
  Membership attach(const std::string& name, const std::shared_ptr<Handle>& handle);
  void detach(const Membership& membership, const std::shared_ptr<Handle>& handle);
  void report_left() const;

private:
  /// Whether no more exports than allowed are kept for their failures.
  [[nodiscard]] bool may_keep_failures() const;

  const Export::Settings settings_;
  MemoryBudget& budget_;
  /// Held while somebody attaches or detaches, so that no export is dropped between being found and
  /// being used: two exports of one name would not know of each other's ranges.
  mutable std::mutex mutex_;
  std::map<std::string, std::shared_ptr<Export>> exports_;
  /// An export is gone whose clusters could not all be read, and nobody knows which one it was.
  bool forgotten_ = false;
};

} // namespace qcowcache
