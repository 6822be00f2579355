#pragma once

#include "storage/storage.hpp"

#include <functional>
#include <memory>
#include <system_error>

namespace qcowcache {

/// Storage acknowledged a write, and then returned other bytes (EIO) or refused to return any (its
/// own errno). What it has in the range now nobody knows; bytes that were written there along with
/// a client's are to be written again.
class NotAsWritten : public std::system_error {
public:
  explicit NotAsWritten(const std::error_code& error)
      : std::system_error(error, "storage did not return the bytes that were written") {}
};

/// Storage each of whose writes is read back, once, and compared before it is acknowledged. This
/// finds what is damaged on the way; it can be no more honest than storage's reads, which may be
/// answered from memory.
///
/// A write that does not come back as it was throws NotAsWritten. Zeros and trims are not read
/// back. As thread safe as what is below. Reads into a buffer as large as the write.
class ReadbackStorage final : public Storage {
public:
  /// Told of each write that came back with other bytes: its range, and where the first of them is.
  /// Must not throw.
  using Report = std::function<void(const ByteRange& range, std::uint64_t first_difference)>;

  ReadbackStorage(std::unique_ptr<Storage> below, Report report) noexcept
      : below_(std::move(below)), report_(std::move(report)) {}

  [[nodiscard]] const Capabilities& capabilities() const noexcept override {
    return below_->capabilities();
  }

protected:
  void do_read(std::uint64_t offset, std::span<std::byte> data) override;
  void do_write(std::uint64_t offset, std::span<const std::byte> data, bool fua) override;
  void do_flush() override;
  void do_zero(const ByteRange& range, const ZeroOptions& options) override;
  void do_trim(const ByteRange& range, bool fua) override;
  void do_cache(const ByteRange& range) override;
  Extents do_extents(const ByteRange& range, bool only_first) override;

private:
  const std::unique_ptr<Storage> below_;
  const Report report_;
};

} // namespace qcowcache
