#pragma once

#include "cache/range_lock.hpp"
#include "image.hpp"
#include "memory/memory_budget.hpp"
#include "storage/handle.hpp"

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace qcowcache {

/// One export name: who owns which bytes, and the images that its connections see.
///
/// Connections to storage that says multi-conn share an image as far as they see the same disk.
/// Others may see another disk under the same name each, so each has an image of its own; but since
/// they may as well see the same disk, the range lock is common to all, and what one changes the
/// others forget.
///
/// Thread safe.
class Export : public std::enable_shared_from_this<Export> {
public:
  using Settings = Image::Settings;

  /// The budget outlives the export. With `look_at_all` any of its clusters may be one that was
  /// found unreadable earlier.
  Export(std::string name, Settings settings, MemoryBudget& budget, bool look_at_all = false)
      : name_(std::move(name)), settings_(std::move(settings)), budget_(budget),
        look_at_all_(look_at_all) {}
  Export(const Export&) = delete;
  Export& operator=(const Export&) = delete;
  ~Export();

  /// The image for a connection's data request; `present` is the one that it uses already, if any.
  /// The connection uses it from now on.
  ///
  /// Calls storage, where there is something to compare: throws its error when it cannot be read.
  /// REQUIRES: one call at a time for each handle; no mutex is held.
  std::shared_ptr<Image> enter(const std::shared_ptr<Handle>& handle,
                               const std::shared_ptr<Image>& present,
                               const Image::Request& request);
  /// A place among the requests that change something, in the order in which they came, from before
  /// `enter` until they are done: comparing may take long, and so may waiting for memory, and who
  /// comes later and asks for the same bytes must not be answered before. Nothing where the line of
  /// the image's cache keeps that order: the request goes there at once (`in_line_of_cache`), and
  /// so have all before it. Throws std::bad_alloc.
  [[nodiscard]] std::optional<RangeLock::Owned> arrive(const ByteRange& range,
                                                       bool in_line_of_cache);
  /// Waits for those who came before. Throws ESHUTDOWN when the connection ends meanwhile.
  void wait_turn(const RangeLock::Owned& place) const;

  /// It ends. What the image still owes stays for the next connection to the same disk where
  /// connections share it, and its bytes are reported lost where they do not. REQUIRES: the handle
  /// is retired.
  void leave(const Handle& handle, const std::shared_ptr<Image>& present);

  /// What is left when the last connection has ended.
  [[nodiscard]] Image::Debt owes() const;
  /// Forgets the clusters that could not be read. REQUIRES: nothing else is left, and nobody uses
  /// the export.
  void forget();
  /// Reports all that is left as lost: the server ends.
  void report_left() const;

private:
  using Images = std::vector<std::shared_ptr<Image>>;

  /// What comparing with the images has come to.
  struct Comparison {
    std::shared_ptr<Image> image;
    Image::Standing standing = Image::Standing::stranger;
    /// Those in which the connection is a stranger.
    Images others;
  };

  /// Whether no more than one image can change storage. REQUIRES: the mutex is held.
  [[nodiscard]] bool has_one_writer() const;
  [[nodiscard]] static Comparison compare(Images candidates, Handle& handle,
                                          const std::shared_ptr<Image>& present,
                                          const Image::Request& request);
  [[nodiscard]] std::shared_ptr<Image> make_image(const Capabilities& capabilities);
  void remove(const std::shared_ptr<Image>& image);
  void leave_image(const Handle& handle, const std::shared_ptr<Image>& image);
  void changed_storage(const Image& by, const ByteRange& range) const;

  const std::string name_;
  const Settings settings_;
  MemoryBudget& budget_;
  RangeLock ranges_;
  RangeLock arrivals_;

  mutable std::mutex mutex_;
  /// Those that connections may share, the latest first, and the others.
  Images shared_;
  Images own_;
  /// Grows when an image comes, goes, or is founded anew: comparisons made before count no more.
  std::uint64_t version_ = 0;
  /// For the first that connections may share: of other storage nobody knows whether it is the
  /// same.
  bool look_at_all_;
};

/// All exports that somebody uses, or that have bytes left, or clusters that cannot be read.
///
/// Clients choose names: so no more than 64 are kept for such clusters only. When there would be
/// more the operator is told, and from then on all clusters of an export are looked at when it
/// is opened anew.
///
/// Thread safe.
class Exports {
public:
  Exports(Export::Settings settings, MemoryBudget& budget)
      : settings_(std::move(settings)), budget_(budget) {}

  /// The export of that name, which stays until `leave`.
  std::shared_ptr<Export> visit(const std::string& name);
  /// Ends the visit, and the use of the image, if any. REQUIRES: as `Export::leave`.
  void leave(const std::shared_ptr<Export>& visited, const Handle& handle,
             const std::shared_ptr<Image>& image);
  void report_left() const;
  [[nodiscard]] const Export::Settings& settings() const noexcept { return settings_; }

private:
  struct Entry {
    std::shared_ptr<Export> of;
    std::size_t visitors = 0;
  };

  /// Whether no more exports than allowed are kept for their clusters.
  [[nodiscard]] bool may_keep_clusters() const;

  const Export::Settings settings_;
  MemoryBudget& budget_;
  mutable std::mutex mutex_;
  std::map<std::string, Entry> exports_;
  /// An export is gone whose clusters could not all be read, and nobody knows which one it was.
  bool forgotten_ = false;
};

} // namespace qcowcache
