// Changes of an image in memory that a verifier is told of, and checks; compared with a look at
// everything that the image's tables name. The changes, failing reads, connections that come and
// go, and how much memory there is, all come from the input.

#include "targets.hpp"

#include "compressed_bytes.hpp"
#include "image_bytes.hpp"
#include "input.hpp"
#include "util/byte_ranges.hpp"
#include "util/copy_bytes.hpp"
#include "verify/qcow2/decompressor.hpp"
#include "verify/qcow2/l2_table.hpp"
#include "verify/verifier.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using namespace qcowcache;
using qcow2::Compression;
using qcow2::Header;
using Outcome = Verifier::Outcome;
using Change = Verifier::Change;

constexpr std::size_t most_steps = 64;
constexpr std::uint64_t clusters = 40;
constexpr std::uint64_t first_table = 4;
constexpr std::uint64_t tables = 6;
constexpr std::uint64_t first_data = 12;
constexpr std::uint32_t l1_entries = 8;

class MemoryImage final : public Verifier::Image {
public:
  explicit MemoryImage(std::size_t size) : bytes(size) {}

  std::optional<Header> header() override {
    refuse_if_told();
    return qcow2::parse_header(std::span(bytes).first(qcow2::header_bytes));
  }
  [[nodiscard]] std::uint64_t size() const override { return bytes.size(); }
  void read(std::uint64_t offset, std::span<std::byte> data) override {
    if (data.empty() || offset + data.size() > bytes.size())
      throw fuzz::Broken("a read past the end of the image, or of nothing");
    refuse_if_told();
    const bool meeting = reads_until_meeting > 0 && --reads_until_meeting == 0;
    if (meeting && !meets_after)
      meet();
    copy_bytes(std::span(bytes).subspan(offset, data.size()), data.begin());
    if (meeting && meets_after)
      meet();
  }

  std::vector<std::byte> bytes;
  /// After so many reads one is refused; 0: none.
  std::uint64_t reads_until_refusal = 0;
  bool refused = false;
  /// In so many reads `meet` is called, before its bytes are taken or after; 0: in none.
  std::uint64_t reads_until_meeting = 0;
  bool meets_after = false;
  std::function<void()> meet;

private:
  void refuse_if_told() {
    if (reads_until_refusal == 0 || --reads_until_refusal > 0)
      return;
    refused = true;
    throw std::system_error(EIO, std::generic_category(), "injected");
  }
};

/// Compressed clusters: making them anew each time would take most of the time.
const std::vector<std::byte>& some_stream(Compression compression, std::uint32_t bits,
                                          std::size_t number) {
  constexpr std::size_t count = 3;
  static std::map<std::pair<Compression, std::uint32_t>, std::array<std::vector<std::byte>, count>>
      made;
  auto& streams = made[{compression, bits}];
  if (streams[0].empty()) {
    for (std::size_t i = 0; i < count; ++i)
      streams[i] = compressed(
          compression, i == 0 ? std::vector<std::byte>(std::size_t{1} << bits)
                              : compressible(std::size_t{1} << bits, static_cast<unsigned>(i)));
  }
  return streams[number % count];
}

std::vector<std::byte> number_bytes(std::uint64_t value, std::size_t width) {
  std::vector<std::byte> bytes(width);
  for (std::size_t i = width; i-- > 0; value >>= 8U)
    bytes[i] = static_cast<std::byte>(value & 0xffU);
  return bytes;
}

class Session {
public:
  explicit Session(fuzz::Input& input)
      : input_(input), bits_(input.one_of<std::uint32_t>({9, 12, 9, 14, 9, 9, 9, 9})),
        extended_(bits_ == 14), cluster_(std::uint64_t{1} << bits_), background_(input.yes()),
        budget_(some_memory()), image_(clusters * cluster_) {
    start({});
  }

  void run() {
    write_header();
    for (std::size_t i = 0; i < most_steps && !input_.empty() && !outsized_; ++i) {
      const std::size_t used = budget_.used();
      step();
      require(budget_.used() <= std::max(used, budget_.limit()), "more memory than allowed");
    }
    image_.reads_until_refusal = 0;
    image_.reads_until_meeting = 0;
    check();
    verifier_.reset();
    require(budget_.used() == 0, "memory is in use for nothing");
  }

private:
  /// Of an entry: its place in the tables, and its value.
  using Place = std::tuple<std::uint32_t, std::uint32_t, std::uint64_t>;

  enum class Step {
    header,
    l1_entry,
    l2_entry,
    stream,
    raw,
    zero,
    copy_table,
    unknown,
    foreign,
    crossing,
    check,
    refuse,
    reconnect,
    memory,
    decode,
    many_entries,
  };

  /// Ends it.
  struct Opening {
    bool& opening;
    ~Opening() { opening = false; }
  };

  static void require(bool condition, const char* what) {
    if (!condition)
      throw fuzz::Broken(what);
  }

  std::size_t some_memory() {
    return input_.one_of<std::size_t>({64U << 20U, 0, 131072, 262144, 600000, 2U << 20U});
  }

  void start(Verifier::Left left) {
    Verifier::Settings settings;
    settings.report = [](const std::string& /*line*/) {};
    if (background_)
      settings.wake = [](std::size_t /*waiting*/) {}; // the input says when somebody comes
    settings.left = std::move(left);
    settings.decompressors = decompressors_;
    verifier_ = std::make_unique<Verifier>(std::move(settings), budget_);
    unused_ = true;
    uploaded_.clear();
    ever_written_.clear();
  }

  void step() {
    switch (static_cast<Step>(input_.number(1) % 16)) {
    case Step::header:
      write_header();
      break;
    // Place, then content: which of two arguments is evaluated first is the compiler's choice, and
    // an input has to mean the same everywhere.
    case Step::l1_entry: {
      const std::uint64_t at = l1_at_ + input_.number(1) % l1_entries * 8;
      write(at, number_bytes(some_table(true), 8));
      break;
    }
    case Step::l2_entry: {
      const std::uint64_t at = some_entry_offset();
      write(at, number_bytes(some_entry(), 8));
      break;
    }
    case Step::stream: {
      const std::uint64_t at = some_data();
      write(at, some_stream(compression_, bits_, input_.number(1)));
      break;
    }
    case Step::raw:
      write_raw();
      break;
    case Step::zero:
      zero(some_range());
      break;
    case Step::copy_table: {
      const std::span<const std::byte> table =
          std::span(image_.bytes).subspan(some_table(), cluster_);
      write(some_table(), std::vector<std::byte>(table.begin(), table.end()));
      break;
    }
    case Step::unknown:
      change_without_a_word(some_range());
      break;
    case Step::foreign:
      change_by_others(some_range());
      break;
    case Step::crossing:
      write_crossing();
      break;
    case Step::check:
      check();
      break;
    case Step::refuse:
      if (const std::uint64_t chosen = input_.number(1); chosen < 128)
        image_.reads_until_refusal = chosen % 8;
      else
        meet_later(chosen % 16);
      break;
    case Step::reconnect:
      check(); // as whoever leaves does
      if (met_)
        check(); // others go on, and know what they did meanwhile
      start(verifier_->left());
      break;
    case Step::memory:
      budget_.set_limit(some_memory());
      break;
    case Step::decode:
      verifier_->decode_one();
      break;
    case Step::many_entries: {
      std::vector<std::byte> table;
      const std::uint64_t entry = some_entry();
      while (table.size() < cluster_) {
        const std::vector<std::byte> bytes = number_bytes(entry + table.size() / 64, 8);
        table.insert(table.end(), bytes.begin(), bytes.end());
      }
      write(some_table(), table);
      break;
    }
    }
  }

  // ---- What is written

  std::uint64_t some_table(bool or_none = false) {
    const std::uint64_t chosen = input_.number(1) % (tables + 1);
    return chosen == tables && or_none ? 0 : (first_table + chosen % tables) * cluster_;
  }
  std::uint64_t some_data() {
    const std::uint64_t number = input_.number(2);
    // Few places, so that entries find streams.
    return (first_data + number % 16) * cluster_ + (number & 0x100U ? 77 : 0);
  }
  std::uint64_t some_entry() {
    const std::uint64_t chosen = input_.number(1);
    if (chosen % 8 == 0)
      return 0;
    if (chosen % 8 == 1)
      return first_data * cluster_; // not compressed
    const std::uint64_t at = chosen % 8 == 2 ? image_.size() - 600 : some_data();
    const std::uint64_t size =
        chosen % 8 == 3 ? 1 : some_stream(compression_, bits_, chosen / 8).size();
    const std::uint64_t sectors = (at + size - 1) / 512 - at / 512;
    return std::uint64_t{1} << 62U | sectors << (62 - (bits_ - 8)) | at;
  }
  std::uint64_t some_entry_offset() {
    const std::uint64_t table = some_table();
    return table + input_.number(1) % 16 * (extended_ ? 16 : 8);
  }
  ByteRange some_range() {
    const std::uint64_t begin = input_.number(3) % image_.size();
    const std::uint64_t size = input_.one_of<std::uint64_t>({8, 1, 512, cluster_, 3 * cluster_});
    const std::uint64_t aligned = size >= 8 ? begin & ~(size >= 512 ? 511ULL : 7ULL) : begin;
    return ByteRange{aligned, aligned + size}.intersection({0, image_.size()});
  }

  void store(std::uint64_t offset, std::span<const std::byte> data) {
    copy_bytes(data, image_.bytes.begin() + static_cast<std::ptrdiff_t>(offset));
  }
  Change begin_change(const ByteRange& range) {
    rewritten_.add(range);
    opening_ = std::exchange(unused_, false);
    const Opening opening{opening_};
    return {verifier_.get(), image_, range};
  }
  void write(std::uint64_t offset, std::span<const std::byte> data) {
    const std::span<const std::byte> fits =
        data.first(std::min<std::uint64_t>(data.size(), image_.size() - offset));
    Change change = begin_change({offset, offset + fits.size()});
    store(offset, fits);
    change.wrote(fits);
    upload({offset, offset + fits.size()});
  }
  /// Who writes each byte once, from the first one on, uploads an image.
  void upload(const ByteRange& range) {
    ever_written_.add(range);
    if (range.begin == 0 && !range.empty())
      uploaded_ = ByteRanges(range);
    else if (uploaded_.empty() || uploaded_.overlaps(range))
      uploaded_.clear();
    else
      uploaded_.add(range);
  }
  /// Whether an entry names what such a client has not come to yet, but for what there is of its
  /// last sector.
  bool is_awaited(const Place& place, const Header& header) {
    const auto is_to_come = [&](const ByteRange& range) {
      const ByteRange data = range.intersection({0, image_.size()});
      if (uploaded_.empty() || data.empty())
        return false;
      const ByteRange last{(data.end - 1) / 512 * 512, data.end};
      return uploaded_.hull().end <= last.begin && !ever_written_.overlaps(last);
    };
    const std::uint64_t entry_at = header.l1.offset + std::get<0>(place) * 8;
    std::vector<std::byte> entry(8);
    if (entry_at + 8 <= image_.size())
      copy_bytes(std::span(image_.bytes).subspan(entry_at, 8), entry.begin());
    const std::uint64_t table =
        qcow2::l2_table_offset(qcow2::l1_entry(entry, 0), header).value_or(0);
    return is_to_come(qcow2::compressed_cluster(std::get<2>(place), header).range()) ||
           is_to_come(qcow2::l1_range(header)) ||
           is_to_come({table, table + header.cluster_size()});
  }
  void zero(const ByteRange& range) {
    Change change = begin_change(range);
    store(range.begin, std::vector<std::byte>(range.size()));
    change.zeroed();
  }
  void write_raw() {
    const ByteRange range = some_range();
    write(range.begin, pattern(range.size(), static_cast<unsigned>(input_.number(1))));
  }
  std::vector<std::byte> some_bytes(std::size_t size) {
    return input_.yes() ? pattern(size, static_cast<unsigned>(input_.number(1)))
                        : std::vector<std::byte>(size);
  }
  void change_by_others(const ByteRange& range) {
    change_by_others(range, some_bytes(range.size()));
  }
  void change_by_others(const ByteRange& range, std::span<const std::byte> data) {
    store(range.begin, data);
    verifier_->forget(range);
    // Before its first change a verifier takes what is there for old.
    if (unused_ || opening_)
      know(true);
  }
  /// Others change the file in the middle of a read.
  void meet_later(std::uint64_t chosen) {
    image_.reads_until_meeting = 1 + chosen / 2;
    image_.meets_after = chosen % 2 != 0;
    ByteRange range;
    std::vector<std::byte> data;
    switch (input_.number(1) % 3) {
    case 0:
      range.begin = l1_at_ + input_.number(1) % l1_entries * 8;
      data = number_bytes(some_table(true), 8);
      break;
    case 1:
      range.begin = some_entry_offset();
      data = number_bytes(some_entry(), 8);
      break;
    default:
      range = some_range();
      data = pattern(range.size(), 7);
      break;
    }
    range.end = range.begin + data.size();
    image_.meet = [this, range, data] {
      met_ = true;
      know(false); // a check may have looked at it already
      change_by_others(range, data);
    };
  }
  /// As a write that fails after it has written something.
  void change_without_a_word(const ByteRange& range) {
    const Change change = begin_change(range);
    store(range.begin, some_bytes(range.size()));
  }
  /// Two writes at once, the bytes of either being there afterwards.
  void write_crossing() {
    const std::uint64_t at = input_.yes() ? some_entry_offset() : some_data();
    const std::vector<std::byte> a = number_bytes(some_entry(), 8);
    const std::vector<std::byte> b = some_stream(compression_, bits_, input_.number(1));
    const std::uint64_t chosen = input_.number(1);
    Change first = begin_change({at, at + a.size()});
    Change second = begin_change({at, at + b.size()});
    if ((chosen & 1U) != 0) {
      store(at, a);
      store(at, b);
    } else {
      store(at, b);
      store(at, a);
    }
    if ((chosen & 4U) != 0)
      check(true);
    if ((chosen & 2U) != 0) {
      first.wrote(a);
      upload({at, at + a.size()});
      second.wrote(b);
      upload({at, at + b.size()});
    } else {
      second.wrote(b);
      upload({at, at + b.size()});
      first.wrote(a);
      upload({at, at + a.size()});
    }
    rewritten_.add({at, at + std::max(a.size(), b.size())});
  }

  void write_header() {
    const std::uint64_t chosen = input_.number(1);
    compression_ = (chosen & 1U) != 0 ? Compression::zstd : Compression::deflate;
    l1_at_ = (chosen & 2U) != 0 ? cluster_ : 2 * cluster_;
    std::vector<std::byte> header = qcow2_header(bits_);
    const auto put = [&](std::size_t at, std::uint64_t value, std::size_t width) {
      copy_bytes(number_bytes(value, width), header.begin() + static_cast<std::ptrdiff_t>(at));
    };
    put(24, std::uint64_t{1} << 40U, 8);
    put(36, (chosen & 4U) != 0 ? l1_entries / 2 : l1_entries, 4);
    put(40, l1_at_, 8);
    const bool unknown = chosen % 32 == 31;
    put(72,
        (compression_ == Compression::zstd ? 8U : 0U) | (extended_ ? 16U : 0U) |
            (unknown ? 32U : 0U),
        8);
    put(104, compression_ == Compression::zstd ? 1 : 0, 1);
    write(0, header);
  }

  // ---- Checks

  /// All that the image has: what can be read, and what cannot.
  struct Found {
    std::set<Place> good;
    std::set<Place> bad;
  };

  /// No check needs to look at what is good now, or at all that is there.
  Found know(bool all) {
    Found found = look();
    known_.insert(found.good.begin(), found.good.end());
    if (all)
      known_.insert(found.bad.begin(), found.bad.end());
    return found;
  }

  Found look() {
    Found found;
    const auto header = qcow2::parse_header(std::span(image_.bytes).first(qcow2::header_bytes));
    if (!header || header->unknown_features)
      return found;
    // What was written over the header may claim millions of tables, which is only slow.
    outsized_ = outsized_ || header->l1.entries > l1_entries;
    if (outsized_)
      return found;
    const std::uint64_t size = image_.size();
    const auto bytes_at = [&](std::uint64_t at, std::uint64_t count) {
      const ByteRange inside = ByteRange{at, at + count}.intersection({0, size});
      std::vector<std::byte> bytes(count);
      if (!inside.empty())
        copy_bytes(std::span(image_.bytes).subspan(at, inside.size()), bytes.begin());
      return bytes;
    };
    for (std::uint32_t i = 0; i < header->l1.entries; ++i) {
      const auto entry = bytes_at(header->l1.offset + i * 8, 8);
      if (const auto table = qcow2::l2_table_offset(qcow2::l1_entry(entry, 0), *header))
        look_at_table(i, bytes_at(*table, header->cluster_size()), *header, found);
    }
    return found;
  }

  void look_at_table(std::uint32_t l1_index, const std::vector<std::byte>& table,
                     const Header& header, Found& found) {
    for (std::uint32_t j = 0; j < header.l2_entries(); ++j) {
      const std::uint64_t value = qcow2::l2_entry(table, j, header);
      if (!qcow2::is_compressed(value))
        continue;
      const qcow2::CompressedCluster cluster = qcow2::compressed_cluster(value, header);
      const ByteRange data =
          ByteRange{cluster.offset, cluster.offset + cluster.length}.intersection(
              {0, image_.size()});
      const std::span<const std::byte> bytes =
          data.empty() ? std::span<const std::byte>()
                       : std::span<const std::byte>(image_.bytes).subspan(data.begin, data.size());
      const bool good = decoder_.decode(header.compression, bytes, header.cluster_size()).whole();
      (good ? found.good : found.bad).insert({l1_index, j, value});
    }
  }

  /// Entries that name what was written, zeroed or trimmed are new again.
  void forget_rewritten() {
    const auto header = qcow2::parse_header(std::span(image_.bytes).first(qcow2::header_bytes));
    if (!header)
      return;
    std::erase_if(known_, [&](const Place& place) {
      return rewritten_.overlaps(qcow2::compressed_cluster(std::get<2>(place), *header).range());
    });
  }

  /// `changing`: of what is being changed a check may see either state.
  void check(bool changing = false) {
    image_.refused = false;
    forget_rewritten();
    met_ = false;
    opening_ = unused_;
    std::optional<Outcome> outcome;
    try {
      outcome = verifier_->check(image_);
    } catch (const std::system_error&) {
      require(image_.refused, "a check failed, and no read had");
    }
    opening_ = false;
    if (outcome)
      rewritten_.clear();
    const Found found = know(false);
    if (!outcome || changing || met_ || outsized_)
      return;
    if (*outcome == Outcome::damaged) {
      require(!found.bad.empty(), "a false alarm");
      require(verifier_->failing() <= found.bad.size(), "more failures than there are");
    } else {
      require(verifier_->failing() == 0, "clean, with failures");
      const auto header = qcow2::parse_header(std::span(image_.bytes).first(qcow2::header_bytes));
      for (const Place& bad : found.bad)
        require(known_.contains(bad) || is_awaited(bad, *header), "damage that was not found");
    }
  }

  fuzz::Input& input_;
  const std::uint32_t bits_;
  const bool extended_;
  const std::uint64_t cluster_;
  const bool background_;
  const std::shared_ptr<DecompressorPool> decompressors_ = std::make_shared<DecompressorPool>(1);
  MemoryBudget budget_;
  MemoryImage image_;
  std::unique_ptr<Verifier> verifier_;
  Compression compression_ = Compression::deflate;
  std::uint64_t l1_at_ = 0;
  /// What no check needs to look at: it was good once, or there before the verifier.
  std::set<Place> known_;
  /// By the upload that is going on.
  ByteRanges uploaded_;
  ByteRanges ever_written_;
  /// What was changed since the check before.
  ByteRanges rewritten_;
  /// The verifier has seen no change.
  bool unused_ = true;
  /// It is seeing the first one.
  bool opening_ = false;
  /// The model does not follow the image any more.
  bool outsized_ = false;
  /// Others changed the file during the last check.
  bool met_ = false;
  qcow2::Decompressor decoder_;
};

} // namespace

void fuzz::verifier(std::span<const std::byte> bytes) {
  Input input(bytes);
  Session(input).run();
}
