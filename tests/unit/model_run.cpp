#include "model_run.hpp"

#include "connection.hpp"
#include "export.hpp"
#include "image_bytes.hpp"
#include "memory/memory_budget.hpp"
#include "memory/writeback.hpp"
#include "memory_storage.hpp"
#include "model_client.hpp"

#include <algorithm>
#include <deque>
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

/// Memory in bytes that is enough for anything.
constexpr std::size_t plenty = std::size_t{64} * 1024 * 1024;
/// No step needs so many calls of storage.
constexpr std::uint64_t endless = 20000;

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

class Run final : public ModelReferee {
public:
  explicit Run(const ModelSequence& sequence)
      : sequence_(sequence), setup_(sequence.setup), budget_(setup_.memory),
        exports_(settings(), budget_), most_used_(setup_.memory), next_size_(setup_.size) {
    for (std::uint64_t i = 0; i < setup_.connections; ++i) {
      if (i == 0 || setup_.sharing == Sharing::nothing)
        views_.push_back(fresh_view());
      clients_.emplace_back(
          *this, i,
          ModelStripes{setup_.sharing == Sharing::disk ? setup_.stripe : 0, setup_.connections});
    }
  }
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;
  ~Run() override = default;

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
  struct Client : ModelClient {
    using ModelClient::ModelClient;
    bool cached_before = false;
    bool has_changed = false;
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

  ModelView fresh_view() { return fresh_view(setup_.filled ? 251 : 0); }
  ModelView fresh_view(std::uint64_t content) {
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

  std::unique_ptr<MemoryStorage> make_storage(std::uint64_t client, const ModelView& view,
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
    const WriteCache* const cache = client.cache();
    return cache != nullptr && cache->caching();
  }

  void breaks(const std::string& promise) override {
    if (broken_.empty())
      broken_ = promise;
  }

  bool excuses(int error) override {
    const bool refused = fired_.contains(error);
    result_.failed += refused ? 1 : 0;
    return refused;
  }

  [[nodiscard]] bool untouched() const override { return !changed_by_refused_; }
  [[nodiscard]] ByteRanges trimmed() const override { return trimmed_; }

  // ---- What reaches storage

  Verdict judge(std::uint64_t client, const MemoryStorage::Call& call) {
    ++calls_;
    if (calls_ > endless) {
      breaks("storage is called without end");
      throw std::runtime_error("endless");
    }
    check_alignment(client, call);
    if (call.kind == Kind::write)
      clients_[client].check_written(call);
    check_budget();
    const Verdict verdict = decide(call);
    if (call.kind == Kind::trim && verdict.done != Verdict::Part::none)
      trimmed_.add(call.range);
    return verdict;
  }

  Verdict decide(const MemoryStorage::Call& call) {
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
    const bool fill_up = call.kind == Kind::read && !client.reading();
    if (!client.cached_before || !caches(client) || (call.kind != Kind::write && !fill_up))
      return;
    const Capabilities& can = client.capabilities();
    const std::uint64_t alignment = can.write_alignment();
    if (call.range.begin % alignment != 0 ||
        (call.range.end % alignment != 0 && call.range.end != can.size))
      breaks("storage was called wrongly: not aligned: " + to_string(call.range));
  }

  /// Nothing was asked of storage that it has said it cannot do.
  void check_shape() {
    for (const Client& client : clients_) {
      if (client.connected() && !client.storage().violations().empty())
        breaks("storage was called wrongly: " + client.storage().violations().front());
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

  /// Whether the export begins with a qcow2 header; nothing where that cannot be told.
  [[nodiscard]] std::optional<bool> has_header(const Client& client) const {
    const ModelBytes& model = client.view().bytes;
    const ByteRange watched{0, std::min<std::uint64_t>(model.size(), qcow2::header_bytes)};
    // A connection from before the disk grew may not see all of it.
    if (client.capabilities().size < watched.end)
      return std::nullopt;
    if (setup_.cluster != 0 || setup_.sharing == Sharing::disk || !model.certain(watched))
      return std::nullopt;
    Bytes bytes;
    for (std::uint64_t i = 0; i < watched.end; ++i)
      bytes.push_back(model.at(i));
    return qcow2::parse_header(bytes).has_value();
  }

  /// A client's write, and where it has to go.
  void write(Client& client, const ModelStep& step) {
    const ByteRange range = client.changed_by(step);
    const auto caching = [&] { return caches(client); };
    const std::optional<bool> header = has_header(client);
    const bool through =
        (!caching() || header == false) && !range.overlaps({0, ModelStripes::header_end});
    if (client.carry_out(step) != 0 || range.empty())
      return;
    // A refusal makes the cache look for the header anew, so that it may have cached meanwhile.
    if (through && (!caching() || header == false) && fired_.empty())
      client.check_stored("passed through", range, false);
    // A guest's writes pass through as long as nobody knows better.
    if (has_header(client) == true && result_.refused == 0 && most_used_ >= plenty &&
        !client.storage().is_guest() && !caching())
      breaks("there is a header, and nothing is cached");
  }

  // ---- Coming and going

  [[nodiscard]] bool anybody_connected() const {
    return std::ranges::any_of(clients_, [](const Client& client) { return client.connected(); });
  }

  [[nodiscard]] bool anybody_sees(const ModelView& view) const {
    return std::ranges::any_of(clients_, [&view](const Client& client) {
      return client.connected() && &client.view() == &view;
    });
  }

  void look(std::uint64_t number) {
    const ModelView& view = views_[setup_.sharing == Sharing::nothing ? number : views_.size() - 1];
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
    views_.front().bytes.resize(next_size_);
  }

  void connect(const ModelStep& step) {
    Client& client = clients_[step.connection];
    if (client.connected())
      return;
    lost_.clear();
    if (setup_.sharing == Sharing::nothing)
      views_[step.connection] = fresh_view();
    else if (!anybody_connected())
      take_next_size();
    ModelView& view = setup_.sharing == Sharing::nothing ? views_[step.connection] : views_.back();
    try {
      client.connect(exports_, make_storage(step.connection, view, step.read_only), view);
    } catch (const std::exception& error) {
      breaks(std::string("connecting failed: ") + error.what());
      return;
    }
    sizes_seen_.insert(view.disk->size());
  }

  /// The first data request finds out what the connection sees; so do those of a guest. Returns
  /// whether it could.
  bool enter(Client& client, const Image::Request& needed) {
    lost_.clear();
    const int error = client.request(needed, [](WriteCache&, Storage&) {});
    ModelView& view = client.view();
    // What is left of a disk that was exchanged is lost, and nobody sees that disk any more.
    if (exchanged_)
      return error == 0;
    // Without anything to recognise a disk by, what was left of it counts as that of another.
    if (!lost_.empty() && sizes_seen_.size() == 1 && !reads_refused_ && !vanished_)
      breaks("bytes were given up for a connection of the same size");
    for (const ByteRange& lost : lost_.inside({0, view.disk->size()}))
      view.bytes.is(lost.begin, view.disk->now(lost));
    return error == 0;
  }

  void disconnect(Client& client, bool properly) {
    ModelView& view = client.view();
    const bool reached = client.reaches_all();
    const bool writable = client.capabilities().can_write;
    const bool wrote = std::exchange(client.has_changed, false) && !client.storage().is_guest();
    vanished_ = vanished_ || !properly;
    lost_.clear();
    client.disconnect(properly);

    const ByteRange all{0, view.disk->size()};
    // What others wrote is for them to see to.
    const bool for_it_to_store = setup_.sharing != Sharing::cache || (wrote && !anybody_sees(view));
    const bool all_stored = properly && reached && fired_.empty() && writable && for_it_to_store;
    if (!lost_.empty() && (all_stored || setup_.sharing == Sharing::cache))
      breaks("disconnecting lost bytes: " + to_string(lost_.hull()));
    for (const ByteRange& lost : lost_)
      view.bytes.is(lost.begin, view.disk->now(lost));
    if (all_stored || setup_.sharing != Sharing::cache)
      client.check_stored("left on storage", all, false);
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
      if (step.connection < clients_.size() && clients_[step.connection].connected())
        ask(clients_[step.connection], step);
    }
  }

  [[nodiscard]] static bool changes_something(StepKind kind) {
    return kind == StepKind::write || kind == StepKind::header || kind == StepKind::zero ||
           kind == StepKind::trim;
  }

  void ask(Client& client, const ModelStep& step) {
    const ByteRange changes = client.changed_by(step);
    const bool ends = step.kind == StepKind::disconnect || step.kind == StepKind::vanish;
    const bool will_change = changes_something(step.kind) && !changes.empty();
    const bool reads = step.kind == StepKind::read || step.kind == StepKind::extents;
    const Image::Request needed = will_change ? Image::Request{true, changes}
                                  : reads     ? Image::Request{false, client.range_of(step)}
                                              : Image::Request{};
    if (!ends && !enter(client, needed))
      return;
    client.has_changed = client.has_changed || will_change;
    const auto request = [&](const std::function<void(WriteCache&)>& work) {
      client.request({}, [&](WriteCache& cache, Storage& /*storage*/) { work(cache); });
    };
    switch (step.kind) {
    case StepKind::disconnect:
      disconnect(client, true);
      return;
    case StepKind::vanish:
      disconnect(client, exchanged_); // nothing is to be left there of a disk that nobody sees
      return;
    case StepKind::write:
    case StepKind::header:
      write(client, step);
      return;
    case StepKind::zero:
      if (setup_.can_zero)
        client.carry_out(step);
      else
        write(client, step);
      return;
    case StepKind::tick:
      request([](WriteCache& cache) { cache.tick(); });
      return;
    case StepKind::queue:
      request([](WriteCache& cache) { cache.queue_oldest(); });
      return;
    case StepKind::turn: // what a background writer does when it finds that a unit waits
      for (std::uint64_t i = 0; i < step.length && setup_.background; ++i)
        request([](WriteCache& cache) { cache.write_next(); });
      return;
    default:
      client.carry_out(step);
    }
  }

  void read_and_flush(Client& client) {
    if (!enter(client, {}))
      return;
    if (client.capabilities().size > 0)
      client.read({0, client.capabilities().size});
    if (client.capabilities().can_write)
      client.flush();
  }

  void finish() {
    for (Client& client : clients_) {
      if (client.connected() && broken_.empty())
        read_and_flush(client);
    }
    for (Client& client : clients_) {
      if (client.connected() && broken_.empty())
        disconnect(client, true);
    }
    // What no connection could store so far waits for one that can.
    next_size_ = views_.front().disk->size();
    if (broken_.empty())
      connect({});
    if (broken_.empty())
      read_and_flush(clients_.front());
    if (broken_.empty())
      disconnect(clients_.front(), true);
    if (!broken_.empty())
      return;
    lost_.clear();
    exports_.report_left();
    if (!lost_.empty() && !exchanged_)
      breaks("lost at the end: " + to_string(lost_.hull()));
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
  // Not moved about: clients and connections know where they are.
  std::deque<ModelView> views_;
  std::deque<Client> clients_;

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
  std::set<int> fired_;
  /// A call that was refused may have been carried out in part.
  bool changed_by_refused_ = false;
  ByteRanges trimmed_;
  std::string broken_;
};

} // namespace

ModelResult run(const ModelSequence& sequence) {
  return Run(sequence).result();
}
