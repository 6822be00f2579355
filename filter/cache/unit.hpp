#pragma once

#include "memory/memory_budget.hpp"
#include "util/byte_ranges.hpp"

#include <boost/intrusive/list.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace qcowcache {

/// One aligned piece of the file in memory: its bytes, and what is to be said of each.
///
/// - dirty: acknowledged to a client, storage does not have it, nobody is writing it;
/// - in flight: the same, but it is being written at this moment;
/// - known: the buffer holds what the export has there; dirty and in flight bytes are;
/// - written: a client wrote it since the unit was new, or was last written out full.
///
/// While bytes are in flight the buffer belongs to whoever writes them and does not change. A
/// client that writes to the unit meanwhile gets a second buffer first (`replace_buffer`); that
/// keeps clients from waiting for storage, and costs a copy only when it happens.
///
/// All offsets are those of the export. Not thread safe: guarded by the cache's mutex, but for the
/// buffer of bytes in flight, which may be read without it.
class Unit {
public:
  using Buffer = MemoryBudget::Buffer;
  using Clock = std::chrono::steady_clock;
  /// For the lists that the unit stands in: one by its use, and one of those that wait for a
  /// writer.
  using ListHook = boost::intrusive::list_member_hook<
      boost::intrusive::link_mode<boost::intrusive::auto_unlink>>;

  /// Who is going to write the unit.
  enum class Turn {
    none,    ///< nobody yet
    queued,  ///< it waits for a writer
    claimed, ///< a writer has it; only that writer may start writing
  };

  /// Why the unit is to be written, should clients not have filled it.
  enum class Reason {
    flush,       ///< a client's flush
    disconnect,  ///< a connection that ends
    expiry,      ///< nobody has written to it for some time
    memory,      ///< memory is needed elsewhere, or there is to be less of it
    cluster_end, ///< its writer has moved on
    many_pieces, ///< its bookkeeping is full, or its buffer is needed
    new_layout,  ///< the image has other clusters now, or is gone
    comparison,  ///< a new connection is to show that it sees the same disk
  };

  /// `buffer` is as large as `range`. A unit with `most_fragments` ranges in one of its sets has to
  /// be written before it takes more; so bookkeeping stays small.
  Unit(const ByteRange& range, std::shared_ptr<Buffer> buffer, std::size_t most_fragments) noexcept
      : range_(range), buffer_(std::move(buffer)), most_fragments_(most_fragments) {}

  [[nodiscard]] const ByteRange& range() const noexcept { return range_; }
  [[nodiscard]] const ByteRanges& dirty() const noexcept { return dirty_; }
  [[nodiscard]] const ByteRanges& in_flight() const noexcept { return in_flight_; }
  [[nodiscard]] const ByteRanges& known() const noexcept { return known_; }
  [[nodiscard]] std::span<const std::byte> bytes(const ByteRange& part) const noexcept;
  [[nodiscard]] const std::shared_ptr<Buffer>& buffer() const noexcept { return buffer_; }

  /// Storage has all that clients wrote.
  [[nodiscard]] bool clean() const noexcept { return dirty_.empty() && in_flight_.empty(); }
  /// Clients wrote every byte up to `size`, the end of the export.
  [[nodiscard]] bool full(std::uint64_t size) const noexcept;
  /// The buffer is being written and must be replaced before a client may change it.
  [[nodiscard]] bool pinned() const noexcept { return pinned_; }
  /// One of the sets has as many ranges as are allowed.
  [[nodiscard]] bool fragmented() const noexcept;
  /// Whether bytes acknowledged at or before the moment `moment` are not on storage yet.
  [[nodiscard]] bool owes(std::uint64_t moment) const noexcept;

  /// A client wrote `data` at `offset`, inside the unit, at the moment `moment` (which grows with
  /// each write). REQUIRES: not pinned. Leaves the unit as it was when it throws std::bad_alloc.
  void absorb(std::uint64_t offset, std::span<const std::byte> data, std::uint64_t moment);
  /// Storage has `data` at `offset`, inside the unit, since a client's write went through.
  /// REQUIRES: nothing in flight. In a fragmented unit dirty bytes stay dirty, with the new value,
  /// unless no others remain.
  void wrote_through(std::uint64_t offset, std::span<const std::byte> data);
  /// The same for zeros in the part of `range` inside the unit; they do not count as written.
  void zeroed(const ByteRange& range);
  /// Nobody wants the bytes in `range` any more. REQUIRES: nothing in flight.
  void discard(const ByteRange& range);
  /// Storage was changed in `range` by others: what is known goes, but for what it lacks.
  void forget(const ByteRange& range);

  /// A clean unit forgets everything.
  void forget_clean() noexcept {
    known_.clear();
    written_.clear();
  }

  /// Storage has `data` at `offset`, read while the range was owned. Bytes that are known already
  /// stay as they are. `snapshot` is the buffer in flight, which gets the bytes as well, or
  /// nullptr.
  void learn(std::uint64_t offset, std::span<const std::byte> data, Buffer* snapshot);
  /// The same for zeros.
  void learn_zeros(const ByteRange& range);

  /// Gives the unit a buffer of its own while the old one is in flight.
  void replace_buffer(std::shared_ptr<Buffer> fresh) noexcept;

  /// Dirty bytes inside `below` are in flight from now on; the buffer is pinned. Unchanged when it
  /// throws std::bad_alloc.
  void start_writing(const ByteRange& below);
  /// Ends what `start_writing` began: storage has the bytes, or they are dirty again.
  void stored() noexcept;
  void refused() noexcept;
  /// All of `range` is in flight, not only what clients wrote. REQUIRES: it is known, lies inside
  /// the unit, and has something in flight in it; so nothing is allocated.
  void owe_in_flight(const ByteRange& range) { in_flight_.add(range); }
  /// A new round of being filled begins: no byte counts as written by a client any more.
  void begin_anew() noexcept { written_.clear(); }

  Turn turn = Turn::none;
  Reason reason = Reason::flush;
  /// When it was last written to storage, clients had written all of it, and nothing since.
  bool written_whole = false;
  /// When the write that is going on, or was last, began, clients had written all of it.
  bool started_whole = false;
  /// When it last came to wait for a writer, clients had written all of it.
  bool queued_whole = false;
  /// It counts as unclean in the cache's books.
  bool counted = false;
  /// Storage refused it; it is not tried again but for a reason (a flush, the end of a connection,
  /// time).
  bool was_refused = false;
  /// When a client last wrote to it, or storage last refused it, and how many units had been
  /// completed by then.
  Clock::time_point touched;
  std::uint64_t completed_before = 0;
  /// The connection that last wrote to it; never dereferenced.
  const void* last_writer = nullptr;
  /// Storage has room for all of it, or nobody can tell.
  bool has_room = false;
  /// Bytes of others are among those that storage lacks.
  bool several_writers = false;
  /// How many requests storage would have had if what clients wrote had gone through, since the
  /// unit was last written.
  std::uint32_t spared = 0;
  /// The flush, or the end of a connection, that last tried in vain to write it, by its number.
  std::uint64_t tried_in = 0;
  ListHook hook;
  ListHook queue_hook;

private:
  [[nodiscard]] std::byte* at(std::uint64_t offset) const noexcept {
    return buffer_->bytes().data() + (offset - range_.begin);
  }

  ByteRange range_;
  std::shared_ptr<Buffer> buffer_;
  std::size_t most_fragments_;
  ByteRanges dirty_;
  ByteRanges in_flight_;
  ByteRanges known_;
  ByteRanges written_;
  /// The moments of the oldest byte in the two sets, as long as they are not empty.
  std::uint64_t dirty_since_ = 0;
  std::uint64_t in_flight_since_ = 0;
  bool pinned_ = false;
};

} // namespace qcowcache
