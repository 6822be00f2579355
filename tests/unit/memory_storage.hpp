#pragma once

#include "storage.hpp"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

/// A disk in memory that several `MemoryStorage`, one for each connection, may share. Thread safe.
class MemoryDisk {
public:
  explicit MemoryDisk(std::uint64_t size) : now_(size), durable_(size) {}

  void read(std::uint64_t offset, std::span<std::byte> data) const;
  void write(std::uint64_t offset, std::span<const std::byte> data, bool durable);
  void zero(const qcowcache::ByteRange& range, bool durable);
  void flush();

  /// Has blocks of 4096 bytes for the range. Throws ENOSPC, and has none of them then, where that
  /// makes more than `room`.
  void allocate(const qcowcache::ByteRange& range);
  void deallocate(const qcowcache::ByteRange& range);
  [[nodiscard]] qcowcache::ByteRanges allocated() const;
  /// Bytes.
  std::atomic<std::uint64_t> room = UINT64_MAX;
  [[nodiscard]] bool all_zeros(const qcowcache::ByteRange& range) const;

  /// What a read would return now, and what would be left after a power cut.
  [[nodiscard]] std::vector<std::byte> now() const;
  [[nodiscard]] std::vector<std::byte> durable() const;

private:
  mutable std::mutex mutex_;
  std::vector<std::byte> now_;
  std::vector<std::byte> durable_;
  qcowcache::ByteRanges allocated_;
};

/// Storage for tests: remembers each request, can be told to refuse or to wait, and keeps a list of
/// requests that break the rules of its own capabilities.
class MemoryStorage final : public qcowcache::Storage {
public:
  enum class Kind { read, write, flush, zero, trim, cache, extents };
  struct Call {
    Kind kind;
    qcowcache::ByteRange range;
    bool fua;
    bool may_trim = false;
  };

  /// Capabilities of a disk that can do everything, of `size` bytes.
  static qcowcache::Capabilities everything(std::uint64_t size);

  MemoryStorage(const qcowcache::Capabilities& capabilities, std::shared_ptr<MemoryDisk> disk)
      : capabilities_(capabilities), disk_(std::move(disk)) {}
  explicit MemoryStorage(const qcowcache::Capabilities& capabilities)
      : MemoryStorage(capabilities, std::make_shared<MemoryDisk>(capabilities.size)) {}

  /// Called before each request is carried out, with no lock held: may throw, or wait.
  std::function<void(const Call&)> before;
  /// Called once it was carried out: may throw, as storage does that fails late.
  std::function<void(const Call&)> after;
  /// What is allocated it calls data, also where that is zeros.
  bool zeros_are_data = false;

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
  void begin(const Call& call, bool allowed);
  void end(const Call& call) const;

  const qcowcache::Capabilities capabilities_;
  const std::shared_ptr<MemoryDisk> disk_;
  mutable std::mutex mutex_;
  std::vector<Call> calls_;
  std::vector<std::string> violations_;
};
