// The door: nbdkit's callbacks. Each turns C into C++, asks the room that knows, and turns what
// comes back, an exception included, into C again.

#include "cached_image.hpp"
#include "connection.hpp"
#include "events.hpp"
#include "export.hpp"
#include "file.hpp"
#include "loss_message.hpp"
#include "memory_budget.hpp"
#include "nbdkit_storage.hpp"
#include "parameters.hpp"
#include "qcow2/header.hpp"
#include "qcow2/new_image.hpp"
#include "readback_storage.hpp"
#include "size_file.hpp"
#include "statistics.hpp"
#include "stats_file.hpp"
#include "unclean_file.hpp"
#include "writeback.hpp"

#include <nbdkit-filter.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <exception>
#include <list>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <system_error>

// Set by nbdkit, before it serves, for -D qcowcache.trace=N.
extern "C" {
NBDKIT_DLL_PUBLIC int qcowcache_debug_trace = 0;
}

namespace {

using namespace qcowcache;

void complain(const std::string& line) {
  nbdkit_error("%s", line.c_str());
}

void debug(const std::string& line) {
  nbdkit_debug("qcowcache: %s", line.c_str());
}

/// nbdkit itself drops what `debug` says, but for -v.
Events events() {
  Events listeners;
  listeners.decision = debug;
  if (qcowcache_debug_trace != 0)
    listeners.trace = debug;
  return listeners;
}

void report_loss(const std::string& export_name, const Unsaved& lost) {
  nbdkit_error("qcowcache: %s", loss_message(export_name, lost).c_str());
}

void report_line(const std::string& export_name, const std::string& line) {
  nbdkit_error("qcowcache: export \"%s\": %s", printable(export_name).c_str(), line.c_str());
}

/// How long a check waits for data that may have been overtaken by the entry that names it.
/// Measured with 64 backup workers: 24 ms at most.
std::chrono::milliseconds patience(int thread_model) {
  return std::chrono::seconds(thread_model == NBDKIT_THREAD_MODEL_PARALLEL ? 2 : 0);
}

/// Whether the client that the calling thread serves, if any, is gone, or the server ends: nbdkit
/// sleeps for nobody then. It says so in a line of its own.
bool nobody_waits() {
  return nbdkit_nanosleep(0, 1) == -1;
}

/// The same storage, whose writes are read back; the operator is told of each that differs.
std::unique_ptr<Storage> read_back(std::unique_ptr<Storage> storage,
                                   const std::string& export_name) {
  // Nothing is allocated when it is called: it must not throw.
  return std::make_unique<ReadbackStorage>(
      std::move(storage),
      [name = printable(export_name)](const ByteRange& range, std::uint64_t first_difference) {
        nbdkit_error("qcowcache: export \"%s\": storage returned other bytes than were written at "
                     "%llu-%llu, from %llu on",
                     name.c_str(), static_cast<unsigned long long>(range.begin),
                     static_cast<unsigned long long>(range.end - 1),
                     static_cast<unsigned long long>(first_difference));
      });
}

/// All that lives as long as nbdkit serves.
class Server {
public:
  Server(const Parameters& parameters, int thread_model)
      : budget_(parameters.size()),
        writers_(thread_model == NBDKIT_THREAD_MODEL_PARALLEL ? parameters.writers() : 0),
        unclean_(make_unclean_file(parameters)), verifies_(parameters.verify() != Verify::off),
        writeback_([this] { tick(); }), exports_(image_settings(parameters, thread_model), budget_),
        stats_interval_(parameters.stats_interval()) {
    if (!parameters.size_file().empty()) {
      size_file_.emplace(parameters.size_file(), complain);
      follow_size();
    }
    if (!parameters.stats_file().empty())
      stats_file_.emplace(
          parameters.stats_file(), [this] { return snapshot(); }, complain);
    if (parameters.writers() > 0 && writers_ == 0)
      debug("no background writers: storage takes one request at a time");
    else
      debug(std::to_string(writers_) + " background writers");
  }

  /// Takes possession of what another server must not have.
  void open_files() const {
    if (unclean_)
      unclean_->open();
  }

  void start() {
    writeback_.start(writers_);
    decoders_.start(verifies_ ? writers_ : 0);
    if (stats_file_ && stats_interval_)
      stats_file_->start(*stats_interval_);
  }

  /// Nothing is written after this; what is left is lost.
  void stop() {
    writeback_.stop();
    decoders_.stop();
    exports_.report_left();
    if (stats_file_)
      stats_file_->stop();
  }

  void tick() {
    follow_size();
    if (unclean_)
      unclean_->follow();
  }

  /// What requests have to see to: a new size counts at once, and without background writers nobody
  /// ticks.
  void before_request() {
    if (writers_ == 0)
      tick();
    else
      follow_size();
  }

  /// Takes over a new size from qcowcache-size-file.
  void follow_size() {
    if (!size_file_)
      return;
    if (const std::optional<std::uint64_t> size = size_file_->changed()) {
      debug("memory for cached data is now " + std::to_string(*size) + " bytes");
      budget_.set_limit(*size);
    }
  }

  /// nullptr: nobody wants to know.
  [[nodiscard]] UncleanFile* unclean() const noexcept { return unclean_.get(); }

  Connection* open(std::string export_name) {
    auto connection = std::make_unique<Connection>(exports_, std::move(export_name));
    const std::lock_guard lock(mutex_);
    connections_.push_back(std::move(connection));
    return connections_.back().get();
  }

  void close(Connection* connection) {
    connection->end();
    std::list<std::unique_ptr<Connection>> closed;
    const std::lock_guard lock(mutex_);
    const auto found = std::ranges::find_if(
        connections_, [&](const auto& candidate) { return candidate.get() == connection; });
    if (found != connections_.end())
      closed.splice(closed.begin(), connections_, found);
  }

private:
  static std::unique_ptr<UncleanFile> make_unclean_file(const Parameters& parameters) {
    if (parameters.unclean_file().empty())
      return nullptr;
    return std::make_unique<UncleanFile>(parameters.unclean_file(), complain);
  }

  /// REQUIRES: all that the settings name has been made.
  Image::Settings image_settings(const Parameters& parameters, int thread_model) {
    Image::Settings settings;
    settings.cluster_size = parameters.cluster_size();
    settings.max_write = parameters.max_write();
    settings.expire = parameters.expire();
    settings.max_delay = parameters.max_delay();
    settings.reserve = parameters.reserve();
    settings.unclean = unclean_.get();
    settings.writeback = writers_ > 0 ? &writeback_ : nullptr;
    settings.report_loss = report_loss;
    settings.statistics = &statistics_;
    settings.events = events();
    settings.verify = verifies_;
    settings.patience = patience(thread_model);
    settings.report_damage = report_line;
    settings.decoders = writers_ > 0 ? &decoders_ : nullptr;
    settings.interrupted = nobody_waits;
    settings.verify_everything = parameters.verify() == Verify::all;
    settings.report_disk = report_line;
    settings.lend = thread_model == NBDKIT_THREAD_MODEL_PARALLEL;
    return settings;
  }

  [[nodiscard]] Snapshot snapshot() const {
    Snapshot taken = statistics_.snapshot();
    const std::chrono::nanoseconds elapsed = std::chrono::steady_clock::now() - began_;
    taken.elapsed_nanoseconds = static_cast<std::uint64_t>(elapsed.count());
    taken.memory_limit_bytes = budget_.limit();
    taken.memory_used_bytes = budget_.used();
    taken.memory_peak_bytes = budget_.peak();
    return taken;
  }

  const std::chrono::steady_clock::time_point began_ = std::chrono::steady_clock::now();
  Statistics statistics_;
  MemoryBudget budget_;
  std::optional<SizeFile> size_file_;
  /// nbdkit guards a plugin that is not parallel with locks that only its own threads hold, so
  /// background writers are for parallel ones only.
  const unsigned writers_;
  const std::unique_ptr<UncleanFile> unclean_;
  const bool verifies_;
  Writeback writeback_;
  Writeback decoders_;
  Exports exports_;
  const std::optional<std::chrono::seconds> stats_interval_;
  std::optional<StatsFile> stats_file_;
  std::mutex mutex_;
  /// Owned here and not by nbdkit, which does not close what SIGTERM cuts off.
  std::list<std::unique_ptr<Connection>> connections_;
};

int times_loaded = 0;
Parameters parameters;
std::unique_ptr<Server> server;

Connection& connection_of(void* handle) {
  return *static_cast<Connection*>(handle);
}

/// Runs `work`; no exception gets past it. On failure reports one line and returns the errno.
template <typename Work>
int errno_of(const char* what, Work work) noexcept {
  try {
    work();
    return 0;
  } catch (const Verifier::Interrupted& end) {
    return end.code().value(); // the check at the connection's end tells what it could not do
  } catch (const UncleanFile::Lost& lost) {
    return lost.code().value(); // the operator has been told once
  } catch (const std::system_error& error) {
    nbdkit_error("qcowcache: %s: %s", what, error.what());
    return error.code().value() != 0 ? error.code().value() : EIO;
  } catch (const std::bad_alloc&) {
    nbdkit_error("qcowcache: %s: out of memory", what);
    return ENOMEM;
  } catch (const std::exception& error) {
    nbdkit_error("qcowcache: %s: %s", what, error.what());
    return EIO;
  }
}

/// The same for requests: 0, or -1 and the errno in `err`.
template <typename Work>
int serve(const char* what, int* err, Work work) noexcept {
  const int error = errno_of(what, work);
  if (error == 0)
    return 0;
  // nbdkit takes these two as "do it another way", which is only right for a fast zero.
  *err = error == ENOTSUP || error == EOPNOTSUPP ? EIO : error;
  return -1;
}

void filter_load() {
  ++times_loaded;
}

void filter_unload() {
  server.reset();
  times_loaded = 0;
}

int filter_config(nbdkit_next_config* next, nbdkit_backend* backend, const char* key,
                  const char* value) {
  try {
    if (parameters.set(key, value))
      return 0;
  } catch (const std::exception& error) {
    nbdkit_error("%s", error.what());
    return -1;
  }
  return next(backend, key, value);
}

int filter_config_complete(nbdkit_next_config_complete* next, nbdkit_backend* backend) {
  if (times_loaded > 1) {
    nbdkit_error("qcowcache: the filter can only be used once in a chain, it is named %d times",
                 times_loaded);
    return -1;
  }
  try {
    parameters.check();
  } catch (const std::exception& error) {
    nbdkit_error("%s", error.what());
    return -1;
  }
  return next(backend);
}

int filter_get_ready(int thread_model) {
  const int error =
      errno_of("get_ready", [&] { server = std::make_unique<Server>(parameters, thread_model); });
  return error == 0 ? 0 : -1;
}

int filter_after_fork(nbdkit_backend* /*backend*/) {
  // Again, for nbdkit may have become another user.
  if (const std::string& file = parameters.stats_file(); !file.empty()) {
    if (const std::string fault = file_fault(file); !fault.empty()) {
      nbdkit_error("qcowcache-stats=%s: must be %s", printable(file).c_str(), fault.c_str());
      return -1;
    }
  }
  const int error = errno_of("qcowcache-unclean", [] { server->open_files(); });
  return error == 0 && errno_of("background threads", [] { server->start(); }) == 0 ? 0 : -1;
}

void filter_cleanup(nbdkit_backend* /*backend*/) {
  if (!server)
    return;
  errno_of("cleanup", [] { server->stop(); });
}

void* filter_open(nbdkit_next_open* next, nbdkit_context* context, int readonly,
                  const char* export_name, int /*is_tls*/) {
  if (next(context, readonly, export_name) == -1)
    return nullptr;
  void* handle = nullptr;
  errno_of("open", [&] { handle = server->open(export_name); });
  return handle;
}

int filter_prepare(nbdkit_next* next, void* handle, int /*readonly*/) {
  const int error = errno_of("prepare", [&] {
    Connection& connection = connection_of(handle);
    std::unique_ptr<Storage> storage = std::make_unique<NbdkitStorage>(next);
    if (parameters.readback())
      storage = read_back(std::move(storage), connection.export_name());
    connection.begin(std::move(storage));
  });
  return error == 0 ? 0 : -1;
}

int filter_finalize(nbdkit_next* /*next*/, void* handle) {
  connection_of(handle).drain();
  connection_of(handle).end();
  return 0; // an error here would keep the layers below from being finalized
}

void filter_close(void* handle) {
  errno_of("close", [&] { server->close(&connection_of(handle)); });
}

std::int64_t filter_get_size(nbdkit_next* /*next*/, void* handle) {
  return static_cast<std::int64_t>(connection_of(handle).capabilities().size);
}

int filter_block_size(nbdkit_next* /*next*/, void* handle, std::uint32_t* minimum,
                      std::uint32_t* preferred, std::uint32_t* maximum) {
  const Connection& connection = connection_of(handle);
  // Said even though it is the default: without it clients complete sectors themselves.
  *minimum = 1;
  // The image's clusters may be larger, but nothing of it is read as long as nobody asks for data.
  *preferred = static_cast<std::uint32_t>(
      std::max({WriteCache::least_unit_size, parameters.cluster_size().value_or(0),
                std::uint64_t{connection.capabilities().preferred}}));
  *maximum = UINT32_MAX;
  return 0;
}

int filter_can_flush(nbdkit_next* /*next*/, void* handle) {
  // A flush of what nobody can write is a question for the image, where all of it is checked.
  const Capabilities& storage = connection_of(handle).capabilities();
  return storage.can_write || storage.can_flush || parameters.verify() == Verify::all ? 1 : 0;
}

int filter_can_fua(nbdkit_next* /*next*/, void* handle) {
  const Capabilities& storage = connection_of(handle).capabilities();
  if (storage.can_write || storage.fua == Fua::native)
    return NBDKIT_FUA_NATIVE;
  return storage.fua == Fua::emulate ? NBDKIT_FUA_EMULATE : NBDKIT_FUA_NONE;
}

int filter_can_zero(nbdkit_next* /*next*/, void* handle) {
  return connection_of(handle).capabilities().can_zero ? NBDKIT_ZERO_NATIVE : NBDKIT_ZERO_EMULATE;
}

void refuse_if_lost(const Connection& connection) {
  if (UncleanFile* const unclean = server->unclean(); unclean != nullptr)
    unclean->refuse_if_lost(connection.export_name());
}

/// An export that has lost bytes takes no more, but for what may begin a new image.
void refuse_if_lost(const Connection& connection, std::uint64_t offset) {
  if (offset >= qcow2::header_bytes)
    refuse_if_lost(connection);
}

void begin_anew(const Connection& connection) {
  if (UncleanFile* const unclean = server->unclean(); unclean != nullptr)
    unclean->begin_anew(connection.export_name());
}

int filter_pread(nbdkit_next* /*next*/, void* handle, void* buffer, std::uint32_t count,
                 std::uint64_t offset, std::uint32_t /*flags*/, int* err) {
  return serve("read", err, [&] {
    const Connection::InUse in_use =
        connection_of(handle).in_use({false, {offset, offset + count}});
    const std::span data{static_cast<std::byte*>(buffer), count};
    in_use.cache.read(in_use.use.storage(), offset, data);
    if (in_use.verifier != nullptr)
      in_use.verifier->client_read([&] { return in_use.cache.header().header; }, offset, data);
  });
}

int filter_pwrite(nbdkit_next* /*next*/, void* handle, const void* buffer, std::uint32_t count,
                  std::uint64_t offset, std::uint32_t flags, int* err) {
  return serve("write", err, [&] {
    server->before_request();
    refuse_if_lost(connection_of(handle), offset);
    const Connection::InUse in_use = connection_of(handle).in_use({true, {offset, offset + count}});
    const std::span data{static_cast<const std::byte*>(buffer), count};
    CachedImage image(in_use.cache, in_use.use.storage());
    Verifier::Change change(in_use.verifier, image, {offset, offset + count});
    in_use.cache.write(in_use.use.storage(), offset, data, (flags & NBDKIT_FLAG_FUA) != 0);
    change.wrote(data);
    if (qcow2::begins_image(offset, data))
      begin_anew(connection_of(handle));
  });
}

bool damage_fails_a_flush() {
  return parameters.verify() == Verify::error || parameters.verify() == Verify::all;
}

/// What cannot be checked because storage cannot be read is no better than damage, and worth no
/// more than a warning where damage is not.
Verifier::Outcome check(const Connection::InUse& in_use, const std::string& export_name) {
  try {
    return in_use.check();
  } catch (const Verifier::Interrupted&) {
    throw;
  } catch (const std::exception& error) {
    if (damage_fails_a_flush())
      throw;
    report_line(export_name,
                std::string("compressed clusters could not be checked: ") + error.what());
    return Verifier::Outcome::damaged;
  }
}

int filter_flush(nbdkit_next* /*next*/, void* handle, std::uint32_t /*flags*/, int* err) {
  return serve("flush", err, [&] {
    server->before_request();
    Connection& connection = connection_of(handle);
    const Connection::InUse in_use = connection.in_use({});
    in_use.cache.flush(in_use.use.storage());
    refuse_if_lost(connection);
    if (check(in_use, connection.export_name()) == Verifier::Outcome::damaged &&
        damage_fails_a_flush())
      throw std::system_error(EIO, std::generic_category(),
                              "export \"" + printable(connection.export_name()) +
                                  "\": " + std::to_string(in_use.verifier->failing()) +
                                  " compressed clusters cannot be read");
  });
}

int filter_trim(nbdkit_next* /*next*/, void* handle, std::uint32_t count, std::uint64_t offset,
                std::uint32_t flags, int* err) {
  return serve("trim", err, [&] {
    refuse_if_lost(connection_of(handle), offset);
    const Connection::InUse in_use = connection_of(handle).in_use({true, {offset, offset + count}});
    CachedImage image(in_use.cache, in_use.use.storage());
    const Verifier::Change change(in_use.verifier, image, {offset, offset + count});
    in_use.cache.trim(in_use.use.storage(), {offset, offset + count},
                      (flags & NBDKIT_FLAG_FUA) != 0);
  });
}

int filter_zero(nbdkit_next* /*next*/, void* handle, std::uint32_t count, std::uint64_t offset,
                std::uint32_t flags, int* err) {
  Storage::ZeroOptions options;
  options.may_trim = (flags & NBDKIT_FLAG_MAY_TRIM) != 0;
  options.fua = (flags & NBDKIT_FLAG_FUA) != 0;
  options.fast = (flags & NBDKIT_FLAG_FAST_ZERO) != 0;
  bool not_fast = false;
  const int result = serve("zero", err, [&] {
    refuse_if_lost(connection_of(handle), offset);
    const Connection::InUse in_use = connection_of(handle).in_use({true, {offset, offset + count}});
    CachedImage image(in_use.cache, in_use.use.storage());
    Verifier::Change change(in_use.verifier, image, {offset, offset + count});
    try {
      in_use.cache.zero(in_use.use.storage(), {offset, offset + count}, options);
      change.zeroed();
      if (offset == 0 && count >= sizeof qcow2::header_magic)
        begin_anew(connection_of(handle));
    } catch (const std::system_error& error) {
      not_fast = options.fast && (error.code() == std::errc::not_supported ||
                                  error.code() == std::errc::operation_not_supported);
      if (!not_fast)
        throw;
    }
  });
  if (!not_fast)
    return result;
  *err = ENOTSUP; // an answer, not a failure: there is nothing to report
  return -1;
}

int filter_extents(nbdkit_next* /*next*/, void* handle, std::uint32_t count, std::uint64_t offset,
                   std::uint32_t flags, nbdkit_extents* extents, int* err) {
  return serve("extents", err, [&] {
    const Connection::InUse in_use =
        connection_of(handle).in_use({false, {offset, offset + count}});
    for (const Storage::Extent& extent : in_use.cache.extents(
             in_use.use.storage(), {offset, offset + count}, (flags & NBDKIT_FLAG_REQ_ONE) != 0)) {
      const bool hole = extent.type == Storage::ExtentType::hole ||
                        extent.type == Storage::ExtentType::hole_and_zero;
      const bool zero = extent.type == Storage::ExtentType::zero ||
                        extent.type == Storage::ExtentType::hole_and_zero;
      const std::uint32_t type =
          (hole ? NBDKIT_EXTENT_HOLE : 0U) | (zero ? NBDKIT_EXTENT_ZERO : 0U);
      if (nbdkit_add_extent(extents, extent.range.begin, extent.range.size(), type) == -1)
        throw std::system_error(errno, std::generic_category(), "extents");
    }
  });
}

int filter_cache(nbdkit_next* /*next*/, void* handle, std::uint32_t count, std::uint64_t offset,
                 std::uint32_t /*flags*/, int* err) {
  const int error = errno_of("cache", [&] {
    // A hint, which nbdkit's readahead filter gives after .finalize, too.
    const std::optional<Handle::Use> use = connection_of(handle).storage_if_any();
    if (!use || !use->storage().capabilities().can_cache)
      return;
    Storage& storage = use->storage();
    const ByteRange range{offset, offset + count};
    storage.cache(align_outward(range, storage.capabilities().minimum));
  });
  // That filter passes no `err`.
  if (error == 0 || err == nullptr)
    return 0;
  *err = error;
  return -1;
}

nbdkit_filter make_filter() {
  nbdkit_filter filter = nbdkit_filter();
  filter.name = "qcowcache";
  filter.longname = "nbdkit qcow2 write cache filter";
  filter.description = "Collects compressed qcow2 clusters in memory and writes each host cluster "
                       "once, whole and aligned.";
  filter.load = filter_load;
  filter.unload = filter_unload;
  filter.config = filter_config;
  filter.config_complete = filter_config_complete;
  filter.config_help = Parameters::help();
  filter.get_ready = filter_get_ready;
  filter.after_fork = filter_after_fork;
  filter.cleanup = filter_cleanup;
  filter.open = filter_open;
  filter.close = filter_close;
  filter.prepare = filter_prepare;
  filter.finalize = filter_finalize;
  filter.get_size = filter_get_size;
  filter.block_size = filter_block_size;
  filter.can_flush = filter_can_flush;
  filter.can_fua = filter_can_fua;
  filter.can_zero = filter_can_zero;
  filter.pread = filter_pread;
  filter.pwrite = filter_pwrite;
  filter.flush = filter_flush;
  filter.trim = filter_trim;
  filter.zero = filter_zero;
  filter.extents = filter_extents;
  filter.cache = filter_cache;
  return filter;
}

nbdkit_filter filter = make_filter();

} // namespace

NBDKIT_REGISTER_FILTER(filter)
