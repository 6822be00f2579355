#include "server.hpp"

#include "reports/loss_message.hpp"
#include "storage/readback_storage.hpp"

#include <algorithm>
#include <new>
#include <string_view>
#include <utility>

namespace qcowcache {

namespace {

/// How long a check waits for data that may have been overtaken by the entry that names it.
/// Measured with 64 backup workers: 24 ms at most.
constexpr std::chrono::seconds patience{2};

constexpr std::string_view block_sizes_failed =
    "storage failed to tell its block sizes, and is taken to have none, so that it may have to "
    "rewrite a large block for each write (nbdkit allows no minimum above 64K, which is what the "
    "S3 plugin of nbdkit 1.32 asks for): put --filter=blocksize-policy below this filter, with "
    "blocksize-minimum=1 blocksize-preferred=SIZE blocksize-maximum=SIZE, where SIZE is that of "
    "its blocks, such as object-size";

std::unique_ptr<UncleanFile> make_unclean_file(const Parameters& parameters, const Host& host) {
  if (parameters.unclean_file().empty())
    return nullptr;
  return std::make_unique<UncleanFile>(parameters.unclean_file(), host.complain);
}

} // namespace

Server::Server(const Parameters& parameters, Host host)
    : host_(std::move(host)), budget_(parameters.size()),
      writers_(host_.parallel ? parameters.writers() : 0),
      unclean_(make_unclean_file(parameters, host_)), verifies_(parameters.verify() != Verify::off),
      reads_back_(parameters.readback()), writeback_([this] { tick(); }),
      exports_(image_settings(parameters), budget_), stats_interval_(parameters.stats_interval()) {
  if (!parameters.size_file().empty()) {
    size_file_.emplace(parameters.size_file(), host_.complain);
    follow_size();
  }
  if (!parameters.stats_file().empty())
    stats_file_.emplace(
        parameters.stats_file(), [this] { return snapshot(); }, host_.complain);
  tell(host_.events.decision, [&] {
    return parameters.writers() > 0 && writers_ == 0
               ? std::string("no background writers: storage takes one request at a time")
               : std::to_string(writers_) + " background writers";
  });
}

void Server::open_files() const {
  if (unclean_)
    unclean_->open();
}

void Server::start() {
  writeback_.start(writers_);
  decoders_.start(verifies_ ? writers_ : 0);
  if (stats_file_ && stats_interval_)
    stats_file_->start(*stats_interval_);
}

void Server::stop() {
  writeback_.stop();
  decoders_.stop();
  exports_.report_left();
  if (stats_file_)
    stats_file_->stop();
}

Connection& Server::open(std::string export_name) {
  auto connection = std::make_unique<Connection>(exports_, std::move(export_name));
  const std::lock_guard lock(mutex_);
  connections_.push_back(std::move(connection));
  return *connections_.back();
}

void Server::begin(Connection& connection, std::unique_ptr<Storage> storage) {
  if (storage->capabilities().block_sizes_failed && !told_block_sizes_failed_.exchange(true))
    report(connection.export_name(), block_sizes_failed);
  if (reads_back_) {
    const auto report = [this, name = connection.export_name()](const ByteRange& range,
                                                                std::uint64_t first_difference) {
      try {
        this->report(name, "storage returned other bytes than were written at " + to_string(range) +
                               ", from " + std::to_string(first_difference) + " on");
      } catch (const std::bad_alloc&) {
        return; // the client gets an error
      }
    };
    storage = std::make_unique<ReadbackStorage>(std::move(storage), report);
  }
  connection.begin(std::move(storage));
}

void Server::close(Connection& connection) {
  connection.end();
  std::list<std::unique_ptr<Connection>> closed;
  const std::lock_guard lock(mutex_);
  const auto found = std::ranges::find_if(
      connections_, [&](const auto& candidate) { return candidate.get() == &connection; });
  if (found != connections_.end())
    closed.splice(closed.begin(), connections_, found);
}

/// REQUIRES: all that the settings name has been made.
Image::Settings Server::image_settings(const Parameters& parameters) {
  const auto report = [this](const std::string& export_name, const std::string& line) {
    this->report(export_name, line);
  };
  Image::Settings settings;
  settings.cluster_size = parameters.cluster_size();
  settings.max_write = parameters.max_write();
  settings.expire = parameters.expire();
  settings.max_delay = parameters.max_delay();
  settings.reserve = parameters.reserve();
  settings.unclean = unclean_.get();
  settings.writeback = writers_ > 0 ? &writeback_ : nullptr;
  settings.report_loss = [this](const std::string& export_name, const Unsaved& lost) {
    host_.complain("qcowcache: " + loss_message(export_name, lost));
  };
  settings.statistics = &statistics_;
  settings.events = host_.events;
  settings.verify = verifies_;
  settings.patience = host_.parallel ? patience : std::chrono::seconds(0);
  settings.report_damage = report;
  settings.decoders = writers_ > 0 ? &decoders_ : nullptr;
  settings.interrupted = host_.interrupted;
  settings.verify_everything = parameters.verify() == Verify::all;
  settings.damage_fails_flush =
      parameters.verify() == Verify::error || parameters.verify() == Verify::all;
  settings.report_disk = report;
  settings.report_short_of_memory = [this](const std::string& export_name, std::uint64_t preferred,
                                           std::uint64_t unit_size) {
    if (!told_short_of_memory_.exchange(true))
      this->report(export_name,
                   "qcowcache-size, now " + std::to_string(budget_.limit()) +
                       ", is too small for units as large as the blocks of " +
                       std::to_string(preferred) + " bytes that storage prefers: units are of " +
                       std::to_string(unit_size) +
                       " bytes; memory for eight such blocks is needed, and for four for each "
                       "export that is written to");
  };
  settings.lend = host_.parallel;
  settings.before_request = [this] { before_request(); };
  return settings;
}

/// A new size counts at once, and without background writers nobody else ticks.
void Server::before_request() {
  if (writers_ == 0)
    tick();
  else
    follow_size();
}

void Server::tick() {
  follow_size();
  if (unclean_)
    unclean_->follow();
}

void Server::follow_size() {
  if (!size_file_)
    return;
  if (const std::optional<std::uint64_t> size = size_file_->changed()) {
    tell(host_.events.decision,
         [&] { return "memory for cached data is now " + std::to_string(*size) + " bytes"; });
    budget_.set_limit(*size);
  }
}

Snapshot Server::snapshot() const {
  Snapshot taken = statistics_.snapshot();
  const std::chrono::nanoseconds elapsed = std::chrono::steady_clock::now() - began_;
  taken.elapsed_nanoseconds = static_cast<std::uint64_t>(elapsed.count());
  taken.memory_limit_bytes = budget_.limit();
  taken.memory_used_bytes = budget_.used();
  taken.memory_peak_bytes = budget_.peak();
  return taken;
}

void Server::report(const std::string& export_name, std::string_view line) const {
  std::string message = "qcowcache: export \"" + printable(export_name) + "\": ";
  host_.complain(message.append(line));
}

} // namespace qcowcache
