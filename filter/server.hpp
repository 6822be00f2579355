#pragma once

#include "connection.hpp"
#include "export.hpp"
#include "memory/memory_budget.hpp"
#include "memory/writeback.hpp"
#include "parameters.hpp"
#include "reports/statistics.hpp"
#include "reports/stats_file.hpp"
#include "size_file.hpp"
#include "unclean_file.hpp"
#include "util/events.hpp"

#include <atomic>
#include <chrono>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>

namespace qcowcache {

/// The program that serves clients, as far as it is asked for something. Its functions are called
/// from any thread, and must not throw.
struct Host {
  /// Tells the operator.
  std::function<void(const std::string& line)> complain;
  Events events;
  /// Whether the client that the calling thread serves, if any, is gone, or the program ends.
  std::function<bool()> interrupted;
  /// Whether storage takes several requests at a time, from any thread.
  bool parallel = false;
};

/// All that lives as long as clients are served, and what the parameters make of it.
///
/// Thread safe, but for `start` and `stop`.
class Server {
public:
  /// Throws std::system_error when a file cannot be used.
  Server(const Parameters& parameters, Host host);
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;
  ~Server() = default;

  /// Takes possession of what another server must not have. Throws std::system_error.
  void open_files() const;
  /// Background threads begin. Throws std::system_error when there can be none.
  void start();
  /// They end: nothing is written after this, and what is left is reported lost.
  void stop();

  /// A client has come; its connection lives until `close`, or as long as the server.
  Connection& open(std::string export_name);
  /// Its storage can be used from now on. The operator is told, once, of storage that failed to
  /// tell its block sizes.
  void begin(Connection& connection, std::unique_ptr<Storage> storage);
  void close(Connection& connection);

private:
  [[nodiscard]] Image::Settings image_settings(const Parameters& parameters);
  void before_request();
  void tick();
  void follow_size();
  [[nodiscard]] Snapshot snapshot() const;
  void report(const std::string& export_name, std::string_view line) const;

  const std::chrono::steady_clock::time_point began_ = std::chrono::steady_clock::now();
  const Host host_;
  Statistics statistics_;
  MemoryBudget budget_;
  std::optional<SizeFile> size_file_;
  /// Where storage takes one request at a time it may be guarded by locks that only the threads
  /// which serve clients hold: background writers are for the other kind only.
  const unsigned writers_;
  const std::unique_ptr<UncleanFile> unclean_;
  const bool verifies_;
  const bool reads_back_;
  Writeback writeback_;
  Writeback decoders_;
  Exports exports_;
  const std::optional<std::chrono::seconds> stats_interval_;
  std::optional<StatsFile> stats_file_;
  std::atomic<bool> told_block_sizes_failed_ = false;
  std::atomic<bool> told_short_of_memory_ = false;
  std::mutex mutex_;
  /// A program that ends may not close what it cuts off.
  std::list<std::unique_ptr<Connection>> connections_;
};

} // namespace qcowcache
