#pragma once

#include "cache/group_flush.hpp"
#include "cache/header_watch.hpp"
#include "cache/range_lock.hpp"
#include "cache/room.hpp"
#include "cache/savings.hpp"
#include "cache/unit.hpp"
#include "cache/witnesses.hpp"
#include "cache/write_line.hpp"
#include "cache/write_rate.hpp"
#include "cache/zero_map.hpp"
#include "memory/memory_budget.hpp"
#include "reports/loss_message.hpp"
#include "reports/statistics.hpp"
#include "storage/handle.hpp"
#include "storage/storage.hpp"
#include "util/byte_ranges.hpp"
#include "util/events.hpp"

#include <boost/container/small_vector.hpp>
#include <boost/intrusive/list.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <system_error>
#include <vector>

namespace qcowcache {

/// A write cache over one export: collects what clients write in units, and writes each unit once,
/// whole and aligned. The promises of the design are kept here.
///
/// Requests come from any number of threads at once. Each brings the `Storage` of its own
/// connection, and storage is only ever called through a Storage that a caller brought. The cache's
/// mutex is never held over a call into storage.
///
/// Errors are std::system_error with storage's own errno, and std::bad_alloc. A request that throws
/// has not been acknowledged; bytes acknowledged earlier are still there.
class WriteCache final : public MemoryBudget::Holder {
public:
  /// A unit that waits to be written.
  struct Next {
    /// The connection that last wrote to it.
    const void* writer = nullptr;
    ByteRange range;
    /// Where its dirty bytes end: a connection that writes it must see an export so large.
    std::uint64_t dirty_end = 0;
    bool was_refused = false;
  };

  struct Settings {
    /// Bytes, a power of two; nothing: look for a qcow2 header, and cache only where there is one.
    std::optional<std::uint64_t> cluster_size;
    /// Bytes; the largest write that several units are merged into.
    std::uint64_t max_write = std::uint64_t{1024} * 1024;
    /// A partial unit that nobody has written to for so long is left behind; nothing: never by
    /// time.
    std::optional<std::chrono::milliseconds> expire;
    /// Storage that refused a unit is left alone for so long; then one of the units that it refused
    /// is tried again, and each that it takes is followed by the next. Flushes do not wait for it.
    std::chrono::milliseconds retry = std::chrono::seconds(5);
    /// Who waits for room that others ask for, whose storage may hang, does so until that has taken
    /// so long.
    std::chrono::milliseconds patience = std::chrono::seconds(5);
    /// No more is held than storage writes in this time, by its measured rate; nothing: no such
    /// bound.
    std::optional<std::chrono::milliseconds> max_delay;
    /// Whether whoever sent the request that the calling thread serves is gone. What still waits
    /// then is dropped. Called with no mutex held. Nothing: never.
    std::function<bool()> interrupted;
    /// Called whenever a unit has been queued, with the number of those that wait, sometimes with
    /// the cache's mutex held, to wake those who call `write_next` in the background. Nothing: the
    /// request that queued it writes it.
    std::function<void(std::size_t waiting)> wake_writer;
    /// Whose storage is to take a unit, where that is not the caller's own: the connection that
    /// wrote it last, or another that is known to see the same disk; nothing when there is none.
    /// Called with no mutex held. Nothing: the caller's own storage takes all units.
    std::function<std::optional<Handle::Use>(const Next&)> lend;
    /// Called after storage was changed in a range, by the thread that still owns it, with no mutex
    /// held; other caches over the same storage must then `forget` it.
    std::function<void(const ByteRange&)> changed_storage;
    /// Room for what is held is reserved on storage in windows of this many bytes, before the first
    /// write to each is acknowledged; 0: never.
    std::uint64_t reserve = 0;
    /// Whether all connections to the export use this cache, or have ended: what others wrote
    /// through storage that does not say multi-conn may look like a hole. Called with no mutex
    /// held. Nothing: they do.
    std::function<bool()> alone;
    /// Called before anything is held, to write down for after a crash that this is so, and when a
    /// flush, or the end of a connection, has left nothing. Where `hold` returns false it could not
    /// be written down, and the write goes through. Called with no mutex held, from several threads
    /// at once: each `hold` that returned true is followed by one `release`, but for the last where
    /// the server ends before. Must not throw. Nothing: nobody writes it down.
    std::function<bool()> hold;
    std::function<void()> release;
    /// Called, with the cache's mutex held, when units are smaller than the blocks that storage
    /// prefers because there is too little memory for these. Nothing: nobody is told.
    std::function<void(std::uint64_t preferred, std::uint64_t unit_size)> short_of_memory;
    /// This cache's own; requests to storage are counted by `Storage`.
    std::shared_ptr<Counters> counters = std::make_shared<Counters>();
    Events events;
  };

  /// Units that are at least this large are worth a write on any storage.
  static constexpr std::uint64_t least_unit_size = std::uint64_t{64} * 1024;
  /// Storage may prefer blocks that are larger: units are not.
  static constexpr std::uint64_t largest_unit_size = std::uint64_t{32} * 1024 * 1024;
  /// Units are as large as storage's preferred block where memory holds so many, and so many for
  /// each export that is written to: some are being filled, of tables too, while others are being
  /// written.
  static constexpr std::size_t least_units = 8;
  static constexpr std::size_t least_units_each = 4;
  /// A partial unit that nobody has written to since this many later units were completed is left
  /// behind: qcow2's allocator has moved on. Measured with 64 backup workers: 0.04 % of appends
  /// come after 16 later units, none after 24.
  static constexpr std::uint64_t left_behind_after = 32;

  /// `capabilities` are those of the first connection. The lock and the budget outlive the cache.
  WriteCache(Settings settings, const Capabilities& capabilities, RangeLock& ranges,
             MemoryBudget& budget);
  WriteCache(const WriteCache&) = delete;
  WriteCache& operator=(const WriteCache&) = delete;
  ~WriteCache() override;

  // ---- What clients ask for. Ranges lie within the size of the connection's storage and are not
  // empty. Storage may have a minimum block size; requests need not keep to it.

  /// Acknowledged once every byte is in memory, or, with `fua` and where nothing can be cached, on
  /// storage. Waits for memory if it must.
  void write(Storage& storage, std::uint64_t offset, std::span<const std::byte> data, bool fua);
  void read(Storage& storage, std::uint64_t offset, std::span<std::byte> data);
  /// When it returns, every byte acknowledged before the call is on storage and storage is flushed.
  /// Throws storage's error otherwise; the bytes are then still in memory and the next flush tries
  /// again. Once storage has said that it has no room, units that it refused earlier are not tried
  /// in vain one after the other. Writes that arrive after the call do not delay it.
  void flush(Storage& storage);
  /// A fast zero that would take more than one request of storage throws ENOTSUP, changing nothing.
  void zero(Storage& storage, const ByteRange& range, const Storage::ZeroOptions& options);
  /// Ragged ends (parts of storage's smallest block) are left as they are.
  void trim(Storage& storage, const ByteRange& range, bool fua);
  /// As `Storage::extents`; bytes that only the cache has are data.
  Storage::Extents extents(Storage& storage, const ByteRange& range, bool only_first);

  // ---- Who uses the cache. A connection whose storage was never admitted is trusted.

  /// A connection begins to use the cache, as a guest: whether it sees the same disk as others is
  /// not known. What a guest writes goes through its own storage, and nobody else's bytes do.
  void admit(Storage& user);
  /// It is known to see the same disk.
  void trust(Storage& user);
  /// A user, trusted or not, who has ended, or uses another cache from now on.
  void leave(const Storage& user) noexcept;
  /// Where everything is on storage: from now on only `founder` is trusted, and what others taught
  /// the cache is forgotten. Returns whether it is so.
  [[nodiscard]] bool found_anew(const Storage& founder);
  /// Whether everything in `range` is on storage.
  [[nodiscard]] bool clean(const ByteRange& range) const;
  /// Whether a guest that changes, or reads, the range needs no more than its own storage: nothing
  /// is cached, and that is known; or it reads where everything is on storage.
  [[nodiscard]] bool admits_guest(bool changes, const ByteRange& range) const;
  /// It is known that nothing is cached, and everything is on storage.
  [[nodiscard]] bool passes_through() const;

  enum class Likeness {
    other_disk,   ///< `storage` does not have what the cache knows that its disk has
    unknown,      ///< there is nothing to compare
    begins_alike, ///< it has, but all that is known is how the disk begins
    alike,        ///< it has what was written last, which a copy of the disk would have as well
    same_disk,    ///< it has what was written through another connection after `opened`
  };
  /// Compares what the cache knows of its disk with what `storage`, which was opened at `opened`,
  /// has. Throws storage's error when it cannot be read.
  [[nodiscard]] Likeness compare(Storage& storage, Unit::Clock::time_point opened);
  /// Whether there is something to compare that was written after `opened`.
  [[nodiscard]] bool has_news(Unit::Clock::time_point opened) const;
  /// Has a unit, or a few, written through the connection that wrote it last, so that `compare`
  /// has something new to look at. Returns whether storage took one.
  bool store_some();
  /// Has a look at how the disk begins, so that there is something to compare, unless there is
  /// already. Where it cannot be read there is not.
  void look_at_disk(Storage& storage);

  // ---- The pieces that these are made of.

  /// Writes the unit that has waited longest, together with full ones beside it that wait too: to
  /// `storage`, or to whom `Settings::lend` names. Returns whether there was one that could be
  /// written. A unit that storage refuses stays, dirty and readable.
  bool write_next(Storage& storage);
  /// The same for who has no storage of his own. A unit that nobody can write now is treated as one
  /// that storage refused. REQUIRES: `Settings::lend`.
  void write_next();
  /// How many units wait to be written, and whether there is a window to be reserved.
  [[nodiscard]] std::size_t waiting() const;
  /// Queues what has been left behind by time, whatever the budget has become too small for, and,
  /// when it is time, one of the units that storage refused. To be called now and then where others
  /// write.
  void tick();

  /// Whether it is written down that something is held here, or was since the last flush.
  [[nodiscard]] bool recorded() const;
  /// What is left, if anything, is given up: nothing is held any more, and after a crash nobody has
  /// to know of it. Nobody uses the cache any more.
  void abandon() noexcept;
  /// Writes what this connection wrote before the call, and what nobody is left to write for,
  /// waiting for others who write some of it. Storage's errors do not end it, since this may be the
  /// last chance: but once storage has said that it has no room it is asked no more.
  /// Where it is written down that something was held here storage is flushed, too, so that this
  /// can be crossed out. Returns storage's first error.
  std::error_code drain(Storage& storage);
  /// Whether room may be reserved that nobody has written to, or is about to be.
  [[nodiscard]] bool may_have_reserved() const;
  /// It is given back. To be called when the last connection that writes ends. Throws storage's
  /// error when it does not tell what has been written.
  void give_back_room(Storage& storage);
  /// Whether storage has everything.
  [[nodiscard]] bool clean() const;
  /// Where it counts, for others who count the same cache's requests.
  [[nodiscard]] const std::shared_ptr<Counters>& counters() const noexcept {
    return settings_.counters;
  }
  /// What is in memory only, now.
  [[nodiscard]] Unsaved unsaved() const;

  /// Drops cached bytes in `range` without writing them. REQUIRES: the caller owns the range.
  void discard(const ByteRange& range);
  /// Another cache changed `range` on storage: drops what is known of it, keeps what is dirty.
  /// REQUIRES: the caller owns the range.
  void forget(const ByteRange& range);
  /// The other cache may be over the same disk: `compare` knows nothing of `range` any more.
  /// REQUIRES: as `forget`.
  void forget_witnesses(const ByteRange& range);
  /// The export is `size` bytes long from now on; where that ends a unit, it is full earlier.
  void set_size(std::uint64_t size);
  [[nodiscard]] std::uint64_t size() const;

  /// Finds out whether there is a qcow2 header and how large its clusters are, reading storage if
  /// it must. Never throws for a header that cannot be read: then nothing is cached, the next
  /// requests try again, and after a few failures only once a client has read or written it.
  void learn_layout(Storage& storage);
  /// Whether all bytes where a header would be are known, and the header that they are, if any.
  struct KnownHeader {
    bool known = false;
    std::optional<qcow2::Header> header;
  };
  [[nodiscard]] KnownHeader header() const;
  /// Drops everything but unsaved bytes: the next connection finds storage as it is.
  void forget_all();

  /// Bytes per unit: the grouping of this moment.
  [[nodiscard]] std::uint64_t unit_size() const;
  /// Whether writes are being cached.
  [[nodiscard]] bool caching() const;

  std::size_t release_clean(std::size_t bytes) override;
  [[nodiscard]] bool writing() const override;
  [[nodiscard]] std::optional<Clock::time_point> oldest() const override;
  void queue_oldest() override;

private:
  using Lock = std::unique_lock<std::mutex>;
  using Units = std::map<std::uint64_t, Unit>;
  using UseOrder =
      boost::intrusive::list<Unit, boost::intrusive::member_hook<Unit, Unit::ListHook, &Unit::hook>,
                             boost::intrusive::constant_time_size<false>>;
  using Queue =
      boost::intrusive::list<Unit,
                             boost::intrusive::member_hook<Unit, Unit::ListHook, &Unit::queue_hook>,
                             boost::intrusive::constant_time_size<false>>;
  /// Where a unit begins, of each that a flush has to see to.
  using Begins = std::vector<std::uint64_t>;
  /// Units side by side that one thread has claimed.
  using Job = boost::container::small_vector<Unit*, 16>;
  class Asking;
  class Claim;
  class InLine;
  struct Segment;
  using Segments = std::vector<Segment>;

  // Functions that take a Lock need it held, and return with it held.
  [[nodiscard]] Units::iterator first_overlapping(const Lock&, const ByteRange& range);
  template <typename Function>
  void for_each_unit(const Lock& lock, const ByteRange& range, Function function);
  [[nodiscard]] bool caching(const Lock&) const;
  [[nodiscard]] std::size_t waiting(const Lock&) const;
  [[nodiscard]] std::size_t most_fragments() const noexcept;
  [[nodiscard]] std::size_t bookkeeping() const noexcept;
  [[nodiscard]] std::shared_ptr<Unit::Buffer> take_buffer(const Lock&, const ByteRange& but);
  Unit& add_unit(const Lock&, std::uint64_t begin, std::shared_ptr<Unit::Buffer>&& buffer);
  void place(const Lock&, Unit& unit) noexcept;
  [[nodiscard]] bool all_stored(const Lock&) const noexcept;
  /// Calls `function`, which must not move the unit, for each that has something storage lacks.
  template <typename Function>
  void for_each_unclean(const Lock&, Function function) {
    for (UseOrder* const list : {&filling_, &busy_, &refused_})
      std::ranges::for_each(*list, function);
  }
  bool join_queue(const Lock& lock, Unit& unit, Unit::Reason reason) noexcept;
  void enqueue(const Lock& lock, Unit& unit, Unit::Reason reason);
  void settle(const Lock& lock, Unit& unit);
  void count_unclean(const Lock&, Unit& unit, bool unclean) noexcept;
  [[nodiscard]] bool beyond_share(const Lock&) const;
  [[nodiscard]] bool beyond_delay(const Lock&) const;
  void shrink(const Lock& lock);
  void queue_left_behind(const Lock& lock, Unit::Clock::time_point now);
  [[nodiscard]] bool may_retry(const Lock&, Unit::Clock::time_point now) const;
  [[nodiscard]] bool due() const;
  void queue_one_refused(const Lock& lock);
  void queue_filling(const Lock& lock, Unit::Reason reason);
  void forget_learned(const Lock& lock);
  [[nodiscard]] bool passes_through(const Lock& lock) const;
  [[nodiscard]] bool clean(const Lock& lock, const ByteRange& range) const;
  void drop_clean(const Lock& lock);
  void drop(const Lock&, Unit& unit);
  [[nodiscard]] std::uint64_t unit_size_for(std::uint64_t cluster_size) const noexcept;
  [[nodiscard]] std::uint64_t affordable_block() const;
  void share_memory(const Lock& lock, bool shares);
  void follow_memory(const Lock& lock);
  void relayout(const Lock& lock);
  void keep_header(const Lock& lock, std::span<const std::byte> data) noexcept;
  void header_can_be_read();
  [[nodiscard]] bool holds_back() const;
  void header_changed(const Lock& lock, const ByteRange& range);
  [[nodiscard]] Job claim(const Lock& lock, Unit& unit, const Storage& storage);
  [[nodiscard]] std::uint64_t largest_merged(const Storage& storage) const noexcept;
  [[nodiscard]] bool within_reach(const Lock&, const Unit& unit, const Storage& storage) const;
  [[nodiscard]] bool is_guest(const Storage& storage) const noexcept {
    return storage.is_guest_of(this);
  }

  void write_out(Storage& storage, const Job& job);
  void write_claimed(Storage& storage, const Job& job, std::optional<RangeLock::Owned>& owned);
  [[nodiscard]] bool has_gaps(const Job& job, const ByteRange& within) const;
  [[nodiscard]] Segments start(Storage& storage, const Job& job, std::uint64_t& spared);
  void fill_up(Storage& storage, Segment& segment);
  std::size_t write_segments(Storage& storage, const Segments& segments) const;
  void owe_again(const Segments& segments);
  void finish(const Job& job, bool stored, const std::error_code& refusal) noexcept;
  void forget(const Lock& lock, const ByteRange& range);
  void changed_by_guest(const Lock& lock, const ByteRange& range);
  void discard(const Lock& lock, const ByteRange& range);
  void changed_on_storage(const ByteRange& range);
  void failed_on_storage(const ByteRange& range);
  void copy_cached(const Lock& lock, std::uint64_t offset, std::span<std::byte> data,
                   ByteRanges& gaps);

  void take(InLine& place, Storage& storage, std::uint64_t offset, std::span<const std::byte> data,
            bool fua, const ByteRange* request);
  /// What became of a write that `absorb` was given. Only `held` has changed anything.
  enum class Absorbed {
    /// Every byte is in memory and will be returned by reads: the write may be acknowledged.
    held,
    /// This cache takes nothing (no qcow2 header, caching switched off): it has to go through.
    off,
    /// The budget has no room for another unit: make room, or let the write go through.
    no_memory,
    /// A unit in the range has to be written before it can take more, and it is waiting for that or
    /// being written now (see `Unit::pinned` and `Unit::fragments`): wait, then try again.
    unit_busy,
    /// Somebody who came before has to be answered first: wait, then try again.
    behind_others,
    /// There would be memory, but storage has enough to do, and lately what was held spared it no
    /// request: let the write go through.
    no_gain,
    /// Storage has refused something that was held: nothing is taken on trust until it has that.
    no_trust,
    /// Nobody has written down yet that something is held here: that first.
    unrecorded,
    /// Nobody knows yet whether storage has room for it: reserve some first.
    unreserved,
  };
  struct Taken {
    Absorbed absorbed = Absorbed::off;
    /// How many units wait to be written, where one was completed; or else 0.
    std::size_t to_wake_for = 0;
  };
  /// Copies a write into its units, all of it or nothing. Once storage has refused a unit nothing
  /// is taken any more until it has all that it refused. Never calls storage, never waits. A unit
  /// that becomes full is queued. `writer`, who stands at `place` in the line, is remembered as the
  /// one who wrote to the units. The lock is given up when the bytes are held, and only then;
  /// writers are not called. `request`, if any, is a client's write that begins with this one: it
  /// is counted. `refreshed`, if not empty, is the buffer of `data`: bytes that are in memory are
  /// copied there first, so that only the others change.
  Taken absorb(Lock& lock, WriteLine::Place place, const Storage& writer, std::uint64_t offset,
               std::span<const std::byte> data, const ByteRange* request,
               std::span<std::byte> refreshed);
  void wake(std::size_t waiting) const;
  [[nodiscard]] bool record();
  void flush_storage(Storage& storage, bool may_share);
  [[nodiscard]] bool all_flushed(const Lock& lock) const;
  [[nodiscard]] bool has_room(const Lock&, const Storage& storage,
                              const ByteRange& unit) const noexcept;
  [[nodiscard]] bool begins_without_room(const Storage& storage, std::uint64_t offset,
                                         std::span<const std::byte> data) const;
  void asks_for_room(const Lock&) noexcept;
  [[nodiscard]] bool reserve(Storage& storage, const ByteRange& unit);
  [[nodiscard]] bool reserve_in_turn(Storage& storage, const ByteRange& unit);
  [[nodiscard]] bool ask_for_room(Storage& storage, const ByteRange& unit, std::uint64_t forgotten);
  void allocate_proven(Storage& storage, ByteRanges holes, std::uint64_t unit,
                       std::uint64_t forgotten);
  void give_back_room(Storage& storage, const ByteRange& piece, std::uint64_t forgotten);
  [[nodiscard]] bool still_sees(const Lock&, const Storage& storage,
                                std::uint64_t forgotten) const noexcept;
  [[nodiscard]] ByteRanges owed_in(const Lock& lock, const ByteRange& range);
  [[nodiscard]] bool reserve_ahead() noexcept;
  void lose_room(const Lock& lock, const ByteRange& range) noexcept;
  [[nodiscard]] bool passes_as_it_came(const Storage& storage, const ByteRange& range) const;
  /// Writes to storage now, and returns its answer. Waits for those who asked for some of these
  /// bytes before. Owns the range meanwhile; blocks that the write covers only in part are filled
  /// up. Cached bytes in the range are replaced once storage has them.
  void write_through(InLine& place, Storage& storage, std::uint64_t offset,
                     std::span<const std::byte> data, bool fua);
  void wait_turn(InLine& place, const ByteRange& range);
  void stay_connected() const;
  [[nodiscard]] std::size_t enough_unclean(const Lock&) const;
  [[nodiscard]] bool holds_in_vain(const Lock& lock) const;
  void keep_writers_busy(const Lock& lock);
  void learn_zeros(Storage& storage, const ByteRange& range);
  [[nodiscard]] bool absorb_around(const Storage& writer, const ByteRange& blocks,
                                   const ByteRange& range, std::span<std::byte> whole) noexcept;
  void write_piece_through(Storage& storage, std::uint64_t offset, std::span<const std::byte> data,
                           const ByteRange& blocks, bool fua);
  bool make_room(Storage& storage, InLine& place);
  bool write_oldest(Storage& storage);
  void refuse(const Lock& lock, Unit& unit) noexcept;
  void trust_again(const Lock& lock) noexcept;
  void note_progress(const Lock&) noexcept;
  void give_up(const Lock& lock, std::uint64_t begin) noexcept;
  void give_up_queue(const Lock& lock) noexcept;
  void leave_queue(const Lock&, Unit& unit, Unit::Turn turn) noexcept;
  bool write_busy_units(Storage& storage, const ByteRange& range);

  /// What became of an attempt to write a unit.
  enum class Attempt {
    stored,
    refused,
    nobody, ///< there is no connection whose storage could take it
    gone,   ///< somebody else writes it, or has
  };
  Attempt write_unit(Lock& lock, std::uint64_t begin, Storage* own, Unit::Reason reason,
                     std::uint64_t attempt = 0, std::error_code* refusal = nullptr);
  [[nodiscard]] std::optional<Handle::Use> borrow(Lock& lock, const Unit& unit) const;
  [[nodiscard]] Unit* find(const Lock&, std::uint64_t begin);
  [[nodiscard]] static Next describe(const Lock&, const Unit& unit);
  [[nodiscard]] bool wrote(const Lock&, const Storage& storage, const Unit& unit) const;
  std::error_code write_owed(Storage& storage, Unit::Reason reason);

  void count_write(const Lock&, const ByteRange& request) noexcept;
  void count_fill_up(const ByteRange& range);
  void count_written(const Lock&, const Unit& unit) noexcept;
  void tell_layout(const Lock& lock);
  [[nodiscard]] bool header_wanted(const Lock&) const noexcept;
  void tell_refusal(const ByteRange& range, const std::exception& refusal);
  void tell_written(const Lock&, Unit::Reason reason);

  const Settings settings_;
  /// Of the first connection's storage: the block that it prefers, as far as a unit may be so
  /// large, and the one that it completes for each write with ragged ends.
  const std::uint64_t preferred_;
  const std::uint64_t completed_block_;
  RangeLock& ranges_;
  MemoryBudget& budget_;
  MemoryBudget::Account account_;

  mutable std::mutex mutex_;
  /// A unit's turn ended, or its dirty bytes went another way; and how often that was.
  std::condition_variable progress_;
  std::uint64_t progressed_ = 0;
  Units units_;
  /// Each unit is in one of these, longest unused first: those that clients fill, those that are
  /// queued or claimed, those that storage refused (all three lack something on storage), and the
  /// others.
  UseOrder filling_;
  UseOrder busy_;
  UseOrder refused_;
  UseOrder clean_;
  /// Units that wait to be written, longest first.
  Queue queue_;
  std::size_t queued_ = 0;
  std::size_t queued_partial_ = 0;
  std::size_t claimed_ = 0;
  /// How many writes of units are under way.
  std::size_t jobs_ = 0;
  /// Units that have something which storage lacks.
  std::size_t unclean_units_ = 0;
  WriteLine line_;
  std::condition_variable line_moved_;
  Savings savings_;
  WriteRate rate_;
  ZeroMap zero_map_;
  Room room_;
  /// Somebody asks storage for room now.
  bool asks_for_room_ = false;
  Room::Clock::time_point asks_since_;
  std::condition_variable room_answered_;
  /// The unit for whose window a background writer is to ask.
  std::optional<ByteRange> next_to_reserve_;
  HeaderWatch header_;
  std::uint64_t size_;
  /// As much of `preferred_` as there was memory for when that was last looked at.
  std::uint64_t affordable_;
  /// Whether clients write, and memory is shared with them; and what they had changed when that was
  /// last looked at.
  bool shares_ = false;
  std::uint64_t shared_at_ = 0;
  /// Changed under the mutex, read without it by who only wants to know where to cut a request.
  std::atomic<std::uint64_t> unit_size_;
  std::uint64_t wanted_unit_size_;
  bool has_layout_ = false;
  /// The same, by who only wants to know whether there is anything to do.
  std::atomic<bool> layout_was_read_ = false;
  /// How often in a row the header could not be read.
  unsigned header_unread_ = 0;
  /// How often everything that was learned has been forgotten.
  std::uint64_t forgotten_ = 0;
  /// When storage last refused something, or one of those units was queued again; nothing when none
  /// is left.
  std::optional<Unit::Clock::time_point> refused_at_;
  /// What storage said when it last refused a unit.
  std::error_code last_refusal_;
  /// Storage has said that it has no room: it is not asked for one unit after the other.
  bool no_room_ = false;
  /// Storage has refused something that is held: what clients write goes through.
  bool no_trust_ = false;
  /// Who was admitted, and has not left.
  std::vector<Storage*> users_;
  /// Of those who are trusted together: another one with each founder.
  std::shared_ptr<GroupFlush> flushes_ = std::make_shared<GroupFlush>();
  Witnesses witnesses_;
  /// How often a flush, or the end of a connection, has asked for units to be written.
  std::uint64_t attempts_ = 0;
  /// Grows with each write; tells which bytes a flush has to wait for.
  std::uint64_t moment_ = 0;
  /// What was changed until then is on storage, and storage has been flushed.
  std::uint64_t flushed_ = 0;
  /// When something was held last, and whether that is written down for after a crash.
  std::uint64_t last_held_ = 0;
  bool recorded_ = false;
  std::uint64_t units_completed_ = 0;
  /// What listeners to decisions were last told.
  struct Told {
    bool has_layout = false;
    bool header_unread = false;
    bool caching = false;
    std::uint64_t unit_size = 0;
    bool operator==(const Told&) const = default;
  };
  std::optional<Told> told_;
  Totals told_written_ = settings_.counters->totals();
  bool told_refusal_ = false;
};

} // namespace qcowcache
