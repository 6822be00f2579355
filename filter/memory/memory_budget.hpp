#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

namespace qcowcache {

/// How much memory all caches of the server may use together, and the page-aligned buffers that are
/// handed out of it.
///
/// Buffers that come back are kept for the next taker: a fresh buffer costs page faults. Kept ones
/// count towards the limit, so that the process stays within it whatever the order of sizes.
///
/// Thread safe. A leaf: never calls out while it holds its mutex, so it may be called under a
/// cache's.
class MemoryBudget {
public:
  /// Buffers begin at a multiple of this, in bytes, and their sizes are.
  static constexpr std::size_t page_size = 4096;

  using Clock = std::chrono::steady_clock;

  /// `size` bytes that begin on a page; what it was charged goes back to the budget on destruction.
  /// Must not outlive its MemoryBudget.
  class Buffer {
  public:
    Buffer(Buffer&& other) noexcept;
    Buffer& operator=(Buffer&&) = delete;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer();

    [[nodiscard]] std::span<std::byte> bytes() const noexcept { return {memory_.get(), size_}; }

  private:
    friend class MemoryBudget;
    struct Release {
      void operator()(std::byte* memory) const noexcept;
    };
    using Memory = std::unique_ptr<std::byte[], Release>;

    Buffer(MemoryBudget& budget, Memory memory, std::size_t size, std::size_t extra) noexcept
        : budget_(&budget), memory_(std::move(memory)), size_(size), extra_(extra) {}

    MemoryBudget* budget_;
    Memory memory_;
    std::size_t size_;
    std::size_t extra_;
  };

  /// Somebody who holds memory and can give it back. Thread safe; called without any mutex held.
  class Holder {
  public:
    using Clock = MemoryBudget::Clock;

    Holder() = default;
    Holder(const Holder&) = delete;
    Holder& operator=(const Holder&) = delete;
    virtual ~Holder() = default;

    /// Gives back up to about `bytes` bytes of clean data, longest unused first. Returns how many.
    virtual std::size_t release_clean(std::size_t bytes) = 0;
    /// Whether something is being written, or waits to be, in the background.
    [[nodiscard]] virtual bool writing() const = 0;
    /// When the data that `queue_oldest` would take was last used; nothing when it would take none.
    [[nodiscard]] virtual std::optional<Clock::time_point> oldest() const = 0;
    /// Has the data that has been unused longest written in the background.
    virtual void queue_oldest() = 0;
  };

  /// `limit` in bytes.
  explicit MemoryBudget(std::size_t limit) noexcept : limit_(limit) {}
  MemoryBudget(const MemoryBudget&) = delete;
  MemoryBudget& operator=(const MemoryBudget&) = delete;
  ~MemoryBudget() = default;

  [[nodiscard]] std::size_t limit() const;
  /// Memory beyond a lower limit comes back as holders give it up.
  void set_limit(std::size_t limit);
  /// How many bytes are handed out beyond the limit.
  [[nodiscard]] std::size_t excess() const;
  /// Bytes handed out now; buffers kept for later do not count.
  [[nodiscard]] std::size_t used() const;
  /// The most that `used` has ever been.
  [[nodiscard]] std::size_t peak() const;

  /// Whether two buffers of `size` plus `extra` bytes can ever be had; with less nothing is cached.
  [[nodiscard]] bool allows_two(std::size_t size, std::size_t extra) const;

  /// A buffer of `size` bytes, a multiple of the page size, whose content is undefined. `extra`
  /// bytes of bookkeeping are charged with it. nullptr when the limit does not allow it now. Throws
  /// std::bad_alloc when the system has no memory.
  std::shared_ptr<Buffer> try_take(std::size_t size, std::size_t extra);

  /// What one holder has of the memory that holds data which storage lacks, and how its storage
  /// fares. Must not outlive the budget.
  class Account {
  public:
    explicit Account(MemoryBudget& budget);
    Account(const Account&) = delete;
    Account& operator=(const Account&) = delete;
    ~Account();

  private:
    friend class MemoryBudget;
    MemoryBudget& budget_;
    // Guarded by the budget's mutex.
    std::size_t unclean_ = 0;
    bool shares_ = false;
    /// Writes that storage has been asked for and has not answered.
    std::size_t under_way_ = 0;
    /// Storage has taken the last write that it answered.
    bool takes_writes_ = false;
    /// When it answered, or was first asked.
    Clock::time_point since_;
  };
  /// Tells how much more of what was handed out holds data that storage lacks.
  void add_unclean(Account& account, std::ptrdiff_t bytes) noexcept;
  /// Tells whether clients write there, so that it needs a share of the memory; and how many
  /// holders do.
  void set_shares(Account& account, bool shares) noexcept;
  [[nodiscard]] std::size_t sharers() const;
  /// Storage is asked for a write, and has answered.
  void write_began(Account& account) noexcept;
  void write_ended(Account& account, bool stored) noexcept;
  /// Storage has taken, or refused, a write that was never part of the data.
  void answered(Account& account, bool stored) noexcept;

  /// Whether this holder may have `more` bytes for such data:
  ///
  /// - no more than what all of them leave free. One holder alone gets half of the memory, the next
  ///   half of the rest, and so on; nobody finds it all taken. Source: A. K. Choudhury and
  ///   E. L. Hahne, "Dynamic Queue Length Thresholds for Shared-Memory Packet Switches", 1998.
  /// - Those whose storage has not yet taken a write, has refused the last one, or has not answered
  ///   for `slow`, may have half of the memory together, by the same rule: so whoever's storage
  ///   does its work finds some, beside any number of others.
  [[nodiscard]] bool may_have(const Account& account, std::size_t more) const;
  static constexpr std::chrono::milliseconds slow{100};

  /// Holders are asked for clean memory by `reclaim`. They are held weakly.
  void add_holder(const std::shared_ptr<Holder>& holder);

  /// Asks the holders, in turn, to give back `bytes` bytes. Returns whether anything was given.
  /// REQUIRES: the caller holds no mutex.
  bool reclaim(std::size_t bytes);

  /// Sees to it that some data of `own`, or else of another holder, is being written. Returns false
  /// when there is none: no memory will come back by waiting. REQUIRES: the caller holds no mutex.
  bool press(Holder& own);

  /// Grows whenever memory may have become available: a buffer came back, data became clean, or
  /// storage refused some.
  [[nodiscard]] std::uint64_t changes() const;
  void note_change() noexcept;
  /// Waits until `changes` is not `seen`, or until `longest` has passed; returns which.
  bool wait_for_change(std::uint64_t seen, std::chrono::milliseconds longest) const;

private:
  [[nodiscard]] std::vector<std::shared_ptr<Holder>> holders() const;
  void give_back(Buffer::Memory memory, std::size_t size, std::size_t extra) noexcept;
  void drop_kept_until(std::size_t wanted) noexcept;

  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::uint64_t changes_ = 0;
  std::size_t limit_;
  std::size_t used_ = 0;
  std::size_t peak_ = 0;
  std::size_t kept_ = 0;
  std::size_t unclean_ = 0;
  std::vector<Account*> accounts_;
  std::map<std::size_t, std::vector<Buffer::Memory>> kept_by_size_;
  std::vector<std::weak_ptr<Holder>> holders_;
};

} // namespace qcowcache
