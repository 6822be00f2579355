#pragma once

#include "journal.hpp"
#include "memory_storage.hpp"

#include <memory>

/// One connection to a disk in memory, which writes down in a journal what it is asked to change.
/// Thread safe.
class RecordingStorage final : public qcowcache::Storage {
public:
  /// The journal outlives the storage.
  RecordingStorage(const qcowcache::Capabilities& capabilities, std::shared_ptr<MemoryDisk> disk,
                   Journal& journal)
      : below_(capabilities, std::move(disk)), journal_(journal) {}

  [[nodiscard]] const qcowcache::Capabilities& capabilities() const noexcept override {
    return below_.capabilities();
  }

protected:
  void do_read(std::uint64_t offset, std::span<std::byte> data) override;
  void do_write(std::uint64_t offset, std::span<const std::byte> data, bool fua) override;
  void do_flush() override;
  void do_zero(const qcowcache::ByteRange& range, const ZeroOptions& options) override;
  void do_trim(const qcowcache::ByteRange& range, bool fua) override;
  void do_cache(const qcowcache::ByteRange& range) override;
  Extents do_extents(const qcowcache::ByteRange& range, bool only_first) override;

private:
  template <typename Request>
  void record(Change change, Request request);

  MemoryStorage below_;
  Journal& journal_;
};
