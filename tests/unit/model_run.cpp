#include "model_run.hpp"

#include "connection.hpp"
#include "export.hpp"
#include "image_bytes.hpp"
#include "memory_budget.hpp"
#include "memory_storage.hpp"
#include "model_bytes.hpp"
#include "writeback.hpp"

#include <algorithm>
#include <cerrno>
#include <functional>
#include <memory>
#include <set>
#include <system_error>
#include <vector>

using namespace qcowcache;

namespace {

using Bytes = std::vector<std::byte>;
using Kind = MemoryStorage::Kind;
using Verdict = MemoryStorage::Verdict;

/// The bytes before which, without a common cache, all belong to the first connection.
constexpr std::uint64_t header_end = 512;
constexpr std::uint64_t least_unit = WriteCache::least_unit_size;
/// Memory in bytes that is enough for anything.
constexpr std::size_t plenty = std::size_t{64} * 1024 * 1024;
/// No step needs so many calls of storage.
constexpr std::uint64_t endless = 20000;

/// What `value` writes at `offset`: other values at neighbouring offsets, and zeros for 0.
Bytes bytes_of(std::uint64_t value, const ByteRange& range) {
  if (value == 0)
    return Bytes(range.size());
  // Copied in pieces: loops over single bytes are slow under sanitizers.
  static const Bytes wheel = [] {
    Bytes all(std::size_t{255} * 256);
    for (std::size_t i = 0; i < all.size(); ++i)
      all[i] = static_cast<std::byte>(1 + i % 255);
    return all;
  }();
  const std::span<const std::byte> wheel_from =
      std::span(wheel).subspan((value * 37 + range.begin) % 255, wheel.size() - 255);
  Bytes bytes;
  while (bytes.size() < range.size()) {
    const auto piece = wheel_from.first(std::min(wheel_from.size(), range.size() - bytes.size()));
    bytes.insert(bytes.end(), piece.begin(), piece.end());
  }
  return bytes;
}

std::string text_of(const ByteRange& range) {
  return std::to_string(range.begin) + "-" + std::to_string(range.end);
}

std::string hexadecimal(std::byte byte) {
  constexpr const char* digits = "0123456789abcdef";
  const auto value = std::to_integer<unsigned>(byte);
  return {digits[value / 16], digits[value % 16]};
}

bool fails_call(Fails fails, Kind kind) {
  switch (fails) {
  case Fails::nothing:
    return false;
  case Fails::any:
    return true;
  default:
    return static_cast<int>(fails) - static_cast<int>(Fails::read) == static_cast<int>(kind);
  }
}

class Run {
public:
  explicit Run(const ModelSequence& sequence)
      : sequence_(sequence), setup_(sequence.setup), budget_(setup_.memory),
        exports_(settings(), budget_), most_used_(setup_.memory), next_size_(setup_.size) {
    for (std::uint64_t i = 0; i < setup_.connections; ++i) {
      if (i == 0 || setup_.sharing == Sharing::nothing)
        views_.push_back(fresh_view());
      clients_.emplace_back();
    }
  }
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;
  ~Run() = default;

  ModelResult result() {
    for (std::size_t i = 0; i < sequence_.steps.size() && broken_.empty(); ++i) {
      at_ = i;
      begin_step(sequence_.steps[i]);
      carry_out(sequence_.steps[i]);
      check_shape();
      check_budget();
    }
    if (broken_.empty()) {
      at_ = sequence_.steps.size();
      static const ModelStep nothing_fails;
      begin_step(nothing_fails);
      standing_ = {};
      finish();
    }
    if (!broken_.empty())
      result_.failure = ModelFailure{at_, broken_};
    return result_;
  }

private:
  struct View {
    std::shared_ptr<MemoryDisk> disk;
    ModelBytes model;
  };
  struct Client {
    std::unique_ptr<Connection> connection;
    /// Owned by the connection.
    MemoryStorage* storage = nullptr;
    bool cached_before = false;
    bool has_changed = false;
    /// Which of the disks it sees.
    std::size_t view = 0;
  };

  Export::Settings settings() {
    Export::Settings settings;
    if (setup_.cluster != 0)
      settings.cluster_size = setup_.cluster;
    settings.max_write = setup_.max_write;
    if (setup_.expire)
      settings.expire = std::chrono::milliseconds(0);
    if (setup_.hurried)
      settings.max_delay = std::chrono::milliseconds(1);
    settings.retry = setup_.retries ? std::chrono::milliseconds(0) : std::chrono::hours(1);
    settings.reserve = setup_.reserve;
    settings.writeback = setup_.background ? &writeback_ : nullptr;
    settings.report_loss = [this](const std::string& /*name*/, const Unsaved& lost) {
      lost_.add(lost.ranges);
      result_.lost += lost.bytes;
    };
    return settings;
  }

  View fresh_view() { return fresh_view(setup_.filled ? 251 : 0); }
  View fresh_view(std::uint64_t content) {
    Bytes initial = bytes_of(content, {0, next_size_});
    if (setup_.header != 0) {
      const Bytes header = qcow2_header(static_cast<unsigned>(setup_.header));
      std::copy_n(header.begin(), std::min(header.size(), initial.size()), initial.begin());
    }
    return {std::make_shared<MemoryDisk>(initial), ModelBytes(initial)};
  }

  [[nodiscard]] Capabilities capabilities(std::uint64_t size, bool read_only) const {
    Capabilities result;
    result.size = size;
    result.minimum = static_cast<std::uint32_t>(setup_.minimum);
    result.preferred = static_cast<std::uint32_t>(setup_.preferred);
    result.maximum = static_cast<std::uint32_t>(setup_.maximum);
    result.can_write = !read_only;
    result.can_flush = setup_.can_flush;
    result.can_trim = setup_.can_trim;
    result.can_zero = setup_.can_zero;
    result.can_fast_zero = setup_.can_fast_zero;
    result.can_extents = setup_.can_extents;
    result.can_cache = setup_.can_cache;
    result.can_multi_conn = setup_.sharing == Sharing::cache;
    result.fua = setup_.fua == ModelFua::none      ? Fua::none
                 : setup_.fua == ModelFua::emulate ? Fua::emulate
                                                   : Fua::native;
    return result;
  }

  std::unique_ptr<MemoryStorage> make_storage(std::uint64_t client, const View& view,
                                              bool read_only) {
    auto storage =
        std::make_unique<MemoryStorage>(capabilities(view.disk->size(), read_only), view.disk);
    storage->judge = [this, client](const MemoryStorage::Call& call) {
      return judge(client, call);
    };
    storage->grain = setup_.grain;
    storage->tells_one = setup_.shy;
    storage->type_of = [this](const ByteRange& part, bool zeros) { return type_of(part, zeros); };
    if (setup_.trims == Trims::keeps)
      storage->trimmed = std::nullopt;
    else if (setup_.trims == Trims::garbage)
      storage->trimmed = std::byte{0xee};
    return storage;
  }

  [[nodiscard]] Storage::ExtentType type_of(const ByteRange& part, bool zeros) const {
    using Type = Storage::ExtentType;
    const std::uint64_t number = part.begin / setup_.grain;
    if (!zeros)
      return number % 5 == 0 ? Type::hole : Type::data;
    if (setup_.shy && number % 3 == 0)
      return Type::data;
    return number % 2 == 0 ? Type::hole_and_zero : Type::zero;
  }

  // ---- What a step finds

  void begin_step(const ModelStep& step) {
    step_ = &step;
    matching_calls_ = 0;
    calls_ = 0;
    fired_.clear();
    changed_by_refused_ = false;
    trimmed_.clear();
    for (Client& client : clients_)
      client.cached_before = caches(client);
  }

  [[nodiscard]] static bool caches(const Client& client) {
    const Image* const image = client.connection ? client.connection->image() : nullptr;
    return image != nullptr && image->cache().caching();
  }

  void breaks(const std::string& promise) {
    if (broken_.empty())
      broken_ = promise;
  }

  [[nodiscard]] View& view_of(std::uint64_t client) {
    return views_[setup_.sharing == Sharing::nothing ? client : clients_[client].view];
  }
  [[nodiscard]] bool owns(std::uint64_t client, std::uint64_t offset) const {
    if (setup_.sharing != Sharing::disk)
      return true;
    return client == (offset < header_end ? 0 : offset / setup_.stripe % setup_.connections);
  }
  /// From the start of `range`, as far as one and the same client owns it.
  [[nodiscard]] ByteRange first_of_one_owner(const ByteRange& range) const {
    if (setup_.sharing != Sharing::disk)
      return range;
    const std::uint64_t border =
        range.begin < header_end ? header_end : (range.begin / setup_.stripe + 1) * setup_.stripe;
    return {range.begin, std::min(range.end, border)};
  }
  /// Calls `visit` for the parts of `range` that `client` owns, and those that it does not.
  template <typename Visit>
  void for_each_owned(std::uint64_t client, const ByteRange& range, Visit visit) const {
    for (ByteRange rest = range; !rest.empty();) {
      const ByteRange part = first_of_one_owner(rest);
      visit(part, owns(client, part.begin));
      rest.begin = part.end;
    }
  }

  /// What the step's range is for a connection that sees so much; empty: nothing to do.
  [[nodiscard]] ByteRange range_of(const ModelStep& step, bool changes) const {
    const Connection& connection = *clients_[step.connection].connection;
    const ByteRange range = ByteRange{step.offset, step.offset + step.length}.intersection(
        {0, connection.capabilities().size});
    if (range.empty() || !changes)
      return range;
    if (!connection.capabilities().can_write || !owns(step.connection, range.begin))
      return {};
    return first_of_one_owner(range);
  }

  // ---- What reaches storage

  Verdict judge(std::uint64_t client, const MemoryStorage::Call& call) {
    ++calls_;
    if (calls_ > endless) {
      breaks("storage is called without end");
      throw std::runtime_error("endless");
    }
    check_alignment(client, call);
    if (call.kind == Kind::write)
      check_content(client, call);
    if (call.kind == Kind::trim)
      trimmed_.add(call.range);
    check_budget();

    const auto refuse = [&](const ModelStep& step) {
      fired_.insert(static_cast<int>(step.error));
      ++result_.refused;
      changed_by_refused_ =
          changed_by_refused_ || step.done != Done::none || call.kind == Kind::flush;
      reads_refused_ = reads_refused_ || call.kind == Kind::read;
      return Verdict{static_cast<int>(step.error), static_cast<Verdict::Part>(step.done)};
    };
    if (call.kind == Kind::write && ++writes_ == setup_.loses_write)
      return {0, Verdict::Part::none};
    const auto concerns = [&](const ModelStep& step) {
      // Whoever cannot read cannot tell disks apart.
      return fails_call(step.fails, call.kind) && !(exchanged_ && call.kind == Kind::read);
    };
    if (step_->kind != StepKind::breaks && concerns(*step_) && ++matching_calls_ == step_->nth)
      return refuse(*step_);
    for (Standing& fault : standing_) {
      if (!concerns(fault.step))
        continue;
      ++fault.calls;
      if (fault.step.once ? fault.calls == fault.step.nth : fault.calls >= fault.step.nth)
        return refuse(fault.step);
    }
    return {};
  }

  /// Where a connection caches, writes and fill-up reads are in whole blocks.
  void check_alignment(std::uint64_t number, const MemoryStorage::Call& call) {
    const Client& client = clients_[number];
    const bool fill_up = call.kind == Kind::read && !reading_;
    if (!client.cached_before || !caches(client) || (call.kind != Kind::write && !fill_up))
      return;
    const Capabilities& can = client.connection->capabilities();
    const std::uint64_t alignment = can.write_alignment();
    if (call.range.begin % alignment != 0 ||
        (call.range.end % alignment != 0 && call.range.end != can.size))
      breaks("storage was called wrongly: not aligned: " + text_of(call.range));
  }

  /// What a write brings that storage does not have is what some client wrote.
  void check_content(std::uint64_t client, const MemoryStorage::Call& call) {
    const View& view = view_of(client);
    const Bytes now = view.disk->now(call.range);
    const auto in = [&](std::span<const std::byte> data, const ByteRange& part) {
      return data.subspan(part.begin - call.range.begin, part.size());
    };
    for_each_owned(client, call.range, [&](const ByteRange& part, bool own) {
      const auto invented = first_without(part, [&](const ByteRange& piece) {
        return same(in(call.data, piece), in(now, piece)) ||
               (own && view.model.allows(piece.begin, in(call.data, piece)));
      });
      if (invented) {
        const std::uint64_t i = *invented - call.range.begin;
        breaks("invented: byte " + std::to_string(*invented) + " is written as " +
               hexadecimal(call.data[i]) + ", storage has " + hexadecimal(now[i]) +
               ", clients wrote " + hexadecimal(view.model.at(*invented)));
      }
    });
  }

  /// Nothing was asked of storage that it has said it cannot do.
  void check_shape() {
    for (const Client& client : clients_) {
      if (client.storage != nullptr && !client.storage->violations().empty())
        breaks("storage was called wrongly: " + client.storage->violations().front());
    }
  }

  void check_budget() {
    const std::size_t used = budget_.used();
    if (used > most_used_)
      breaks("memory: " + std::to_string(used) + " bytes used, " + std::to_string(most_used_) +
             " allowed");
    most_used_ = std::min(most_used_, std::max(used, budget_.limit()));
  }

  // ---- What clients are told

  /// Sends a request; returns errno, or 0. A failure must have a reason.
  int request(std::uint64_t client, const std::function<void(WriteCache&, Storage&)>& work,
              int excused = 0) {
    try {
      const Connection::InUse in_use = clients_[client].connection->in_use(needed_);
      work(in_use.cache, in_use.use.storage());
      return 0;
    } catch (const std::system_error& error) {
      const int code = error.code().value();
      if (fired_.contains(code))
        ++result_.failed;
      else if (code != excused)
        breaks(std::string("failed for no reason: ") + error.what());
      return code != 0 ? code : EIO;
    } catch (const std::exception& error) {
      breaks(std::string("failed: ") + error.what());
      return EIO;
    }
  }

  void compare(std::uint64_t client, const char* where, std::uint64_t offset,
               std::span<const std::byte> data) {
    View& view = view_of(client);
    if (const auto wrong = view.model.first_wrong(offset, data)) {
      breaks(std::string(where) + ": byte " + std::to_string(*wrong) + " is " +
             hexadecimal(data[*wrong - offset]) + " instead of " +
             hexadecimal(view.model.at(*wrong)));
      return;
    }
    view.model.seen(offset, data);
  }

  void check_read(std::uint64_t client, const ByteRange& range, std::span<const std::byte> data) {
    const Bytes stored = view_of(client).disk->now(range);
    for_each_owned(client, range, [&](const ByteRange& part, bool own) {
      const auto found = data.subspan(part.begin - range.begin, part.size());
      if (own)
        compare(client, "read", part.begin, found);
      else if (!same(found, std::span(stored).subspan(part.begin - range.begin, part.size())))
        breaks("read: " + text_of(part) + " is not what another connection has stored");
    });
  }

  /// What the client owns in `range` is on storage, to stay if `durable`.
  void check_stored(std::uint64_t client, const char* where, const ByteRange& range, bool durable) {
    const MemoryDisk& disk = *view_of(client).disk;
    const Bytes stored = durable ? disk.durable(range) : disk.now(range);
    for_each_owned(client, range, [&](const ByteRange& part, bool own) {
      if (own)
        compare(client, where, part.begin,
                std::span(stored).subspan(part.begin - range.begin, part.size()));
    });
  }

  /// Whether the export begins with a qcow2 header; nothing where that cannot be told.
  [[nodiscard]] std::optional<bool> has_header(std::uint64_t client) {
    const ModelBytes& model = view_of(client).model;
    const ByteRange watched{0, std::min<std::uint64_t>(model.size(), qcow2::header_bytes)};
    // A connection from before the disk grew may not see all of it.
    if (clients_[client].connection->capabilities().size < watched.end)
      return std::nullopt;
    if (setup_.cluster != 0 || setup_.sharing == Sharing::disk || !model.certain(watched))
      return std::nullopt;
    Bytes bytes;
    for (std::uint64_t i = 0; i < watched.end; ++i)
      bytes.push_back(model.at(i));
    return qcow2::parse_header(bytes).has_value();
  }

  /// Whether a request that failed has changed nothing: it is a single one for storage, and what
  /// was refused was not carried out.
  [[nodiscard]] bool is_untouched(std::uint64_t client, const ByteRange& range) const {
    return !changed_by_refused_ &&
           clients_[client].storage->pieces(align_outward(range, setup_.minimum)) == 1;
  }

  void write(std::uint64_t client, std::uint64_t offset, const Bytes& data, bool fua) {
    View& view = view_of(client);
    const ByteRange range{offset, offset + data.size()};
    const auto caching = [&] { return caches(clients_[client]); };
    const std::optional<bool> header = has_header(client);
    const bool through = (!caching() || header == false) && !range.overlaps({0, header_end});
    view.model.may_be(offset, data);
    const int error = request(client, [&](WriteCache& cache, Storage& storage) {
      cache.write(storage, offset, data, fua);
    });
    if (error != 0) {
      const bool one_unit = offset / least_unit == (range.end - 1) / least_unit;
      if ((fua || one_unit) && is_untouched(client, range))
        view.model.withdraw();
      return;
    }
    view.model.is(offset, data);
    if (fua)
      check_stored(client, "stored by FUA", range, true);
    // A refusal makes the cache look for the header anew, so that it may have cached meanwhile.
    if (through && (!caching() || header == false) && fired_.empty())
      check_stored(client, "passed through", range, false);
    // A guest's writes pass through as long as nobody knows better.
    const bool guest = clients_[client].storage->is_guest();
    if (has_header(client) == true && result_.refused == 0 && most_used_ >= plenty && !guest &&
        !caching())
      breaks("there is a header, and nothing is cached");
  }

  void read(std::uint64_t client, const ByteRange& range) {
    Bytes data(range.size());
    reading_ = true;
    const int error = request(client, [&](WriteCache& cache, Storage& storage) {
      cache.read(storage, range.begin, data);
    });
    reading_ = false;
    if (error == 0)
      check_read(client, range, data);
  }

  void zero(const ModelStep& step, const ByteRange& range) {
    const Bytes zeros(range.size());
    if (!setup_.can_zero) {
      write(step.connection, range.begin, zeros, step.fua); // nbdkit does the same
      return;
    }
    View& view = view_of(step.connection);
    const Storage::ZeroOptions options{step.may_trim, step.fua, step.fast && setup_.can_fast_zero};
    const bool slow = align_inward(range, setup_.minimum) != range ||
                      clients_[step.connection].storage->pieces(range) != 1;
    view.model.may_be(range.begin, zeros);
    const int error = request(
        step.connection,
        [&](WriteCache& cache, Storage& storage) { cache.zero(storage, range, options); },
        options.fast && slow ? ENOTSUP : 0);
    if (options.fast && slow && fired_.empty()) {
      if (error == 0)
        breaks("a fast zero that cannot be one did not fail");
      view.model.withdraw();
    } else if (error == 0) {
      view.model.is(range.begin, zeros);
      if (step.fua)
        check_stored(step.connection, "zeroed by FUA", range, true);
    } else if (!slow && is_untouched(step.connection, range)) {
      view.model.withdraw();
    }
  }

  void trim(const ModelStep& step, const ByteRange& range) {
    View& view = view_of(step.connection);
    const ByteRange blocks = align_inward(range, setup_.minimum);
    const int error = request(step.connection, [&](WriteCache& cache, Storage& storage) {
      cache.trim(storage, range, step.fua);
    });
    if (error != 0) {
      // A part may have been done. Bytes that storage lacks are not lost by it.
      for (const ByteRange& part : trimmed_.inside(blocks))
        view.model.may_be(part.begin, view.disk->now(part));
      return;
    }
    view.model.is(blocks.begin, view.disk->now(blocks));
    if (setup_.trims == Trims::zeros && !view.disk->all_zeros(blocks))
      breaks("trim: " + text_of(blocks) + " was not trimmed");
    if (step.fua)
      check_stored(step.connection, "trimmed by FUA", blocks, true);
  }

  void extents(const ModelStep& step, const ByteRange& range) {
    Storage::Extents found;
    const int error = request(step.connection, [&](WriteCache& cache, Storage& storage) {
      found = cache.extents(storage, range, step.first);
    });
    if (error != 0)
      return;
    std::uint64_t position = range.begin;
    for (const Storage::Extent& extent : found) {
      if (extent.range.begin != position || extent.range.empty() || extent.range.end > range.end)
        breaks("extents: " + text_of(extent.range) + " does not follow " +
               std::to_string(position));
      position = extent.range.end;
    }
    if (position == range.begin)
      breaks("extents: none");
    if (!broken_.empty())
      return;
    for (const Storage::Extent& extent : found) {
      if (extent.type == Storage::ExtentType::zero ||
          extent.type == Storage::ExtentType::hole_and_zero)
        check_read(step.connection, extent.range, Bytes(extent.range.size()));
    }
  }

  void hint(const ModelStep& step, const ByteRange& range) {
    if (!setup_.can_cache)
      return;
    request(step.connection, [&](WriteCache& /*cache*/, Storage& storage) {
      storage.cache(align_outward(range, setup_.minimum));
    });
  }

  [[nodiscard]] bool within_reach(std::uint64_t client) const {
    const Connection& connection = *clients_[client].connection;
    if (connection.image() == nullptr)
      return true;
    const Unsaved unsaved = connection.image()->cache().unsaved();
    return unsaved.bytes == 0 || (connection.capabilities().can_write &&
                                  unsaved.ranges.hull().end <= connection.capabilities().size);
  }

  void flush(std::uint64_t client) {
    const int excused = within_reach(client) ? 0 : EIO;
    const int error = request(
        client, [](WriteCache& cache, Storage& storage) { cache.flush(storage); }, excused);
    if (error != 0)
      return;
    const WriteCache& cache = clients_[client].connection->image()->cache();
    if (!cache.clean() || cache.unsaved().bytes > 0)
      breaks("flush: some bytes are still in memory only");
    check_stored(client, "flushed", {0, view_of(client).disk->size()}, true);
  }

  /// What a background writer does when it finds that a unit waits.
  void take_turn(std::uint64_t client) {
    if (!setup_.background)
      return;
    request(client, [](WriteCache& cache, Storage& /*storage*/) { cache.write_next(); });
  }

  // ---- Coming and going

  [[nodiscard]] bool anybody_connected() const {
    return std::ranges::any_of(clients_, [](const Client& client) { return !!client.connection; });
  }

  [[nodiscard]] bool anybody_sees(std::size_t view) const {
    return std::ranges::any_of(clients_, [view](const Client& client) {
      return client.connection && client.view == view;
    });
  }

  void look(std::uint64_t number) {
    const View& view = views_[setup_.sharing == Sharing::nothing ? number : views_.size() - 1];
    Connection onlooker(exports_, "export");
    onlooker.begin(make_storage(number, view, false));
    onlooker.drain();
    onlooker.end();
    if (calls_ > 0)
      breaks("somebody who only looked made storage work");
  }

  /// Nobody who is connected notices. Only while there is something to recognise disks by: a disk
  /// of which nothing was read or stored looks like any other, and one that has bytes left of it
  /// may look like an empty one.
  void exchange(std::uint64_t content) {
    const bool recognisable = !reads_refused_ && !vanished_ && sizes_seen_.size() <= 1 &&
                              next_size_ == views_.back().disk->size();
    if (setup_.sharing != Sharing::cache || !recognisable)
      return;
    exchanged_ = true;
    views_.push_back(fresh_view(content == 0 && result_.refused == 0 ? 0 : 100 + views_.size()));
  }

  void resize(std::uint64_t size) {
    if (exchanged_)
      return;
    next_size_ = size / setup_.minimum * setup_.minimum;
    // While somebody is connected, a disk can only grow.
    if (setup_.sharing != Sharing::nothing && anybody_connected() &&
        next_size_ > views_.front().disk->size())
      take_next_size();
  }

  void take_next_size() {
    views_.front().disk->resize(next_size_);
    views_.front().model.resize(next_size_);
  }

  void connect(const ModelStep& step) {
    Client& client = clients_[step.connection];
    if (client.connection)
      return;
    lost_.clear();
    if (setup_.sharing == Sharing::nothing)
      views_[step.connection] = fresh_view();
    else if (!anybody_connected())
      take_next_size();
    if (setup_.sharing == Sharing::cache)
      client.view = views_.size() - 1;
    View& view = view_of(step.connection);
    const std::uint64_t size = view.disk->size();
    client.connection = std::make_unique<Connection>(exports_, "export");
    std::unique_ptr<MemoryStorage> storage = make_storage(step.connection, view, step.read_only);
    client.storage = storage.get();
    try {
      client.connection->begin(std::move(storage));
    } catch (const std::exception& error) {
      breaks(std::string("connecting failed: ") + error.what());
      return;
    }
    sizes_seen_.insert(size);
  }

  /// The first data request finds out what the connection sees; so do those of a guest. Returns
  /// whether it could.
  bool enter(std::uint64_t client) {
    lost_.clear();
    const int error = request(client, [](WriteCache&, Storage&) {});
    View& view = view_of(client);
    // What is left of a disk that was exchanged is lost, and nobody sees that disk any more.
    if (exchanged_)
      return error == 0;
    // Without anything to recognise a disk by, what was left of it counts as that of another.
    if (!lost_.empty() && sizes_seen_.size() == 1 && !reads_refused_ && !vanished_)
      breaks("bytes were given up for a connection of the same size");
    for (const ByteRange& lost : lost_.inside({0, view.disk->size()}))
      view.model.is(lost.begin, view.disk->now(lost));
    return error == 0;
  }

  void disconnect(std::uint64_t number, bool properly) {
    Client& client = clients_[number];
    View& view = view_of(number);
    const bool reached = within_reach(number);
    const bool writable = client.connection->capabilities().can_write;
    const bool wrote = std::exchange(client.has_changed, false) && !client.storage->is_guest();
    vanished_ = vanished_ || !properly;
    lost_.clear();
    if (properly)
      client.connection->drain();
    check_shape();
    client.connection->end();
    client.connection.reset();
    client.storage = nullptr;

    const ByteRange all{0, view.disk->size()};
    // What others wrote is for them to see to.
    const bool for_it_to_store =
        setup_.sharing != Sharing::cache || (wrote && !anybody_sees(client.view));
    const bool all_stored = properly && reached && fired_.empty() && writable && for_it_to_store;
    if (!lost_.empty() && (all_stored || setup_.sharing == Sharing::cache))
      breaks("disconnecting lost bytes: " + text_of(lost_.hull()));
    for (const ByteRange& lost : lost_)
      view.model.is(lost.begin, view.disk->now(lost));
    if (all_stored || setup_.sharing != Sharing::cache)
      check_stored(number, "left on storage", all, false);
  }

  void carry_out(const ModelStep& step) {
    switch (step.kind) {
    case StepKind::connect:
      if (step.connection < clients_.size())
        connect(step);
      return;
    case StepKind::budget:
      budget_.set_limit(step.length);
      most_used_ = std::max<std::size_t>(step.length, budget_.used());
      return;
    case StepKind::size:
      resize(step.length);
      return;
    case StepKind::breaks:
      standing_.push_back({step});
      return;
    case StepKind::heals:
      standing_.clear();
      return;
    case StepKind::look:
      look(std::min(step.connection, setup_.connections - 1));
      return;
    case StepKind::exchange:
      exchange(step.value);
      return;
    default:
      if (step.connection < clients_.size() && clients_[step.connection].connection)
        ask(step);
    }
  }

  [[nodiscard]] static bool changes_something(StepKind kind) {
    return kind == StepKind::write || kind == StepKind::header || kind == StepKind::zero ||
           kind == StepKind::trim;
  }

  void ask(const ModelStep& step) {
    const std::uint64_t client = step.connection;
    const ByteRange range = range_of(step, false);
    const ByteRange changes = range_of(step, true);
    const bool ends = step.kind == StepKind::disconnect || step.kind == StepKind::vanish;
    const bool will_change = changes_something(step.kind) && !changes.empty();
    const bool reads = step.kind == StepKind::read || step.kind == StepKind::extents;
    needed_ = will_change ? Image::Request{true, changes}
                          : (reads ? Image::Request{false, range} : Image::Request{});
    if (!ends && !enter(client))
      return;
    clients_[client].has_changed = clients_[client].has_changed || will_change;
    switch (step.kind) {
    case StepKind::disconnect:
      disconnect(client, true);
      return;
    case StepKind::vanish:
      disconnect(client, exchanged_); // nothing is to be left there of a disk that nobody sees
      return;
    case StepKind::write:
      if (!changes.empty())
        write(client, changes.begin, bytes_of(step.value, changes), step.fua);
      return;
    case StepKind::header:
      write_header(step, changes);
      return;
    case StepKind::read:
      if (!range.empty())
        read(client, range);
      return;
    case StepKind::zero:
      if (!changes.empty())
        zero(step, changes);
      return;
    case StepKind::trim:
      if (!changes.empty() && setup_.can_trim)
        trim(step, changes);
      return;
    case StepKind::extents:
      if (!range.empty() && setup_.can_extents)
        extents(step, range);
      return;
    case StepKind::cache:
      if (!range.empty())
        hint(step, range);
      return;
    case StepKind::flush:
      if (clients_[client].connection->capabilities().can_write)
        flush(client);
      return;
    case StepKind::tick:
      request(client, [](WriteCache& cache, Storage& /*storage*/) { cache.tick(); });
      return;
    case StepKind::cluster_end:
      request(client,
              [&](WriteCache& cache, Storage& /*storage*/) { cache.set_cluster_end(step.offset); });
      return;
    case StepKind::turn:
      for (std::uint64_t i = 0; i < step.length; ++i)
        take_turn(client);
      return;
    default:
      return;
    }
  }

  void write_header(const ModelStep& step, const ByteRange& range) {
    Bytes header = step.value == 0 ? Bytes(qcow2::header_bytes)
                                   : qcow2_header(static_cast<unsigned>(step.value));
    const ByteRange part = range.intersection({0, header.size()});
    if (part.empty())
      return;
    write(step.connection, part.begin,
          {header.begin() + static_cast<std::ptrdiff_t>(part.begin),
           header.begin() + static_cast<std::ptrdiff_t>(part.end)},
          step.fua);
  }

  void finish() {
    needed_ = {};
    for (std::uint64_t i = 0; i < clients_.size() && broken_.empty(); ++i) {
      if (clients_[i].connection && enter(i)) {
        const Capabilities& can = clients_[i].connection->capabilities();
        if (can.size > 0)
          read(i, {0, can.size});
        if (can.can_write)
          flush(i);
      }
    }
    for (std::uint64_t i = 0; i < clients_.size() && broken_.empty(); ++i) {
      if (clients_[i].connection)
        disconnect(i, true);
    }
    // What no connection could store so far waits for one that can.
    next_size_ = views_.front().disk->size();
    if (broken_.empty())
      connect({});
    if (broken_.empty() && next_size_ > 0 && enter(0))
      read(0, {0, next_size_});
    if (broken_.empty())
      flush(0);
    if (broken_.empty())
      disconnect(0, true);
    if (!broken_.empty())
      return;
    lost_.clear();
    exports_.report_left();
    if (!lost_.empty() && !exchanged_)
      breaks("lost at the end: " + text_of(lost_.hull()));
    if (budget_.used() > 0)
      breaks("memory is still in use at the end");
  }

  /// A fault of storage until it is repaired, and how many calls it has concerned.
  struct Standing {
    ModelStep step;
    std::uint64_t calls = 0;
  };

  const ModelSequence& sequence_;
  const ModelSetup& setup_;
  // In this order, for each is used by those behind it.
  MemoryBudget budget_;
  Writeback writeback_; // never started: the sequence says when a writer gets its turn
  Exports exports_;
  std::vector<View> views_;
  std::vector<Client> clients_;

  std::size_t most_used_;
  std::uint64_t next_size_;
  std::set<std::uint64_t> sizes_seen_;
  std::vector<Standing> standing_;
  ModelResult result_;
  ByteRanges lost_;
  std::uint64_t writes_ = 0;
  bool reads_refused_ = false;
  bool vanished_ = false;
  bool exchanged_ = false;

  // Of the current step.
  const ModelStep* step_ = nullptr;
  std::size_t at_ = 0;
  std::uint64_t matching_calls_ = 0;
  std::uint64_t calls_ = 0;
  /// A client's read is under way: what is read fills up no block.
  bool reading_ = false;
  std::set<int> fired_;
  /// A call that was refused may have been carried out in part.
  bool changed_by_refused_ = false;
  ByteRanges trimmed_;
  Image::Request needed_;
  std::string broken_;
};

} // namespace

ModelResult run(const ModelSequence& sequence) {
  return Run(sequence).result();
}
