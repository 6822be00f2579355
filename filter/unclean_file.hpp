#pragma once

#include "util/answer.hpp"
#include "util/file.hpp"

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <sys/stat.h>
#include <system_error>
#include <utility>
#include <vector>

namespace qcowcache {

/// The file that names the exports which hold bytes that clients count as written and storage may
/// lack. It outlives the process: what it names when a server starts has lost them, and clients
/// who have merely connected again must learn of that. (NFS has its write verifier for it: RFC
/// 1813, section 3.3.7.)
///
/// Each name stands in a line of its own, in double quotes, as `printable` writes it; where none is
/// held the file is empty. It belongs to one server at a time, which keeps it locked, but for an
/// operator who removes names, with any editor.
///
/// Thread safe. Calls wait for the disk that the file is on.
class UncleanFile {
public:
  /// What a request of an export fails with that has lost bytes; the operator has been told. EIO.
  struct Lost : Answer {
    Lost() : Answer(EIO, std::generic_category(), "acknowledged bytes were lost") {}
  };

  /// An editor may take the file away before it brings it back: what an operator has changed counts
  /// when it has been like that for so long.
  static constexpr std::chrono::milliseconds usual_patience{1000};

  /// `path` is absolute. `complain` is told, in one line, of each export that has lost bytes, the
  /// first time that a client asks for it, and of a name that could not be written down, once until
  /// one has been.
  UncleanFile(std::string path, std::function<void(const std::string&)> complain,
              std::chrono::milliseconds patience = usual_patience)
      : path_(std::move(path)), complain_(std::move(complain)), patience_(patience) {}
  UncleanFile(const UncleanFile&) = delete;
  UncleanFile& operator=(const UncleanFile&) = delete;
  ~UncleanFile() = default;

  /// Takes possession of the file, which is made if it is not there. Throws std::system_error, with
  /// EBUSY when another server has it, and EINVAL when it holds something else than names. To
  /// be called once, before anything else.
  void open();

  /// Writes the name down, lest it is there already; when this returns true a crash does not undo
  /// it. False: it could not be written down, and nothing may be held.
  [[nodiscard]] bool hold(const std::string& export_name) noexcept;
  /// What one of those who hold has will never be stored.
  void lose(const std::string& export_name) noexcept;
  /// One of those who hold has nothing left. With the last one goes the name.
  void release(const std::string& export_name) noexcept;

  /// Throws `Lost` where bytes of the export were lost, now or by an earlier server.
  void refuse_if_lost(const std::string& export_name);
  /// A client begins a new image there: what was lost is of no interest any more.
  void begin_anew(const std::string& export_name) noexcept;
  /// To be called now and then: an operator's editor may have dropped the names of those who hold
  /// something, and a crash could come before anybody holds more. Looks at the file a few times a
  /// second at most, and does not wait for others.
  void follow() noexcept;

private:
  /// Where a name stands.
  struct Line {
    std::uint64_t offset = 0;
    std::size_t size = 0;
  };
  struct Entry {
    std::size_t holders = 0;
    bool lost = false;
    /// Since the file was last read: who removes the name cannot have known.
    bool lost_lately = false;
    bool told = false;
    Line line;

    [[nodiscard]] bool needed() const noexcept;
  };
  using Entries = std::map<std::string, Entry>;

  [[nodiscard]] bool follow_operator();
  void rewrite();
  [[nodiscard]] struct stat status() const;
  [[nodiscard]] bool is_as_left(const struct stat& now) const noexcept;
  [[nodiscard]] bool seen() const;
  void remember();
  [[nodiscard]] std::string read() const;
  void write_down(std::string_view name, Entry& entry);
  void found(Entry& entry) noexcept;
  void give_up(Entries::iterator entry) noexcept;
  template <typename Change>
  void change(const std::string& export_name, Change change) noexcept;
  void forget_unneeded(Entries::iterator entry);

  const std::string path_;
  const std::function<void(const std::string&)> complain_;
  const std::chrono::milliseconds patience_;
  /// How many exports have lost bytes.
  std::atomic<std::size_t> lost_ = 0;

  std::mutex mutex_;
  File file_;
  /// By `printable` name.
  Entries entries_;
  /// Lines of blanks.
  std::vector<Line> free_;
  std::uint64_t end_ = 0;
  /// The file as this left it.
  struct stat left_ = {};
  /// The file as somebody else did, and when it was first seen like that.
  struct Changed {
    struct stat status;
    std::chrono::steady_clock::time_point since;
  };
  std::optional<Changed> changed_;
  std::chrono::steady_clock::time_point next_look_;
  bool complained_ = false;
};

} // namespace qcowcache
