#pragma once

#include "export.hpp"
#include "handle.hpp"

#include <atomic>
#include <memory>
#include <optional>
#include <string>

namespace qcowcache {

/// One client's connection: nbdkit's handle. Begins with .open, uses storage from .prepare until
/// .finalize or .close, whichever comes first; both may come, more than once, or only one of them.
class Connection {
public:
  /// The exports outlive the connection.
  Connection(Exports& exports, std::string export_name)
      : exports_(exports), export_name_(std::move(export_name)) {}
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;
  ~Connection() = default;

  /// Joins the export, and looks for a qcow2 header.
  void begin(std::unique_ptr<Storage> storage);

  /// Hands over what is dirty. Storage's refusals are for `Export::detach` to report.
  void drain() noexcept;

  /// Leaves the export: no use of storage begins after this returns. Does nothing when called
  /// again.
  void end() noexcept;

  /// The cache and a storage to use with it. Throws ESHUTDOWN before `begin` and after `end`.
  struct InUse {
    WriteCache& cache;
    Handle::Use use;
    /// nullptr: nobody checks what is written.
    Verifier* verifier = nullptr;

    /// Checks what became reachable; does nothing where nobody checks. Throws std::system_error
    /// when storage cannot be read.
    [[nodiscard]] Verifier::Outcome check() const;
  };
  [[nodiscard]] InUse in_use();
  /// The same, but nothing before `begin` and after `end`.
  [[nodiscard]] std::optional<InUse> in_use_if_any();

  /// As storage said of itself. REQUIRES: `begin` has returned.
  [[nodiscard]] const Capabilities& capabilities() const noexcept {
    return handle_->capabilities();
  }
  /// As the client asked for it.
  [[nodiscard]] const std::string& export_name() const noexcept { return export_name_; }
  [[nodiscard]] const WriteCache& cache() const noexcept { return *membership_.cache; }

private:
  static void check_at_end(const InUse& storage);

  Exports& exports_;
  const std::string export_name_;
  std::shared_ptr<Handle> handle_;
  Exports::Membership membership_;
  std::atomic<bool> ended_ = false;
};

} // namespace qcowcache
