#include "image.hpp"

#include "cache/cached_image.hpp"
#include "catch.hpp"
#include "image_bytes.hpp"
#include "memory_storage.hpp"

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

using namespace qcowcache;
using Kind = MemoryStorage::Kind;
using Standing = Image::Standing;

namespace {

constexpr std::uint64_t unit = WriteCache::least_unit_size;
constexpr std::uint64_t disk_size = 32 * unit;
constexpr Image::Request writes{true, {5 * unit, 5 * unit + 100}};
constexpr Image::Request reads{false, {5 * unit, 5 * unit + 100}};
constexpr Image::Request flushes{};

std::shared_ptr<MemoryDisk> new_disk(std::uint64_t size = disk_size) {
  return std::make_shared<MemoryDisk>(size);
}

std::shared_ptr<MemoryDisk> copy_of(const MemoryDisk& disk) {
  return std::make_shared<MemoryDisk>(disk.now());
}

/// An image of a disk, whatever is on that.
class Bench {
public:
  explicit Bench(Image::Settings given = {}) : settings_(std::move(given)) {
    settings_.cluster_size = unit;
    settings_.report_loss = [this](const std::string& name, const Unsaved& unsaved) {
      lost += name + " " + std::to_string(unsaved.bytes) + "\n";
    };
    settings_.report_damage = [](const std::string&, const std::string&) {};
    image_ = std::make_shared<Image>("a", settings_, ranges_, budget_);
    image_->begin(
        MemoryStorage::everything(disk_size), image_,
        [this](const Image& image, const ByteRange& range) {
          changed.add(range);
          CHECK(&image == image_.get());
        },
        settings_.verify);
  }

  [[nodiscard]] Image& image() const { return *image_; }
  [[nodiscard]] WriteCache& cache() const { return image_->cache(); }
  [[nodiscard]] MemoryBudget& budget() { return budget_; }

  std::string lost;
  ByteRanges changed;

private:
  Image::Settings settings_;
  RangeLock ranges_;
  MemoryBudget budget_{64 * unit};
  std::shared_ptr<Image> image_;
};

/// A connection, which has not joined yet.
class Candidate {
public:
  Candidate(const Bench& bench, std::shared_ptr<MemoryDisk> disk,
            const Capabilities& capabilities = MemoryStorage::everything(disk_size))
      : image_(bench.image()) {
    auto storage = std::make_unique<MemoryStorage>(capabilities, std::move(disk));
    storage_ = storage.get();
    handle_ = std::make_shared<Handle>(std::move(storage));
  }
  Candidate(const Candidate&) = delete;
  Candidate& operator=(const Candidate&) = delete;
  ~Candidate() { leave(); }

  [[nodiscard]] Standing standing(const Image::Request& request) const {
    return image_.standing(*handle_, request);
  }
  Candidate& joins() {
    image_.join(handle_);
    joined_ = true;
    return *this;
  }
  Candidate& trusted() {
    joins();
    image_.cache().trust(*storage_);
    return *this;
  }
  /// Whatever it wrote stays in memory.
  void leave() {
    handle_->retire();
    if (std::exchange(joined_, false))
      image_.leave(*handle_);
  }

  /// Others know it by what it has stored.
  Candidate& known() {
    trusted().write(3 * unit, pattern(5000, 1));
    flush();
    return *this;
  }
  void write(std::uint64_t offset, std::span<const std::byte> data) {
    image_.cache().write(*storage_, offset, data, false);
  }
  void flush() { image_.cache().flush(*storage_); }
  void refuses_writes() { storage_->before = MemoryStorage::refusal(Kind::write, ENOSPC); }

  [[nodiscard]] MemoryStorage& storage() const { return *storage_; }
  [[nodiscard]] Handle& handle() const { return *handle_; }

private:
  Image& image_;
  MemoryStorage* storage_ = nullptr;
  std::shared_ptr<Handle> handle_;
  bool joined_ = false;
};

/// Whom a unit of `writer` would be written through; nullptr: nobody.
const Storage* lent(const Bench& bench, const Candidate& writer, bool was_refused = false) {
  const auto use = bench.image().lend(
      {static_cast<const Storage*>(&writer.storage()), {0, unit}, unit, was_refused});
  return use ? &use->storage() : nullptr;
}

} // namespace

TEST_CASE("who comes to an image that nobody uses founds it", "[image]") {
  const Bench bench;
  const Candidate first(bench, new_disk());
  CHECK(first.standing(GENERATE(writes, reads, flushes)) == Standing::founder);
  CHECK(first.storage().calls().empty());
}

TEST_CASE("who sees what others wrote after it came is trusted", "[image]") {
  const Bench bench;
  const auto disk = new_disk();
  Candidate writer(bench, disk);
  const Candidate newcomer(bench, disk);
  writer.known();
  const Image::Request request = GENERATE(writes, reads, flushes);
  // Where everything is on storage a reader needs nobody.
  CHECK(newcomer.standing(request) == (request.changes ? Standing::trusted : Standing::guest));
  CHECK(newcomer.storage().calls(Kind::read).size() <= Witnesses::most);
}

TEST_CASE("who does not see what others wrote is a stranger", "[image]") {
  const Bench bench;
  const auto disk = new_disk();
  Candidate writer(bench, disk);
  writer.known();
  const auto leave_something_to_lose = [&] { writer.write(5 * unit, pattern(100, 9)); };
  SECTION("on an empty disk") {
    leave_something_to_lose();
    const Candidate newcomer(bench, new_disk());
    CHECK(newcomer.standing(GENERATE(writes, reads, flushes)) == Standing::stranger);
  }
  SECTION("on a copy of what was there before") {
    const auto copy = copy_of(*disk);
    writer.write(7 * unit, pattern(5000, 2));
    writer.flush();
    leave_something_to_lose();
    const Candidate newcomer(bench, copy);
    CHECK(newcomer.standing(GENERATE(writes, reads, flushes)) == Standing::stranger);
  }
  SECTION("when only one byte differs") {
    const auto copy = copy_of(*disk);
    copy->write(3 * unit + Witnesses::largest_block - 1, pattern(1, 77), true);
    leave_something_to_lose();
    const Candidate newcomer(bench, copy);
    CHECK(newcomer.standing(GENERATE(writes, reads, flushes)) == Standing::stranger);
  }
}

TEST_CASE("a disk that looks the same is not taken for the same as long as it need not be",
          "[image]") {
  const Bench bench;
  const auto disk = new_disk();
  Candidate writer(bench, disk);
  writer.known();
  const Candidate copied(bench, copy_of(*disk)); // it might also be the disk itself
  CHECK(copied.standing(reads) == Standing::guest);
  CHECK(copied.standing(writes) == Standing::founder);

  // What is not on storage has to be put there first: then the two differ, if they are two.
  writer.write(9 * unit, pattern(5000, 2));
  writer.storage().forget_calls();
  const Candidate same(bench, disk);
  writer.write(10 * unit, pattern(5000, 3));
  CHECK(copied.standing(reads) == Standing::guest); // of what is on storage
  CHECK(copied.standing(writes) == Standing::stranger);
  CHECK(copied.storage().calls(Kind::write).empty());
  CHECK(same.standing(writes) == Standing::trusted);
  CHECK(same.storage().calls(Kind::write).empty());
  CHECK(writer.storage().calls(Kind::write).size() <= 2);
}

TEST_CASE("what is left needs somebody who sees what was written before, and as much", "[image]") {
  Bench bench;
  const auto disk = new_disk();
  const auto before = copy_of(*disk);
  {
    Candidate unlucky(bench, disk);
    unlucky.known();
    unlucky.refuses_writes();
    unlucky.write(20 * unit, pattern(100, 2));
    CHECK_THROWS_AS(unlucky.flush(), std::system_error);
  }
  const Image::Request request = GENERATE(writes, reads, flushes);
  CHECK(Candidate(bench, before).standing(request) == Standing::stranger);
  CHECK(Candidate(bench, disk).standing(request) == Standing::trusted);
  CHECK(Candidate(bench, disk, MemoryStorage::everything(disk_size - 4096)).standing(request) ==
        Standing::stranger);
  CHECK(bench.lost.empty());
  bench.image().report_lost();
  CHECK(bench.lost == "a 100\n");
}

TEST_CASE("how a disk begins is not enough for what is left of one of another size", "[image]") {
  const Bench bench;
  const auto disk = new_disk(2 * disk_size);
  disk->write(0, pattern(4096, 1), true);
  {
    Candidate unlucky(bench, disk);
    unlucky.trusted().refuses_writes();
    unlucky.write(20 * unit, pattern(100, 2));
    CHECK(bench.cache().drain(unlucky.storage()) == std::errc::no_space_on_device);
  }
  const Image::Request request = GENERATE(writes, reads, flushes);
  CHECK(Candidate(bench, disk).standing(request) == Standing::trusted);
  CHECK(Candidate(bench, disk, MemoryStorage::everything(2 * disk_size)).standing(request) ==
        Standing::stranger);
}

TEST_CASE("beside bytes that nobody can store there is nothing more to compare", "[image]") {
  const Bench bench;
  const auto disk = new_disk();
  Candidate unlucky(bench, disk);
  unlucky.trusted().refuses_writes();
  unlucky.write(20 * unit, pattern(100, 2));
  const Candidate newcomer(bench, disk);
  CHECK(newcomer.standing(writes) == Standing::trusted);
  CHECK(newcomer.storage().calls(Kind::write).empty());
}

TEST_CASE("a connection that cannot be compared gets storage's error", "[image]") {
  const Bench bench;
  const auto disk = new_disk();
  Candidate writer(bench, disk);
  writer.known();
  writer.write(3 * unit, pattern(100, 2));
  const Candidate newcomer(bench, disk);
  newcomer.storage().before = MemoryStorage::refusal(Kind::read, ENOMEDIUM);
  CHECK_THROWS_AS(newcomer.standing(writes), std::system_error);
}

TEST_CASE("a connection that has ended is nobody's founder", "[image]") {
  const Bench bench;
  Candidate client(bench, new_disk());
  client.leave();
  CHECK(client.standing(flushes) == Standing::guest);
  CHECK(client.storage().calls().empty());
}

TEST_CASE("others' units are never written through a guest", "[image]") {
  const Bench bench;
  const auto disk = new_disk();
  Candidate writer(bench, disk);
  Candidate guest(bench, disk);
  Candidate other(bench, disk);
  guest.joins();
  writer.trusted();
  CHECK(guest.handle().is_guest());
  CHECK_FALSE(writer.handle().is_guest());
  CHECK(lent(bench, writer) == &writer.storage());
  CHECK(lent(bench, writer, true) == &writer.storage());
  CHECK(lent(bench, guest) == &writer.storage());
  writer.handle().retire();
  CHECK(lent(bench, writer) == nullptr);
  CHECK(lent(bench, writer, true) == nullptr);
  other.trusted();
  CHECK(lent(bench, writer) == &other.storage());
  guest.handle().retire();
  CHECK(lent(bench, guest) == &other.storage());
}

TEST_CASE("where locks are the connection's own nobody's storage is lent for a comparison",
          "[image]") {
  Image::Settings settings;
  settings.lend = false;
  const Bench bench(settings);
  const auto disk = new_disk();
  Candidate writer(bench, disk);
  writer.trusted().write(3 * unit, pattern(5000, 1));
  writer.storage().forget_calls();
  const Candidate newcomer(bench, disk);
  CHECK(newcomer.standing(writes) == Standing::trusted);
  CHECK(writer.storage().calls().empty());
}

TEST_CASE("an image is as large as its largest user, and keeps what lies behind", "[image]") {
  const Bench bench;
  const auto disk = new_disk();
  Candidate large(bench, disk);
  Candidate small(bench, disk, MemoryStorage::everything(8 * unit));
  small.trusted();
  CHECK(bench.cache().size() == 8 * unit);
  CHECK(bench.image().is_used());
  large.trusted();
  CHECK(bench.cache().size() == disk_size);
  large.refuses_writes();
  large.write(20 * unit, pattern(100, 1));
  large.leave();
  CHECK(bench.cache().size() == disk_size);
  CHECK(bench.image().is_used());
  small.leave();
  CHECK_FALSE(bench.image().is_used());
  CHECK(bench.cache().unsaved().bytes == 100);
}

TEST_CASE("with the last user goes what was learned, and with one of them nothing", "[image]") {
  Bench bench;
  const auto disk = new_disk();
  Candidate first(bench, disk);
  Candidate second(bench, disk);
  first.trusted();
  second.trusted();
  first.write(3 * unit, pattern(100, 1));
  first.flush();
  const std::size_t held = bench.budget().used();
  CHECK(held > 0);
  first.leave();
  CHECK(bench.budget().used() == held);
  second.leave();
  CHECK(bench.budget().used() == 0);
}

TEST_CASE("others hear of each change of storage, and what was not lost is not reported",
          "[image]") {
  Bench bench;
  Candidate client(bench, new_disk());
  client.trusted().write(3 * unit, pattern(4096, 1));
  CHECK(bench.changed.empty());
  client.flush();
  CHECK(bench.changed == ByteRanges({3 * unit, 3 * unit + 4096}));
  bench.image().report_lost();
  CHECK(bench.lost.empty());
}

TEST_CASE("a verifier is there while somebody uses the image and wants it", "[image]") {
  Image::Settings settings;
  const Bench without(settings);
  Candidate(without, new_disk()).joins();
  CHECK(without.image().verifier() == nullptr);
  settings.verify = true;
  const Bench bench(settings);
  CHECK(bench.image().verifier() == nullptr);
  Candidate first(bench, new_disk());
  Candidate second(bench, new_disk());
  first.joins();
  second.joins();
  first.leave();
  CHECK(bench.image().verifier() != nullptr);
  second.leave();
  CHECK(bench.image().verifier() == nullptr);
}

TEST_CASE("an image owes what its users left, bytes first, until that is settled", "[image]") {
  using Debt = Image::Debt;
  Image::Settings settings;
  settings.verify = true;
  const Bench bench(settings); // all of its clusters are to be looked at
  CHECK(bench.image().owes() == Debt::clusters);
  Candidate client(bench, new_disk());
  client.trusted().refuses_writes();
  client.write(3 * unit, pattern(unit, 1));
  client.leave();
  CHECK(bench.image().owes() == Debt::bytes);
  Candidate next(bench, new_disk());
  next.trusted().flush();
  next.leave();
  CHECK(bench.image().owes() == Debt::clusters);
  Candidate last(bench, new_disk());
  last.joins();
  CachedImage image(bench.cache(), last.storage());
  CHECK(bench.image().verifier()->check(image) == Verifier::Outcome::clean);
  last.leave();
  CHECK(bench.image().owes() == Debt::none);
}
