#pragma once

#include "storage/storage.hpp"

#include <nbdkit-filter.h>

namespace qcowcache {

/// The storage below this filter, as one connection's `nbdkit_next` reaches it.
///
/// As thread safe as nbdkit's thread model says. Valid from the connection's .prepare to its
/// .finalize; the owner sees to that.
class NbdkitStorage final : public Storage {
public:
  /// Asks storage about itself: nbdkit demands that it is asked before it is used. Throws
  /// std::system_error when storage does not answer; it has then reported why. Without an answer
  /// about block sizes, which nbdkit gives for a plugin whose own it does not allow, storage is
  /// taken to have none.
  explicit NbdkitStorage(nbdkit_next* next);

  [[nodiscard]] const Capabilities& capabilities() const noexcept override { return capabilities_; }

protected:
  void do_read(std::uint64_t offset, std::span<std::byte> data) override;
  void do_write(std::uint64_t offset, std::span<const std::byte> data, bool fua) override;
  void do_flush() override;
  void do_zero(const ByteRange& range, const ZeroOptions& options) override;
  void do_trim(const ByteRange& range, bool fua) override;
  void do_cache(const ByteRange& range) override;
  Extents do_extents(const ByteRange& range, bool only_first) override;

private:
  nbdkit_next* next_;
  Capabilities capabilities_;
};

} // namespace qcowcache
