#pragma once

#include "cache/range_lock.hpp"
#include "cache/write_cache.hpp"
#include "memory/memory_budget.hpp"
#include "memory/writeback.hpp"
#include "reports/statistics.hpp"
#include "storage/handle.hpp"
#include "unclean_file.hpp"
#include "util/events.hpp"
#include "verify/verifier.hpp"

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace qcowcache {

/// One disk as its clients see it: who uses it, its cache, who checks what is written, and what the
/// background writers have to do for it. Lives while somebody uses it, or something is left for
/// whoever uses it next (`owes`).
///
/// A name does not tell disks apart: a file that was replaced is another one for whoever opens it
/// afterwards. So who joins an image that others use, or have left bytes in, is compared with it
/// first (`standing`): by what its own storage shows of what the others wrote.
///
/// Thread safe.
class Image : public std::enable_shared_from_this<Image> {
public:
  struct Settings {
    /// As in `WriteCache::Settings`.
    std::optional<std::uint64_t> cluster_size;
    std::uint64_t max_write = std::uint64_t{1024} * 1024;
    std::optional<std::chrono::milliseconds> expire;
    std::optional<std::chrono::milliseconds> max_delay = {};
    std::uint64_t reserve = 0;
    /// Where it is written down that the image holds something, which outlives the image; nullptr:
    /// nowhere.
    UncleanFile* unclean = nullptr;
    /// The background writers, which outlive the image; nullptr: requests write themselves.
    Writeback* writeback = nullptr;
    /// Tells the operator of bytes that were acknowledged and are lost. Must not throw.
    std::function<void(const std::string& export_name, const Unsaved& lost)> report_loss;
    /// Where caches count, which outlives the image; nullptr: each for itself.
    Statistics* statistics = nullptr;
    Events events{};
    /// Whether compressed clusters are checked, and how long a check waits for late data.
    bool verify = false;
    std::chrono::milliseconds patience{0};
    /// Tells the operator of a cluster that cannot be read. Must not throw.
    std::function<void(const std::string& export_name, const std::string& line)> report_damage = {};
    /// Those who decode compressed clusters in the background, which outlive the image, too: never
    /// the writers, who must not wait for a client's streams. nullptr: nobody does.
    Writeback* decoders = nullptr;
    /// Whether whoever sent the request that the calling thread serves is gone, or the server ends.
    std::function<bool()> interrupted = {};
    bool verify_everything = false;
    /// Whether a flush fails while compressed clusters cannot be read.
    bool damage_fails_flush = false;
    /// Called before a request is served that writes or flushes.
    std::function<void()> before_request = {};
    /// Tells the operator that a name stands for several disks. Must not throw.
    std::function<void(const std::string& export_name, const std::string& line)> report_disk = {};
    /// As `WriteCache::Settings::short_of_memory`. Must not throw.
    std::function<void(const std::string& export_name, std::uint64_t preferred,
                       std::uint64_t unit_size)>
        report_short_of_memory = {};
    /// As in `WriteCache::Settings`.
    std::chrono::milliseconds retry = WriteCache::Settings().retry;
    /// Who decodes compressed clusters, for all images.
    std::shared_ptr<DecompressorPool> decompressors = std::make_shared<DecompressorPool>();
    /// The verifiers' memory, for all images.
    std::shared_ptr<MemoryShare> verify_memory = Verifier::usual_memory();
    /// Whether any thread may use any connection's storage: not where that is guarded by locks
    /// which only the connection's own requests take.
    bool lend = true;
  };

  /// All but the name outlive the image.
  Image(std::string name, const Settings& settings, RangeLock& ranges, MemoryBudget& budget)
      : name_(std::move(name)), settings_(settings), ranges_(ranges), budget_(budget) {}

  /// Makes the cache, and lets the background writers know of it, which keep `owner` alive while
  /// they use the image. To be called once, before anything else. `capabilities` are those of the
  /// connection that it is for; `changed` is called as `WriteCache::Settings::changed_storage`;
  /// `alone` as in `WriteCache::Settings`. With `look_at_all` any of its clusters may be one that
  /// was found unreadable earlier.
  void begin(const Capabilities& capabilities, std::shared_ptr<const void> owner,
             std::function<void(const Image&, const ByteRange&)> changed, bool look_at_all,
             std::function<bool()> alone = {});
  /// The background writers hear nothing of it any more. REQUIRES: nobody uses it.
  void end();

  [[nodiscard]] WriteCache& cache() const noexcept { return *cache_; }
  /// nullptr: nobody checks what is written, or nobody uses the image, with whose last user it
  /// ends.
  /// What a request holds of it stays, though that is a guest's who uses another image by now.
  [[nodiscard]] std::shared_ptr<Verifier> verifier() const;

  /// What a connection is to the others that use an image.
  enum class Standing {
    /// It sees another disk.
    stranger,
    /// It may see the same disk; it reads, and what it writes goes through its own storage.
    guest,
    /// It sees the same disk.
    trusted,
    /// It may see the same disk, of which everything is on storage: it is to be trusted, and the
    /// others are guests from then on.
    founder,
  };
  /// What a request is going to do.
  struct Request {
    bool changes = false;
    /// Where, in bytes; a flush concerns everything.
    ByteRange range{0, UINT64_MAX};
  };
  /// Compares. Calls storage, that of others as well, which has to take a unit where there is
  /// nothing else to compare. Throws storage's error when it cannot be read.
  [[nodiscard]] Standing standing(Handle& newcomer, const Request& request) const;
  /// Whether a guest needs no comparison for it.
  [[nodiscard]] bool admits_guest(const Request& request) const {
    return cache_->admits_guest(request.changes, request.range);
  }

  /// A connection uses the image from now on, as a guest until `WriteCache::trust`.
  void join(const std::shared_ptr<Handle>& handle);
  /// It does no more. With the last one goes what was learned.
  void leave(const Handle& handle);
  [[nodiscard]] bool is_used() const;
  /// What an image may owe that nobody uses.
  enum class Debt {
    none,
    /// Compressed clusters that could not be read: the next verifier has to know of them.
    clusters,
    /// Bytes that storage refused.
    bytes,
  };
  [[nodiscard]] Debt owes() const;
  /// Whether other connections, which have not ended and are no guests, have changed something.
  [[nodiscard]] bool is_changed_by_others(const Handle& handle) const;

  /// Whose storage is to take a unit: the connection that last wrote to it, or, when it has ended,
  /// or storage refused the unit there, another that is trusted; nothing when there is none.
  [[nodiscard]] std::optional<Handle::Use> lend(const WriteCache::Next& next) const;

  /// Counts what is left as lost, and tells the operator. Returns whether there is something.
  bool report_lost() const;
  /// The same where clients may come back for it, to the same disk: they will be told.
  void report_lost_to_clients() const;

private:
  class Source;
  class Decoding;

  [[nodiscard]] std::optional<Handle::Use> lend_any(const Handle& but) const;
  [[nodiscard]] bool is_used_by(const Handle& handle) const;
  [[nodiscard]] bool is_used_by_others(const Handle& handle) const;
  [[nodiscard]] std::uint64_t largest_size() const;
  void follow_size();
  void begin_to_verify();
  void end_verifying();
  void give_up_record();

  const std::string name_;
  const Settings& settings_;
  RangeLock& ranges_;
  MemoryBudget& budget_;
  std::shared_ptr<WriteCache> cache_;
  /// Owned by the background writers.
  std::weak_ptr<Writeback::Source> source_;
  std::weak_ptr<Writeback::Source> decoding_;

  mutable std::mutex mutex_;
  std::vector<std::shared_ptr<Handle>> users_;
  std::shared_ptr<Verifier> verifier_;
  /// By the one before, for the next.
  Verifier::Left left_;
};

} // namespace qcowcache
