#include "reports/stats_file.hpp"

#include "util/file.hpp"

#include <cstdio>
#include <exception>
#include <filesystem>
#include <system_error>

namespace qcowcache {

namespace {

void fill(File file, const std::string& text) {
  if (std::fwrite(text.data(), 1, text.size(), file.get()) != text.size())
    throw_errno();
  if (std::fclose(file.release()) != 0)
    throw_errno();
}

} // namespace

StatsFile::~StatsFile() {
  end_thread();
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
    const std::string fresh = fresh_name(path_);
    try {
      fill(create_file(fresh), report());
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
