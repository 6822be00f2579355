// Whatever request storage fails, and however: no acknowledged byte is lost, no acknowledged flush
// is a lie, and the error that a client gets is storage's own.

#include "catch.hpp"
#include "image_bytes.hpp"
#include "memory_storage.hpp"
#include "sanitized.hpp"
#include "serving.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <map>
#include <memory>
#include <optional>
#include <system_error>

using namespace qcowcache;
using Kind = MemoryStorage::Kind;

namespace {

constexpr std::uint64_t unit = WriteCache::least_unit_size;
constexpr std::uint64_t small_size = 5 * unit + 777;
constexpr std::uint64_t large_size = 7 * unit + 1234;

// Under a sanitizer each run takes many times as long, so it looks at every fiftieth request only.
constexpr unsigned step = sanitized ? 50 : 1;

struct Fault {
  Kind kind = Kind::write;
  int error = EIO;
  /// Until the storage is repaired; otherwise one request fails.
  bool for_good = false;
  /// Storage fails after it has done what it was asked for.
  bool late = false;
};

/// Storage's fault, common to all connections: the n-th request of its kind fails. Thread safe.
class FaultyRequest {
public:
  FaultyRequest(const Fault& fault, unsigned nth) noexcept : fault_(fault), nth_(nth) {}

  void before(const MemoryStorage::Call& call) { count(call, false); }
  void after(const MemoryStorage::Call& call) { count(call, true); }
  /// Whether a request has failed.
  [[nodiscard]] bool fired() const noexcept { return fired_; }
  void repair() noexcept { repaired_ = true; }

private:
  void count(const MemoryStorage::Call& call, bool late) {
    if (call.kind != fault_.kind || late != fault_.late || repaired_)
      return;
    const unsigned number = ++requests_;
    if (number == nth_ || (fault_.for_good && number > nth_)) {
      fired_ = true;
      throw std::system_error(fault_.error, std::generic_category(), "refused");
    }
  }

  const Fault fault_;
  const unsigned nth_;
  std::atomic<unsigned> requests_ = 0;
  std::atomic<bool> fired_ = false;
  std::atomic<bool> repaired_ = false;
};

/// What the export has to hold: what was acknowledged, or, where a request failed that could have
/// been carried out in part, what that one wanted.
class Promised {
public:
  explicit Promised(std::size_t size) : bytes_(size) {}

  void acknowledged(std::uint64_t offset, std::span<const std::byte> data) {
    std::ranges::copy(data, bytes_.begin() + static_cast<std::ptrdiff_t>(offset));
    for (Attempt& attempt : attempts_)
      attempt.where.remove({offset, offset + data.size()});
  }
  void attempted(std::uint64_t offset, std::span<const std::byte> data) {
    attempts_.push_back(
        {ByteRanges({offset, offset + data.size()}), offset, {data.begin(), data.end()}});
  }
  /// The first byte of `found`, which is at `offset`, that may not be what it is.
  [[nodiscard]] std::optional<std::uint64_t> wrong(std::uint64_t offset,
                                                   std::span<const std::byte> found) const {
    const auto expected = std::span(bytes_).subspan(offset, found.size());
    auto [is, ought] = std::ranges::mismatch(found, expected);
    while (is != found.end()) {
      const std::uint64_t where = offset + static_cast<std::uint64_t>(is - found.begin());
      if (!may_be(where, *is))
        return where;
      ++is;
      ++ought;
      std::tie(is, ought) = std::mismatch(is, found.end(), ought);
    }
    return std::nullopt;
  }

private:
  struct Attempt {
    ByteRanges where;
    std::uint64_t offset = 0;
    std::vector<std::byte> data;
  };

  [[nodiscard]] bool may_be(std::uint64_t where, std::byte value) const {
    return std::ranges::any_of(attempts_, [&](const Attempt& attempt) {
      return attempt.where.contains({where, where + 1}) &&
             attempt.data[where - attempt.offset] == value;
    });
  }

  std::vector<std::byte> bytes_;
  std::vector<Attempt> attempts_;
};

struct Setting {
  unsigned writers = 0;
  std::size_t memory = 64 * unit;
  std::chrono::milliseconds retry = std::chrono::hours(1);
  bool extents = true;
  bool reserves = false;
  Fua fua = Fua::native;
};

/// Clients of one export whose storage has a fault, and what they may expect of it.
class Run {
public:
  Run(const Setting& setting, const Fault& fault, unsigned nth)
      : setting_(setting), fault_(fault), faulty_(fault, nth),
        serving_(setting.memory, setting.writers, setting.retry, nullptr,
                 setting.reserves ? 4 * unit : 0) {}

  void connect(int client, std::uint64_t size) {
    Capabilities capabilities = MemoryStorage::everything(size);
    capabilities.can_extents = setting_.extents;
    capabilities.fua = setting_.fua;
    clients_[client] = std::make_unique<Client>(
        serving_, "export", disk_, capabilities,
        [this](const MemoryStorage::Call& call) { faulty_.before(call); },
        [this](const MemoryStorage::Call& call) { faulty_.after(call); });
  }
  void leave(int client) {
    clients_[client]->leave();
    check(clients_[client]->storage().violations().empty(), "storage was called as it may not be");
    clients_.erase(client);
  }

  void write(int client, std::uint64_t offset, std::span<const std::byte> data, bool fua = false) {
    const bool one_request = fua || offset / unit == (offset + data.size() - 1) / unit;
    const bool done = succeeds([&] { clients_[client]->write(offset, data, fua); });
    change(done, one_request, offset, data);
    if (done && fua)
      check_durable({offset, offset + data.size()});
    read(client, {offset, offset + data.size()});
  }
  void write(int client, std::uint64_t offset, std::size_t size, bool fua = false) {
    write(client, offset, pattern(size, ++seed_), fua);
  }
  void zero(int client, const ByteRange& range, bool fast = false) {
    Storage::ZeroOptions options;
    options.fast = fast;
    const bool done = succeeds([&] { clients_[client]->zero(range, options); });
    change(done, true, range.begin, std::vector<std::byte>(range.size()));
    read(client, range);
  }
  void trim(int client, const ByteRange& range) {
    const bool done = succeeds([&] { clients_[client]->trim(range); });
    change(done, true, range.begin, std::vector<std::byte>(range.size()));
    read(client, range);
  }
  void flush(int client) {
    if (succeeds([&] { clients_[client]->flush(); }))
      check_durable({0, large_size});
  }
  void read(int client, const ByteRange& range) {
    std::vector<std::byte> found;
    if (succeeds([&] { found = clients_[client]->read(range.begin, range.size()); }))
      check_bytes("read", range.begin, found);
  }
  void ask(int client, const ByteRange& range) {
    if (setting_.extents)
      (void)succeeds([&] { (void)clients_[client]->extents(range); });
    (void)succeeds([&] { clients_[client]->prefetch(range); });
  }

  /// Storage works again: now everything has to be there, for whoever comes.
  void finish() {
    faulty_.repair();
    while (!clients_.empty())
      leave(clients_.begin()->first);
    const unsigned failed_before = failed_;
    connect(9, large_size);
    read(9, {0, large_size});
    flush(9);
    leave(9);
    check(failed_ == failed_before, "a request failed after the repair");
    check(fault_.for_good || failed_ <= 1, "one fault failed several requests");
    check(serving_.lost == 0, "bytes were reported lost");
    check(serving_.budget().used() == 0, "memory was not given back");
  }
  [[nodiscard]] bool fired() const noexcept { return faulty_.fired(); }

private:
  template <typename Request>
  bool succeeds(Request request) {
    try {
      request();
      return true;
    } catch (const std::system_error& error) {
      check(faulty_.fired() && error.code().value() == fault_.error, error.what());
      ++failed_;
      return false;
    }
  }

  void change(bool done, bool one_request, std::uint64_t offset, std::span<const std::byte> data) {
    // A request of storage that fails at once has changed nothing; nor may the cache have.
    const bool nothing_done = one_request && !fault_.late && fault_.kind != Kind::flush;
    if (done)
      promised_.acknowledged(offset, data);
    else if (!nothing_done)
      promised_.attempted(offset, data);
  }

  void check_durable(const ByteRange& range) const {
    const std::vector<std::byte> durable = disk_->durable();
    check_bytes("durable", range.begin, std::span(durable).subspan(range.begin, range.size()));
  }
  void check_bytes(const char* what, std::uint64_t offset, std::span<const std::byte> found) const {
    if (const std::optional<std::uint64_t> wrong = promised_.wrong(offset, found))
      FAIL(what << ": byte " << *wrong << " (unit " << *wrong / unit << ") is not what it was");
  }
  static void check(bool holds, const char* what) {
    if (!holds)
      FAIL(what);
  }

  const Setting setting_;
  const Fault fault_;
  FaultyRequest faulty_;
  const std::shared_ptr<MemoryDisk> disk_ = std::make_shared<MemoryDisk>(large_size);
  Promised promised_{large_size};
  Serving serving_;
  std::map<int, std::unique_ptr<Client>> clients_;
  unsigned seed_ = 0;
  unsigned failed_ = 0;
};

std::vector<std::byte> first_cluster(unsigned cluster_bits) {
  std::vector<std::byte> cluster = qcow2_header(cluster_bits);
  cluster.resize(4096);
  return cluster;
}

/// An image is created, filled, changed, and filled on by others.
void live(Run& run) {
  run.connect(1, small_size);
  run.zero(1, {0, 512});
  run.write(1, 0, first_cluster(16));
  run.flush(1);
  run.write(1, 4096, 3000);
  run.write(1, 7096, unit);                     // completes one unit, begins the next
  run.write(1, unit + 20000, 5000);             // behind a gap
  run.write(1, unit + 3000, 10000);             // over what is there
  run.write(1, 3 * unit + 777, 2 * unit, true); // to the odd end
  run.write(1, unit + 23000, 4000, true);       // partly over dirty bytes
  run.flush(1);
  run.write(1, unit + 27001, 100);
  run.write(1, 2 * unit + 5, 50);
  run.zero(1, {unit + 2000, unit + 22000});
  run.write(1, unit + 40000, 3000);
  run.zero(1, {unit + 41000, unit + 42000}, true);
  run.trim(1, {unit + 24000, unit + 27050});
  run.trim(1, {2 * unit, 3 * unit});
  run.write(1, 2 * unit + 700, 3 * unit); // more than little memory holds
  run.ask(1, {unit, 3 * unit});

  run.connect(2, large_size); // the file has grown
  run.read(2, {0, large_size});
  run.write(2, small_size - 10, unit);
  run.leave(1);
  run.flush(2);
  run.write(2, 0, qcow2_header(17)); // another image
  run.write(2, 4 * unit + 1, 2000);
  run.flush(2);
  run.write(2, 2 * unit, 2 * unit);
  run.write(2, 6 * unit + 3, 1000);
  run.leave(2);

  run.connect(3, large_size);
  run.read(3, {0, large_size});
  run.write(3, 6 * unit + 1003, 1000);
  run.flush(3);
  run.write(3, unit, 700);
}

/// Lets each request of the fault's kind fail in turn; returns about how many there are.
unsigned try_each(const Setting& setting, const Fault& fault) {
  for (unsigned nth = 1;; nth += step) {
    INFO("request " << nth << " of kind " << static_cast<int>(fault.kind) << ", error "
                    << fault.error << (fault.for_good ? ", for good" : ", once")
                    << (fault.late ? ", late" : "") << ", " << setting.writers
                    << " writers, memory " << setting.memory);
    Run run(setting, fault, nth);
    live(run);
    const bool fired = run.fired();
    run.finish();
    if (!fired)
      return nth - 1;
    REQUIRE(nth < 1000);
  }
}

constexpr std::array kinds{Kind::read, Kind::write, Kind::flush,  Kind::zero,
                           Kind::trim, Kind::cache, Kind::extents};

} // namespace

TEST_CASE("whichever request of storage fails, nothing is lost and no flush lies",
          "[every_call_fails]") {
  Setting setting;
  Fault fault;
  std::tie(setting.writers, fault.error) =
      GENERATE(table<unsigned, int>({{0, EIO}, {0, ENOSPC}, {0, EPERM}, {2, EIO}, {2, ENOSPC}}));
  fault.for_good = GENERATE(false, true);
  fault.late = GENERATE(false, true);
  const bool plenty = GENERATE(true, false);
  setting.reserves = plenty && fault.for_good; // more requests, and as many more runs
  if (!plenty) {
    setting.memory = 4 * (unit + 8192);
    setting.retry = std::chrono::milliseconds(0);
    setting.extents = false;
    setting.fua = Fua::none;
  }
  for (const Kind kind : kinds) {
    fault.kind = kind;
    const unsigned requests = try_each(setting, fault);
    CHECK((requests > 0 || (kind == Kind::extents && !setting.extents)));
  }
}
