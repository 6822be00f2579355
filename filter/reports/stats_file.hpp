#pragma once

#include "reports/statistics.hpp"

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

namespace qcowcache {

/// The file that statistics are reported in, in the form that its name asks for: `*.json`, `*.prom`
/// (Prometheus' text format), otherwise text for people.
///
/// Whoever reads it finds a whole report: each is written to a new file beside it, which then takes
/// its place (and its permissions, as the process' umask has them). Reports while nbdkit serves are
/// written by a thread of their own. Background writers are not there in every thread model, and
/// what they and their clock do must not wait for a slow directory; a client's request even less.
///
/// `start` and `stop` are for one thread.
class StatsFile {
public:
  /// `path` is absolute. `take` is called for each report. `complain` is told, in one line, of a
  /// report that could not be written, and again only after one has been.
  StatsFile(std::string path, std::function<Snapshot()> take,
            std::function<void(const std::string&)> complain)
      : path_(std::move(path)), take_(std::move(take)), complain_(std::move(complain)) {}
  StatsFile(const StatsFile&) = delete;
  StatsFile& operator=(const StatsFile&) = delete;
  /// Ends the thread, and writes nothing.
  ~StatsFile();

  /// Writes a report now, and again whenever `interval` has passed. Throws std::system_error when
  /// there is no thread to be had.
  void start(std::chrono::seconds interval);
  /// Ends that, and writes the last report.
  void stop() noexcept;

private:
  void end_thread() noexcept;
  void write() noexcept;
  [[nodiscard]] std::string report() const;

  const std::string path_;
  const std::function<Snapshot()> take_;
  const std::function<void(const std::string&)> complain_;
  bool complained_ = false;

  std::mutex mutex_;
  std::condition_variable stop_;
  bool stopping_ = false;
  std::thread thread_;
};

} // namespace qcowcache
