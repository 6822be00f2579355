#pragma once

#include "storage/storage.hpp"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

/// A disk in memory that several `MemoryStorage`, one for each connection, may share. Thread safe.
class MemoryDisk {
public:
  explicit MemoryDisk(std::uint64_t size) : MemoryDisk(std::vector<std::byte>(size)) {}
  /// `initial` is there to stay.
  explicit MemoryDisk(std::vector<std::byte> initial)
      : now_(std::move(initial)), durable_(now_), size_(now_.size()) {}

  [[nodiscard]] std::uint64_t size() const noexcept { return size_; }
  /// What is added reads as zeros.
  void resize(std::uint64_t size);

  void read(std::uint64_t offset, std::span<std::byte> data) const;
  [[nodiscard]] std::vector<std::byte> read(std::uint64_t offset, std::size_t size) const {
    return now({offset, offset + size});
  }
  void write(std::uint64_t offset, std::span<const std::byte> data, bool durable);
  void zero(const qcowcache::ByteRange& range, bool durable);
  /// What is there now would be left after a power cut.
  void harden(const qcowcache::ByteRange& range);

  /// Has blocks of 4096 bytes for the range. Throws ENOSPC, and has none of them then, where that
  /// makes more than `room`.
  void allocate(const qcowcache::ByteRange& range);
  void deallocate(const qcowcache::ByteRange& range);
  [[nodiscard]] qcowcache::ByteRanges allocated() const;
  /// Bytes.
  std::atomic<std::uint64_t> room = UINT64_MAX;
  [[nodiscard]] bool all_zeros(const qcowcache::ByteRange& range) const;

  /// What a read would return now, and what would be left after a power cut.
  [[nodiscard]] std::vector<std::byte> now() const { return now({0, size()}); }
  [[nodiscard]] std::vector<std::byte> now(const qcowcache::ByteRange& range) const;
  [[nodiscard]] std::vector<std::byte> durable() const { return durable({0, size()}); }
  [[nodiscard]] std::vector<std::byte> durable(const qcowcache::ByteRange& range) const;

private:
  mutable std::mutex mutex_;
  std::vector<std::byte> now_;
  std::vector<std::byte> durable_;
  std::atomic<std::uint64_t> size_;
  qcowcache::ByteRanges allocated_;
};

/// Storage for tests: remembers each request, can be told to refuse or to wait, and keeps a list of
/// requests that break the rules of its own capabilities.
class MemoryStorage final : public qcowcache::Storage {
public:
  enum class Kind { read, write, flush, zero, trim, extents, cache };
  struct Call {
    Kind kind;
    qcowcache::ByteRange range;
    bool fua = false;
    bool may_trim = false;
    bool fast = false;
    /// What a write would write; only for hooks.
    std::span<const std::byte> data = {};
  };
  /// What becomes of a call.
  struct Verdict {
    /// errno, with which it fails; 0: it does not.
    int error = 0;
    /// How much of it is carried out, whether it fails or not: `half` is its first blocks.
    enum class Part { none, half, all } done = Part::all;
  };

  using Hook = std::function<void(const Call&)>;

  /// Capabilities of a disk that can do everything, of `size` bytes.
  static qcowcache::Capabilities everything(std::uint64_t size);
  /// Has all requests of a kind fail with this errno.
  static Hook refusal(Kind kind, int error);

  MemoryStorage(const qcowcache::Capabilities& capabilities, std::shared_ptr<MemoryDisk> disk)
      : capabilities_(capabilities), disk_(std::move(disk)) {}
  explicit MemoryStorage(const qcowcache::Capabilities& capabilities)
      : MemoryStorage(capabilities, std::make_shared<MemoryDisk>(capabilities.size)) {}

  /// Called before each request is carried out, with no lock held: may throw, or wait.
  Hook before;
  /// Called next, to decide what becomes of it.
  std::function<Verdict(const Call&)> judge;
  /// Called once it was carried out: may throw, as storage does that fails late.
  Hook after;
  /// What is allocated it calls data, also where that is zeros.
  bool zeros_are_data = false;
  /// Extents begin and end on multiples of this, in bytes.
  std::uint64_t grain = 4096;
  /// What it calls the extents of one grain, by whether they are zeros; otherwise data and holes.
  std::function<ExtentType(const qcowcache::ByteRange& part, bool zeros)> type_of;
  /// It tells one extent at a time.
  bool tells_one = false;
  /// What a trim leaves; nothing: what was there.
  std::optional<std::byte> trimmed = std::byte{0};

  [[nodiscard]] const qcowcache::Capabilities& capabilities() const noexcept override {
    return capabilities_;
  }
  [[nodiscard]] MemoryDisk& disk() const noexcept { return *disk_; }
  [[nodiscard]] std::vector<Call> calls() const;
  [[nodiscard]] std::vector<Call> calls(Kind kind) const;
  void forget_calls();
  /// Requests that did not fit: out of range, ragged, too large, or of a kind that it has not.
  [[nodiscard]] std::vector<std::string> violations() const;

protected:
  void do_read(std::uint64_t offset, std::span<std::byte> data) override;
  void do_write(std::uint64_t offset, std::span<const std::byte> data, bool fua) override;
  void do_flush() override;
  void do_zero(const qcowcache::ByteRange& range, const ZeroOptions& options) override;
  void do_trim(const qcowcache::ByteRange& range, bool fua) override;
  void do_cache(const qcowcache::ByteRange& range) override;
  Extents do_extents(const qcowcache::ByteRange& range, bool only_first) override;

private:
  template <typename Work>
  void carry_out(const Call& call, bool allowed, Work work);
  void note(const Call& call, bool allowed);
  [[nodiscard]] bool hardens(bool fua) const noexcept;

  const qcowcache::Capabilities capabilities_;
  const std::shared_ptr<MemoryDisk> disk_;
  mutable std::mutex mutex_;
  std::vector<Call> calls_;
  std::vector<std::string> violations_;
};
