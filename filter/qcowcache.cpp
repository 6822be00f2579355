// The door: nbdkit's callbacks. Each turns C into C++, asks the room that knows, and turns what
// comes back, an exception included, into C again.

#include "connection.hpp"
#include "parameters.hpp"
#include "server.hpp"
#include "storage/nbdkit_storage.hpp"
#include "util/answer.hpp"

#include <nbdkit-filter.h>

#include <algorithm>
#include <cerrno>
#include <exception>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <system_error>

// Set by nbdkit, before it serves, for -D qcowcache.trace=N.
extern "C" {
NBDKIT_DLL_PUBLIC int qcowcache_debug_trace = 0;
}

namespace {

using namespace qcowcache;

int times_loaded = 0;
Parameters parameters;
std::unique_ptr<Server> server;

/// nbdkit as the server sees it, which drops what is told but for -v.
Host host(int thread_model) {
  const auto debug = [](const std::string& line) { nbdkit_debug("qcowcache: %s", line.c_str()); };
  Host nbdkit;
  nbdkit.complain = [](const std::string& line) { nbdkit_error("%s", line.c_str()); };
  nbdkit.events.decision = debug;
  if (qcowcache_debug_trace != 0)
    nbdkit.events.trace = debug;
  // nbdkit sleeps for nobody who is gone, and says so in a line of its own.
  nbdkit.interrupted = [] { return nbdkit_nanosleep(0, 1) == -1; };
  // It guards other plugins with locks that only its own threads hold.
  nbdkit.parallel = thread_model == NBDKIT_THREAD_MODEL_PARALLEL;
  return nbdkit;
}

Connection& connection_of(void* handle) {
  return *static_cast<Connection*>(handle);
}

/// Runs `work`; no exception gets past it. On failure reports one line and returns the errno.
template <typename Work>
int errno_of(const char* what, Work work) noexcept {
  try {
    work();
    return 0;
  } catch (const Answer& answer) {
    return answer.code().value();
  } catch (const std::system_error& error) {
    nbdkit_error("qcowcache: %s: %s", what, error.what());
    // nbdkit takes these two as "do it another way", which is only right for a fast zero.
    const bool another_way = error.code() == std::errc::not_supported ||
                             error.code() == std::errc::operation_not_supported;
    return another_way || !error.code() ? EIO : error.code().value();
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
  if (err != nullptr) // nbdkit's readahead filter passes none
    *err = error;
  return -1;
}

/// The same for the command line, whose errors are lines of their own.
template <typename Work>
int configure(Work work) noexcept {
  try {
    work();
    return 0;
  } catch (const std::exception& error) {
    nbdkit_error("%s", error.what());
    return -1;
  }
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
  bool is_ours = false;
  if (configure([&] { is_ours = parameters.set(key, value); }) == -1)
    return -1;
  return is_ours ? 0 : next(backend, key, value);
}

int filter_config_complete(nbdkit_next_config_complete* next, nbdkit_backend* backend) {
  if (times_loaded > 1) {
    nbdkit_error("qcowcache: the filter can only be used once in a chain, it is named %d times",
                 times_loaded);
    return -1;
  }
  return configure([] { parameters.check(); }) == 0 ? next(backend) : -1;
}

int filter_get_ready(int thread_model) {
  const int error = errno_of(
      "get_ready", [&] { server = std::make_unique<Server>(parameters, host(thread_model)); });
  return error == 0 ? 0 : -1;
}

int filter_after_fork(nbdkit_backend* /*backend*/) {
  const bool good = configure([] { parameters.check_stats_file(); }) == 0 &&
                    errno_of("qcowcache-unclean", [] { server->open_files(); }) == 0 &&
                    errno_of("background threads", [] { server->start(); }) == 0;
  return good ? 0 : -1;
}

void filter_cleanup(nbdkit_backend* /*backend*/) {
  if (server)
    errno_of("cleanup", [] { server->stop(); });
}

void* filter_open(nbdkit_next_open* next, nbdkit_context* context, int readonly,
                  const char* export_name, int /*is_tls*/) {
  if (next(context, readonly, export_name) == -1)
    return nullptr;
  void* handle = nullptr;
  errno_of("open", [&] { handle = &server->open(export_name); });
  return handle;
}

int filter_prepare(nbdkit_next* next, void* handle, int /*readonly*/) {
  const int error = errno_of("prepare", [&] {
    server->begin(connection_of(handle), std::make_unique<NbdkitStorage>(next));
  });
  return error == 0 ? 0 : -1;
}

int filter_finalize(nbdkit_next* /*next*/, void* handle) {
  connection_of(handle).drain();
  connection_of(handle).end();
  return 0; // an error here would keep the layers below from being finalized
}

void filter_close(void* handle) {
  errno_of("close", [&] { server->close(connection_of(handle)); });
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
  return connection_of(handle).can_flush() ? 1 : 0;
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

int filter_pread(nbdkit_next* /*next*/, void* handle, void* buffer, std::uint32_t count,
                 std::uint64_t offset, std::uint32_t /*flags*/, int* err) {
  return serve("read", err, [&] {
    connection_of(handle).read(offset, {static_cast<std::byte*>(buffer), count});
  });
}

int filter_pwrite(nbdkit_next* /*next*/, void* handle, const void* buffer, std::uint32_t count,
                  std::uint64_t offset, std::uint32_t flags, int* err) {
  return serve("write", err, [&] {
    connection_of(handle).write(offset, {static_cast<const std::byte*>(buffer), count},
                                (flags & NBDKIT_FLAG_FUA) != 0);
  });
}

int filter_flush(nbdkit_next* /*next*/, void* handle, std::uint32_t /*flags*/, int* err) {
  return serve("flush", err, [&] { connection_of(handle).flush(); });
}

int filter_trim(nbdkit_next* /*next*/, void* handle, std::uint32_t count, std::uint64_t offset,
                std::uint32_t flags, int* err) {
  return serve("trim", err, [&] {
    connection_of(handle).trim({offset, offset + count}, (flags & NBDKIT_FLAG_FUA) != 0);
  });
}

int filter_zero(nbdkit_next* /*next*/, void* handle, std::uint32_t count, std::uint64_t offset,
                std::uint32_t flags, int* err) {
  Storage::ZeroOptions options;
  options.may_trim = (flags & NBDKIT_FLAG_MAY_TRIM) != 0;
  options.fua = (flags & NBDKIT_FLAG_FUA) != 0;
  options.fast = (flags & NBDKIT_FLAG_FAST_ZERO) != 0;
  return serve("zero", err, [&] { connection_of(handle).zero({offset, offset + count}, options); });
}

std::uint32_t nbd_type(Storage::ExtentType type) {
  using Type = Storage::ExtentType;
  const bool hole = type == Type::hole || type == Type::hole_and_zero;
  const bool zero = type == Type::zero || type == Type::hole_and_zero;
  return (hole ? NBDKIT_EXTENT_HOLE : 0U) | (zero ? NBDKIT_EXTENT_ZERO : 0U);
}

int filter_extents(nbdkit_next* /*next*/, void* handle, std::uint32_t count, std::uint64_t offset,
                   std::uint32_t flags, nbdkit_extents* extents, int* err) {
  return serve("extents", err, [&] {
    const bool only_first = (flags & NBDKIT_FLAG_REQ_ONE) != 0;
    for (const Storage::Extent& extent :
         connection_of(handle).extents({offset, offset + count}, only_first)) {
      if (nbdkit_add_extent(extents, extent.range.begin, extent.range.size(),
                            nbd_type(extent.type)) == -1)
        throw std::system_error(errno, std::generic_category(), "extents");
    }
  });
}

int filter_cache(nbdkit_next* /*next*/, void* handle, std::uint32_t count, std::uint64_t offset,
                 std::uint32_t /*flags*/, int* err) {
  return serve("cache", err, [&] { connection_of(handle).cache({offset, offset + count}); });
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
