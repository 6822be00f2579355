#pragma once

#include "export.hpp"
#include "storage/handle.hpp"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace qcowcache {

/// One client's connection: nbdkit's handle. Begins with .open, may use storage from .prepare until
/// .finalize or .close, whichever comes first; both may come, more than once, or only one of them.
///
/// Until its first data request it is an onlooker: it reads nothing, and nothing is kept or written
/// for its sake.
///
/// Requests are thread safe, and may be made between `begin` and `end`: ESHUTDOWN otherwise. They
/// throw storage's errors, std::bad_alloc, and `Answer` where nobody but the client need know.
class Connection {
public:
  /// The exports outlive the connection.
  Connection(Exports& exports, std::string export_name)
      : exports_(exports), export_name_(std::move(export_name)) {}
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;
  ~Connection() = default;

  /// Storage can be used from now on.
  void begin(std::unique_ptr<Storage> storage) {
    handle_ = std::make_shared<Handle>(std::move(storage));
  }

  void read(std::uint64_t offset, std::span<std::byte> data);
  /// With `fua` it is stored when this returns, otherwise maybe only after the next flush.
  void write(std::uint64_t offset, std::span<const std::byte> data, bool fua);
  /// All that has been acknowledged is stored when this returns, and all compressed clusters that
  /// became reachable can be read, where that is to be checked.
  void flush();
  void trim(const ByteRange& range, bool fua);
  /// Throws `Answer`, ENOTSUP, where it is to be fast and cannot be.
  void zero(const ByteRange& range, const Storage::ZeroOptions& options);
  [[nodiscard]] Storage::Extents extents(const ByteRange& range, bool only_first);
  /// A hint, which nobody minds after `end`, nor before `begin`.
  void cache(const ByteRange& range);
  /// Whether a flush is of any use. REQUIRES: `begin` has returned.
  [[nodiscard]] bool can_flush() const noexcept;

  /// Hands over what it wrote. Storage's refusals are for `Exports::leave` to report.
  void drain() noexcept;

  /// Leaves the export: no use of storage begins after this returns. Does nothing when called
  /// again.
  void end() noexcept;

  /// The image and a storage to use with it.
  struct InUse {
    WriteCache& cache;
    Handle::Use use;
    /// nullptr: nobody checks what is written.
    std::shared_ptr<Verifier> verifier = nullptr;
    /// Whoever changes the same bytes later waits for it. Given back before `use`.
    std::optional<RangeLock::Owned> place = std::nullopt;

    /// Checks what became reachable; does nothing where nobody checks. Throws std::system_error
    /// when storage cannot be read.
    [[nodiscard]] Verifier::Outcome check() const;
  };
  /// Joins the image that the request is for. One that changes something waits for those that came
  /// before and change the same bytes, unless the image's cache sees to that. Throws ESHUTDOWN
  /// before `begin` and after `end`, and storage's error when it has to be compared and cannot be
  /// read.
  [[nodiscard]] InUse in_use(const Image::Request& request);

  /// As storage said of itself. REQUIRES: `begin` has returned.
  [[nodiscard]] const Capabilities& capabilities() const noexcept {
    return handle_->capabilities();
  }
  /// As the client asked for it.
  [[nodiscard]] const std::string& export_name() const noexcept { return export_name_; }
  /// nullptr: an onlooker.
  [[nodiscard]] Image* image() const noexcept { return image_.load(std::memory_order_acquire); }

private:
  /// Storage alone; nothing before `begin` and after `end`.
  [[nodiscard]] std::optional<Handle::Use> storage_if_any() {
    return handle_ ? handle_->use() : std::nullopt;
  }
  template <typename Work>
  void change(const ByteRange& range, Work work);
  [[nodiscard]] Verifier::Outcome check(const InUse& in_use) const;
  void before_request() const;
  void refuse_if_lost() const;
  void refuse_if_lost(std::uint64_t offset) const;
  void begin_anew() const noexcept;
  [[nodiscard]] const Image::Settings& settings() const noexcept { return exports_.settings(); }
  Export& visit();
  Image& enter(const Image::Request& request);
  static void check_at_end(const InUse& storage);

  Exports& exports_;
  const std::string export_name_;
  std::shared_ptr<Handle> handle_;

  /// Held while an image is joined, over calls into storage: requests of the same connection wait.
  std::mutex entering_;
  std::once_flag visited_;
  std::shared_ptr<Export> export_;
  /// All that it has ever used, the last one now: a request may still be busy with an earlier one.
  std::vector<std::shared_ptr<Image>> images_;
  std::atomic<Image*> image_ = nullptr;
  std::atomic<bool> ended_ = false;
};

} // namespace qcowcache
