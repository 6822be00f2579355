#pragma once

#include "export.hpp"
#include "handle.hpp"

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace qcowcache {

/// One client's connection: nbdkit's handle. Begins with .open, may use storage from .prepare until
/// .finalize or .close, whichever comes first; both may come, more than once, or only one of them.
///
/// Until its first data request it is an onlooker: it reads nothing, and nothing is kept or written
/// for its sake.
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
    Verifier* verifier = nullptr;
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
  /// Storage alone, for a hint; nothing before `begin` and after `end`.
  [[nodiscard]] std::optional<Handle::Use> storage_if_any() {
    return handle_ ? handle_->use() : std::nullopt;
  }

  /// As storage said of itself. REQUIRES: `begin` has returned.
  [[nodiscard]] const Capabilities& capabilities() const noexcept {
    return handle_->capabilities();
  }
  /// As the client asked for it.
  [[nodiscard]] const std::string& export_name() const noexcept { return export_name_; }
  /// nullptr: an onlooker.
  [[nodiscard]] Image* image() const noexcept { return image_.load(std::memory_order_acquire); }

private:
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
