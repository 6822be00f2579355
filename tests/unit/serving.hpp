#pragma once

#include "connection.hpp"
#include "export.hpp"
#include "memory/memory_budget.hpp"
#include "memory/writeback.hpp"
#include "memory_storage.hpp"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

/// Exports as the server has them, with background writers or without.
class Serving {
public:
  /// `memory` in bytes; `retry` as in `WriteCache::Settings`; `unclean`, if any, outlives it;
  /// `reserve` in bytes.
  Serving(std::size_t memory, unsigned writers,
          std::chrono::milliseconds retry = qcowcache::WriteCache::Settings().retry,
          qcowcache::UncleanFile* unclean = nullptr, std::uint64_t reserve = 0)
      : budget_(memory), exports_(settings(writers, retry, unclean, reserve), budget_) {
    writeback_.start(writers);
  }
  Serving(const Serving&) = delete;
  Serving& operator=(const Serving&) = delete;
  ~Serving() {
    writeback_.stop();
    exports_.report_left();
  }

  [[nodiscard]] qcowcache::Exports& exports() noexcept { return exports_; }
  [[nodiscard]] qcowcache::MemoryBudget& budget() noexcept { return budget_; }
  /// Afterwards no background writer holds on to a cache any more.
  void stop_writers() noexcept { writeback_.stop(); }
  /// Bytes that were reported lost.
  std::atomic<std::uint64_t> lost = 0;
  /// How often a connection was found to see another disk than others, or a disk was not flushed.
  std::atomic<unsigned> other_disks = 0;

private:
  qcowcache::Export::Settings settings(unsigned writers, std::chrono::milliseconds retry,
                                       qcowcache::UncleanFile* unclean, std::uint64_t reserve) {
    qcowcache::Export::Settings settings;
    settings.unclean = unclean;
    settings.reserve = reserve;
    settings.expire = std::chrono::milliseconds(50);
    settings.writeback = writers > 0 ? &writeback_ : nullptr;
    settings.report_loss = [this](const std::string&, const qcowcache::Unsaved& unsaved) {
      lost += unsaved.bytes;
    };
    settings.report_disk = [this](const std::string&, const std::string&) { ++other_disks; };
    settings.retry = retry;
    return settings;
  }

  qcowcache::MemoryBudget budget_;
  qcowcache::Writeback writeback_;
  qcowcache::Exports exports_;
};

/// A client: a connection and the storage that was made for it.
class Client {
public:
  Client(qcowcache::Exports& exports, const std::string& name,
         std::unique_ptr<MemoryStorage> storage)
      : storage_(storage.get()), connection_(exports, name) {
    connection_.begin(std::move(storage));
  }
  /// `before` as in `MemoryStorage`.
  Client(Serving& serving, const std::string& name, std::shared_ptr<MemoryDisk> disk,
         const qcowcache::Capabilities& capabilities, MemoryStorage::Hook before = {})
      : Client(serving.exports(), name,
               std::make_unique<MemoryStorage>(capabilities, std::move(disk))) {
    storage_->before = std::move(before);
  }
  /// Its storage can do everything.
  Client(Serving& serving, const std::string& name, const std::shared_ptr<MemoryDisk>& disk,
         MemoryStorage::Hook before = {})
      : Client(serving, name, disk, MemoryStorage::everything(disk->size()), std::move(before)) {}
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;
  ~Client() { leave(); }

  void write(std::uint64_t offset, std::span<const std::byte> data, bool fua = false) {
    connection_.write(offset, data, fua);
  }
  std::vector<std::byte> read(std::uint64_t offset, std::size_t size) {
    std::vector<std::byte> data(size);
    connection_.read(offset, data);
    return data;
  }
  void flush() { connection_.flush(); }
  void zero(const qcowcache::ByteRange& range,
            const qcowcache::Storage::ZeroOptions& options = {}) {
    connection_.zero(range, options);
  }
  void trim(const qcowcache::ByteRange& range, bool fua = false) { connection_.trim(range, fua); }
  qcowcache::Storage::Extents extents(const qcowcache::ByteRange& range) {
    return connection_.extents(range, false);
  }
  void leave() {
    connection_.drain();
    connection_.end();
  }
  [[nodiscard]] const MemoryStorage& storage() const { return *storage_; }
  [[nodiscard]] qcowcache::Connection& connection() { return connection_; }

private:
  MemoryStorage* storage_;
  qcowcache::Connection connection_;
};
