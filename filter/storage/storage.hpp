#pragma once

#include "reports/statistics.hpp"
#include "util/byte_ranges.hpp"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <system_error>

namespace qcowcache {

/// How storage takes "force unit access", a write that is durable when it is acknowledged.
enum class Fua {
  none,    ///< not at all
  emulate, ///< by a flush behind each request: worth it only on the last of several
  native,  ///< by itself
};

/// What storage said of itself when the connection was made; it does not change during one.
struct Capabilities {
  /// Bytes, a multiple of `minimum`.
  std::uint64_t size = 0;
  /// Block sizes in bytes. Powers of two but for `maximum`, which is a multiple of `minimum`.
  std::uint32_t minimum = 1;
  std::uint32_t preferred = 4096;
  std::uint32_t maximum = UINT32_MAX;
  /// Storage was asked for its block sizes and failed to tell: the three above are guesses.
  bool block_sizes_failed = false;
  bool can_write = false;
  bool can_flush = false;
  bool can_trim = false;
  bool can_zero = false;
  bool can_fast_zero = false;
  bool can_extents = false;
  bool can_cache = false;
  /// A flush on one connection covers what other connections were acknowledged.
  bool can_multi_conn = false;
  Fua fua = Fua::none;

  /// The multiple on which writes and fill-up reads begin and end: 4096 where that lies within the
  /// storage's limits.
  [[nodiscard]] std::uint64_t write_alignment() const noexcept;
  /// Storage that takes no more at once than it prefers, as object stores do, keeps blocks of that
  /// size as a whole, and rewrites one for anything less. Elsewhere the alignment.
  [[nodiscard]] std::uint64_t rewritten_block() const noexcept;
};

/// Whether storage has said that it is full: of one request it will most likely say so of the next.
[[nodiscard]] bool no_room(const std::error_code& error) noexcept;

/// The storage below, as one connection sees it. Requests larger than storage's maximum are split
/// here, on multiples of what it rewrites, so nobody else needs to know about maxima.
///
/// Every function throws std::system_error (generic category) with storage's own errno, EIO where
/// it gave none. Ranges lie within the size and begin and end on multiples of the minimum block
/// size. Thread safe where the thread model of what is below allows more than one request at a
/// time.
class Storage {
public:
  Storage() = default;
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;
  virtual ~Storage() = default;

  [[nodiscard]] virtual const Capabilities& capabilities() const noexcept = 0;

  /// Whether it belongs to a guest (see `WriteCache::admit`): no cache trusts it.
  [[nodiscard]] bool is_guest() const noexcept { return trusted_by() == nullptr; }
  /// The same for one cache: where another one trusts it, it has left this one, and may see another
  /// disk. What was never admitted anywhere is trusted everywhere.
  [[nodiscard]] bool is_guest_of(const void* cache) const noexcept {
    const void* const by = trusted_by();
    return by != cache && by != this;
  }
  /// nullptr: a guest. The mutex of the cache that begins, or ceases, to trust it is held.
  void set_trusted_by(const void* cache) noexcept {
    trusted_by_.store(cache, std::memory_order_release);
  }

  /// Requests are counted there from now on. REQUIRES: no other thread uses the storage yet.
  void count_in(std::shared_ptr<Counters> counters) noexcept { counters_ = std::move(counters); }

  void read(std::uint64_t offset, std::span<std::byte> data);
  /// With `fua`, `data` is durable on return; done by a flush where storage has no FUA.
  void write(std::uint64_t offset, std::span<const std::byte> data, bool fua);
  /// Does nothing where storage cannot flush.
  void flush();

  /// What a zero request may do, beside zeroing.
  struct ZeroOptions {
    bool may_trim = false;
    bool fua = false;
    /// Fail with ENOTSUP unless this is faster than writing. Nothing was done then if
    /// `pieces(range) == 1`.
    bool fast = false;
  };
  void zero(const ByteRange& range, const ZeroOptions& options);
  /// Zeros a hole, so that it has room, in one request where storage takes as much at once: a
  /// filesystem then keeps it in one piece. REQUIRES: it is known to do so without writing.
  void allocate(const ByteRange& range);
  void trim(const ByteRange& range, bool fua);
  void cache(const ByteRange& range);

  /// How many requests `zero` makes of `range`.
  [[nodiscard]] std::uint64_t pieces(const ByteRange& range) const noexcept;

  enum class ExtentType { data, hole, zero, hole_and_zero };
  struct Extent {
    ByteRange range;
    ExtentType type = ExtentType::data;
  };
  using Extents = boost::container::small_vector<Extent, 8>;
  /// The extents from `range.begin` on, without gaps, clipped to `range`; they cover at least one
  /// byte, not necessarily all. With `only_first` just the first is wanted. REQUIRES: can_extents.
  Extents extents(const ByteRange& range, bool only_first);

protected:
  virtual void do_read(std::uint64_t offset, std::span<std::byte> data) = 0;
  virtual void do_write(std::uint64_t offset, std::span<const std::byte> data, bool fua) = 0;
  virtual void do_flush() = 0;
  virtual void do_zero(const ByteRange& range, const ZeroOptions& options) = 0;
  virtual void do_trim(const ByteRange& range, bool fua) = 0;
  virtual void do_cache(const ByteRange& range) = 0;
  virtual Extents do_extents(const ByteRange& range, bool only_first) = 0;

private:
  /// Whether the piece that ends at `end` carries FUA when all of `range` has to be durable.
  [[nodiscard]] bool piece_needs_fua(bool fua, const ByteRange& range,
                                     std::uint64_t end) const noexcept;
  [[nodiscard]] const void* trusted_by() const noexcept {
    return trusted_by_.load(std::memory_order_acquire);
  }
  void count(Count what, std::uint64_t more = 1) const noexcept {
    if (counters_)
      counters_->add(what, more);
  }

  std::shared_ptr<Counters> counters_;
  std::atomic<const void*> trusted_by_ = this;
};

} // namespace qcowcache
