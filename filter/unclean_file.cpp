#include "unclean_file.hpp"

#include "reports/statistics.hpp"

#include <algorithm>
#include <cstdio>
#include <fcntl.h>
#include <filesystem>
#include <new>
#include <span>
#include <sys/file.h>
#include <unistd.h>

namespace qcowcache {

namespace {

/// Lines have lengths that are multiples of this, so that most have the same.
constexpr std::size_t line_step = 64;
/// Nobody can fill memory, or the file, by losing bytes of ever more names.
constexpr std::size_t most_names = 1000;
/// So much no list of names takes, each of which has 4096 bytes at most, as NBD has it, and up to
/// four characters for each of these: it is another file.
constexpr std::size_t largest_record = std::size_t{32} * 1024 * 1024;

void must(int result) {
  if (result != 0)
    throw_errno();
}

void write_at(std::FILE* file, std::uint64_t offset, std::string_view text) {
  while (!text.empty()) {
    const ssize_t written =
        pwrite(fileno(file), text.data(), text.size(), static_cast<off_t>(offset));
    if (written < 0)
      throw_errno();
    text.remove_prefix(static_cast<std::size_t>(written));
    offset += static_cast<std::uint64_t>(written);
  }
}

std::string line_of(std::string_view name) {
  std::string line = "\"" + std::string(name) + "\"";
  line.resize((line.size() / line_step + 1) * line_step - 1, ' ');
  return line + "\n";
}

/// So that there is one owner only.
void lock_file(std::FILE* file) {
  if (flock(fileno(file), LOCK_EX | LOCK_NB) == 0)
    return;
  if (errno == EWOULDBLOCK)
    throw std::system_error(EBUSY, std::generic_category(), "another server uses it");
  throw_errno();
}

/// What is there, or an empty file.
File open_locked(const std::string& path) {
  File file(std::fopen(path.c_str(), "a+e"));
  if (!file)
    throw_errno();
  lock_file(file.get());
  return file;
}

struct stat status_of(std::FILE* file) {
  struct stat status = {};
  must(fstat(fileno(file), &status));
  return status;
}

bool is_same(const struct stat& left, const struct stat& right) noexcept {
  return left.st_dev == right.st_dev && left.st_ino == right.st_ino;
}

/// The same, and nobody has written to it.
bool is_unchanged(const struct stat& left, const struct stat& right) noexcept {
  return is_same(left, right) && left.st_size == right.st_size &&
         left.st_mtim.tv_sec == right.st_mtim.tv_sec &&
         left.st_mtim.tv_nsec == right.st_mtim.tv_nsec;
}

/// Whether that is the file at `path`.
bool is_at(const std::string& path, std::FILE* file) {
  struct stat now = {};
  return stat(path.c_str(), &now) == 0 && is_same(now, status_of(file));
}

/// So that a file that was made there, or renamed, is still there after a crash.
void store_directory(const std::string& path) {
  const File directory(std::fopen(std::filesystem::path(path).parent_path().c_str(), "re"));
  if (!directory)
    throw_errno();
  must(fsync(fileno(directory.get())));
}

enum class Others { refused, ignored };

/// The names in a file. Throws EINVAL for lines that are something else, unless they are ignored; a
/// name of which only one end was written down in a crash is always.
std::vector<std::string> names_in(std::string_view text, Others others) {
  // Some file systems have zeros after a power failure where a line was to be.
  constexpr std::string_view blanks(" \t\r\0", 4);
  std::vector<std::string> names;
  while (!text.empty()) {
    std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(text.size(), line.size() + 1));
    line.remove_prefix(std::min(line.size(), line.find_first_not_of(blanks)));
    line.remove_suffix(line.size() - (line.find_last_not_of(blanks) + 1));
    if (line.empty())
      continue;
    const bool begins = line.front() == '"';
    const bool ends = line.back() == '"';
    if (begins && ends && line.size() >= 2)
      names.emplace_back(line.substr(1, line.size() - 2));
    else if (!begins && !ends && others == Others::refused)
      throw std::system_error(EINVAL, std::generic_category(),
                              "it holds something else than names in quotes");
  }
  return names;
}

} // namespace

void UncleanFile::open() {
  const std::lock_guard lock(mutex_);
  for (;;) {
    file_ = open_locked(path_);
    if (!S_ISREG(status_of(file_.get()).st_mode))
      throw std::system_error(EINVAL, std::generic_category(), "it is no regular file");
    // Another may have put a new one into its place meanwhile.
    if (is_at(path_, file_.get()))
      break;
  }
  for (const std::string& name : names_in(read(), Others::refused))
    entries_[name].lost = true;
  lost_ = entries_.size();
  rewrite();
}

std::string UncleanFile::read() const {
  const auto size = static_cast<std::uint64_t>(status_of(file_.get()).st_size);
  if (size > largest_record)
    throw std::system_error(EINVAL, std::generic_category(), "it is too large for a list of names");
  std::string text(size, '\0');
  const ssize_t length = pread(fileno(file_.get()), text.data(), text.size(), 0);
  if (length < 0)
    throw_errno();
  text.resize(static_cast<std::size_t>(length));
  return text;
}

/// In a new file that takes the place of the old one: a crash leaves one or the other.
void UncleanFile::rewrite() {
  std::erase_if(entries_, [](const auto& each) { return !each.second.needed(); });
  const std::string fresh = fresh_name(path_);
  std::string text;
  for (const auto& [name, entry] : entries_)
    text += line_of(name);
  File file = create_file(fresh);
  try {
    lock_file(file.get());
    write_at(file.get(), 0, text);
    must(fsync(fileno(file.get())));
    must(std::rename(fresh.c_str(), path_.c_str()));
  } catch (const std::system_error&) {
    static_cast<void>(std::remove(fresh.c_str()));
    throw;
  }
  // What follows may fail; whoever comes next has to know where he is.
  file_ = std::move(file);
  end_ = 0;
  for (auto& [name, entry] : entries_) {
    entry.line = {end_, line_of(name).size()};
    end_ += entry.line.size;
    entry.lost_lately = false;
  }
  free_.clear();
  left_ = {};
  store_directory(path_);
  remember();
}

/// Unless somebody has changed its size meanwhile.
void UncleanFile::remember() {
  left_ = status_of(file_.get());
  if (static_cast<std::uint64_t>(left_.st_size) != end_)
    left_ = {};
  changed_.reset();
}

/// Of what is there now; all zeros where nothing is.
struct stat UncleanFile::status() const {
  struct stat now = {};
  if (stat(path_.c_str(), &now) != 0) {
    if (errno != ENOENT)
      throw_errno();
    now = {};
  }
  return now;
}

/// Whether that is the file as it was left.
bool UncleanFile::is_as_left(const struct stat& now) const noexcept {
  return now.st_ino != 0 && is_unchanged(now, left_);
}

bool UncleanFile::seen() const {
  return is_as_left(status());
}

bool UncleanFile::Entry::needed() const noexcept {
  return lost || holders > 0;
}

/// What he has removed is not lost any more. What is held he finds again. Returns whether the file
/// says all that it should: while he may be changing it, it is left to him.
bool UncleanFile::follow_operator() {
  const struct stat now = status();
  if (is_as_left(now))
    return true;
  const auto moment = std::chrono::steady_clock::now();
  if (!changed_ || !is_unchanged(changed_->status, now))
    changed_ = {now, moment};
  if (moment - changed_->since < patience_)
    return false;
  std::vector<std::string> names;
  if (now.st_ino != 0) {
    if (!is_same(now, status_of(file_.get())))
      file_ = open_locked(path_);
    names = names_in(read(), Others::ignored);
  }
  for (auto& [name, entry] : entries_) {
    if (entry.lost && !entry.lost_lately && std::ranges::find(names, name) == names.end())
      found(entry);
  }
  rewrite();
  return seen();
}

/// Writes the names again that an operator's editor has dropped, who did not know of them.
void UncleanFile::follow() noexcept {
  constexpr std::chrono::milliseconds between_looks{200};
  try {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    const auto now = std::chrono::steady_clock::now();
    if (!lock || now < next_look_)
      return;
    next_look_ = now + between_looks;
    static_cast<void>(follow_operator());
  } catch (const std::exception&) {
    // Whoever has to rely on the file finds out, and says so.
  }
}

void UncleanFile::write_down(std::string_view name, Entry& entry) {
  const std::string line = line_of(name);
  const auto reused = std::ranges::find(free_, line.size(), &Line::size);
  entry.line = reused == free_.end() ? Line{end_, line.size()} : *reused;
  const std::uint64_t end = end_;
  try {
    write_at(file_.get(), entry.line.offset, line);
    end_ = std::max(end_, entry.line.offset + line.size());
    remember(); // at once: what changes from here on somebody else has changed
    must(fdatasync(fileno(file_.get())));
  } catch (const std::system_error&) {
    // Where a part of it stays it is no name, and will be written over.
    std::ignore = ftruncate(fileno(file_.get()), static_cast<off_t>(end)) == 0;
    end_ = end;
    throw;
  }
  if (reused != free_.end())
    free_.erase(reused);
}

bool UncleanFile::hold(const std::string& export_name) noexcept {
  try {
    const std::string name = printable(export_name);
    const std::lock_guard lock(mutex_);
    try {
      if (!follow_operator())
        return false;
      const auto entry = entries_.try_emplace(name).first;
      const bool is_new = !entry->second.needed();
      ++entry->second.holders;
      try {
        if (is_new && entries_.size() > most_names)
          throw std::system_error(ENOSPC, std::generic_category(),
                                  "there are " + std::to_string(most_names) + " names");
        if (is_new)
          write_down(name, entry->second);
        complained_ = false;
        // Somebody may have changed it, or put another file into its place, meanwhile.
        if (follow_operator())
          return true;
      } catch (...) {
        give_up(entry);
        throw;
      }
      give_up(entry);
    } catch (const std::system_error& error) {
      if (!complained_)
        complain_("qcowcache-unclean=" + printable(path_) + ": " + error.what() +
                  ": nothing is cached for exports that it does not name");
      complained_ = true;
    }
  } catch (const std::bad_alloc&) {
    return false;
  }
  return false;
}

/// It was not written down that it is held.
void UncleanFile::give_up(Entries::iterator entry) noexcept {
  --entry->second.holders;
  if (!entry->second.needed())
    entries_.erase(entry);
}

void UncleanFile::found(Entry& entry) noexcept {
  entry.lost = false;
  --lost_;
}

/// A crash may undo it: then the name is found again, and nothing worse.
void UncleanFile::forget_unneeded(Entries::iterator entry) {
  if (entry->second.needed())
    return;
  if (!seen()) {
    static_cast<void>(follow_operator());
    return;
  }
  const Line line = entry->second.line;
  entries_.erase(entry);
  if (entries_.empty()) {
    must(ftruncate(fileno(file_.get()), 0));
    free_.clear();
    end_ = 0;
  } else {
    write_at(file_.get(), line.offset, std::string(line.size - 1, ' ') + "\n");
    free_.push_back(line);
  }
  remember();
}

/// Changes what is known of a name, if anything is.
template <typename Change>
void UncleanFile::change(const std::string& export_name, Change change) noexcept {
  try {
    const std::string name = printable(export_name);
    const std::lock_guard lock(mutex_);
    if (const auto entry = entries_.find(name); entry != entries_.end()) {
      change(entry->second);
      forget_unneeded(entry);
    }
  } catch (const std::exception&) {
    // What the file says more than is true does no harm.
  }
}

void UncleanFile::lose(const std::string& export_name) noexcept {
  change(export_name, [this](Entry& entry) {
    if (std::exchange(entry.lost, true))
      return;
    entry.lost_lately = !seen();
    entry.told = false;
    ++lost_;
  });
}

void UncleanFile::release(const std::string& export_name) noexcept {
  change(export_name, [](Entry& entry) { --entry.holders; });
}

void UncleanFile::begin_anew(const std::string& export_name) noexcept {
  if (lost_ == 0)
    return;
  change(export_name, [this](Entry& entry) {
    if (entry.lost)
      found(entry);
  });
}

void UncleanFile::refuse_if_lost(const std::string& export_name) {
  if (lost_ == 0)
    return;
  const std::string name = printable(export_name);
  const std::lock_guard lock(mutex_);
  const auto find_lost = [&] {
    const auto entry = entries_.find(name);
    return entry == entries_.end() || !entry->second.lost ? nullptr : &entry->second;
  };
  if (find_lost() == nullptr)
    return;
  try {
    static_cast<void>(follow_operator());
  } catch (const std::system_error&) {
    // What is known stands.
  }
  Entry* const lost = find_lost();
  if (lost == nullptr)
    return;
  if (!std::exchange(lost->told, true))
    complain_(
        "export \"" + name +
        "\": bytes that had been acknowledged were lost, most likely when an earlier server ended: "
        "writes and flushes fail until an image is begun anew, or the name is removed from " +
        printable(path_));
  throw Lost();
}

} // namespace qcowcache
