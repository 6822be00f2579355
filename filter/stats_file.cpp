#include "stats_file.hpp"

#include <cerrno>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <memory>
#include <system_error>
#include <unistd.h>

namespace qcowcache {

namespace {

struct Close {
  void operator()(std::FILE* file) const noexcept { static_cast<void>(std::fclose(file)); }
};
using File = std::unique_ptr<std::FILE, Close>;

[[noreturn]] void fail() {
  throw std::system_error(errno, std::generic_category());
}

/// Makes a file that was not there, so that nobody else's is written to.
File create(const std::string& path) {
  File file(std::fopen(path.c_str(), "wxe"));
  if (!file && errno == EEXIST) {
    // What an earlier process of this number left behind.
    static_cast<void>(std::remove(path.c_str()));
    file.reset(std::fopen(path.c_str(), "wxe"));
  }
  if (!file)
    fail();
  return file;
}

void fill(File file, const std::string& text) {
  if (std::fwrite(text.data(), 1, text.size(), file.get()) != text.size())
    fail();
  if (std::fclose(file.release()) != 0)
    fail();
}

} // namespace

StatsFile::~StatsFile() {
  end_thread();
}

std::string StatsFile::fault(const std::string& path) {
  const std::filesystem::path file(path);
  if (!file.is_absolute() || !file.has_filename())
    return "the absolute path of a file";
  std::error_code error;
  const std::filesystem::file_type type = std::filesystem::status(file, error).type();
  error.clear();
  if (type != std::filesystem::file_type::not_found &&
      type != std::filesystem::file_type::regular && type != std::filesystem::file_type::none)
    return "a regular file or a new one, for each report replaces it";
  const std::filesystem::path directory = file.parent_path();
  if (!std::filesystem::is_directory(directory, error) && !error)
    error = std::make_error_code(std::errc::not_a_directory);
  if (!error && access(directory.c_str(), W_OK | X_OK) != 0)
    error = std::error_code(errno, std::generic_category());
  if (error)
    return "in a directory that can be written to (" + error.message() + ")";
  return "";
}

std::string StatsFile::report() const {
  const Snapshot snapshot = take_();
  const std::filesystem::path file(path_);
  if (file.extension() == ".json")
    return json_report(snapshot);
  if (file.extension() == ".prom")
    return prometheus_report(snapshot, file.stem().string());
  return text_report(snapshot);
}

void StatsFile::write() noexcept {
  try {
    // Not a name that collectors of *.prom look at.
    const std::string fresh = path_ + "." + std::to_string(getpid()) + ".new";
    try {
      fill(create(fresh), report());
      std::filesystem::rename(fresh, path_);
      complained_ = false;
    } catch (const std::system_error& error) {
      if (!complained_)
        complain_("qcowcache-stats=" + printable(path_) + ": " + error.code().message());
      complained_ = true;
      static_cast<void>(std::remove(fresh.c_str()));
    }
  } catch (const std::bad_alloc&) {
    return; // the next report is written when there is memory again
  }
}

void StatsFile::start(std::chrono::seconds interval) {
  thread_ = std::thread([this, interval] {
    std::unique_lock lock(mutex_);
    do {
      lock.unlock();
      write();
      lock.lock();
    } while (!stop_.wait_for(lock, interval, [this] { return stopping_; }));
  });
}

void StatsFile::end_thread() noexcept {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  stop_.notify_all();
  if (thread_.joinable())
    thread_.join();
}

void StatsFile::stop() noexcept {
  end_thread();
  write();
}

} // namespace qcowcache
