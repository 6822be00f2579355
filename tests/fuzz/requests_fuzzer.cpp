// Requests to a write cache over storage in memory that may fail at any time, compared with an
// array of bytes. Storage, the cache's settings and the requests all come from the input.

#include "targets.hpp"

#include "all_zeros.hpp"
#include "copy_bytes.hpp"
#include "image_bytes.hpp"
#include "input.hpp"
#include "memory_storage.hpp"
#include "write_cache.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace {

using namespace qcowcache;
using Kind = MemoryStorage::Kind;

constexpr std::size_t most_requests = 96;
/// An input that reads and writes more than this is only slow.
constexpr std::uint64_t most_bytes = std::uint64_t{2} * 1024 * 1024;
/// No export is larger.
constexpr std::uint64_t most_size = std::uint64_t{512} * 1024;

/// `size` bytes that differ with `number`: making them anew each time would take most of the time.
std::span<const std::byte> some_bytes(std::size_t size, std::uint64_t number) {
  static const std::vector<std::byte> all = pattern(2 * most_size, 1);
  return std::span(all).subspan(number * 4099 % most_size, size);
}

Capabilities some_capabilities(fuzz::Input& input) {
  Capabilities capabilities = MemoryStorage::everything(0);
  capabilities.minimum = input.one_of<std::uint32_t>({1, 1, 1, 512, 4096, 65536});
  capabilities.preferred =
      std::max(capabilities.minimum, input.one_of<std::uint32_t>({4096, 512, 65536, 131072}));
  capabilities.maximum = std::max(
      capabilities.minimum, input.one_of<std::uint32_t>({UINT32_MAX, 65536, 1024, 131072, 196608}));
  const std::uint64_t size =
      input.one_of<std::uint64_t>({300001, 1, 2, 111, 112, 511, 513, 4097, 65535, 65536, 65537,
                                   131072, 196609, 262144, 393729, 524288});
  capabilities.size = align_down(size, capabilities.minimum);
  const std::uint64_t can = input.number(1);
  capabilities.can_flush = (can & 1U) == 0;
  capabilities.can_trim = (can & 2U) == 0;
  capabilities.can_zero = (can & 4U) == 0;
  capabilities.can_fast_zero = (can & 12U) == 0;
  capabilities.can_extents = (can & 16U) == 0;
  capabilities.fua = input.one_of({Fua::native, Fua::emulate, Fua::none});
  return capabilities;
}

WriteCache::Settings some_settings(fuzz::Input& input, bool background) {
  WriteCache::Settings settings;
  settings.cluster_size =
      input.one_of<std::optional<std::uint64_t>>({std::nullopt, 65536, 512, 131072});
  settings.max_write = input.one_of<std::uint64_t>({1048576, 65536, 200000});
  settings.reserve = input.one_of<std::uint64_t>({0, 131072, 67108864});
  if (background) {
    // Nobody comes: what is queued waits until the input says otherwise.
    settings.wake_writer = [](std::size_t /*waiting*/) {};
  }
  return settings;
}

std::size_t some_memory(fuzz::Input& input) {
  return input.one_of<std::size_t>({8U << 20U, 0, 65536, 150000, 220000, 300000, 1U << 20U});
}

// Loops over single bytes are slow under sanitizers, and std::ranges::equal has one for std::byte.
bool same(std::span<const std::byte> a, std::span<const std::byte> b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size()) == 0);
}

class Session {
public:
  explicit Session(fuzz::Input& input)
      : input_(input), background_(input.yes()),
        budget_(background_ ? std::size_t{64} << 20U : some_memory(input)),
        storage_(some_capabilities(input)), settings_(some_settings(input, background_)),
        cache_(std::make_shared<WriteCache>(settings_, storage_.capabilities(), locks_, budget_)),
        model_(storage_.capabilities().size) {
    budget_.add_holder(cache_);
    storage_.before = [this](const MemoryStorage::Call& call) { fail_if_told(call); };
    if (!model_.empty() && input.yes()) {
      // An image that was there before, and other bytes up to the middle of a block.
      copy_bytes(some_bytes(model_.size(), 0), model_.begin());
      std::fill(model_.begin() + static_cast<std::ptrdiff_t>(model_.size() * 5 / 8), model_.end(),
                std::byte{0});
      const std::vector<std::byte> image = qcow2_header(16);
      std::copy_n(image.begin(), std::min(image.size(), model_.size()), model_.begin());
      storage_.disk().write(0, model_, true);
    }
  }

  void run() {
    cache_->learn_layout(storage_);
    for (std::size_t i = 0; i < most_requests && moved_ < most_bytes && !input_.empty(); ++i) {
      const std::size_t used = budget_.used();
      injected_.clear();
      storage_.forget_calls();
      request();
      require(budget_.used() <= std::max(used, budget_.limit()), "more memory than allowed");
      keeps_its_promises_to_storage();
    }
    ends_well();
  }

private:
  /// Chosen by the input: those without one request each are more likely.
  enum class Request {
    write,
    append,
    header,
    write_fua,
    read,
    flush,
    zero,
    trim,
    extents,
    fail,
    write_next,
    tick,
    cluster_end,
    less_memory,
    reconnect,
    drain,
  };

  static void require(bool condition, const char* what) {
    if (!condition)
      throw fuzz::Broken(what);
  }

  void request() {
    if (model_.empty()) {
      flush();
      return;
    }
    switch (static_cast<Request>(input_.number(1) % 16)) {
    case Request::write:
      write(some_range(), false);
      break;
    case Request::append:
      append();
      break;
    case Request::header:
      write_header();
      break;
    case Request::write_fua:
      write(some_range(), true);
      break;
    case Request::read:
      read(some_range());
      break;
    case Request::flush:
      flush();
      break;
    case Request::zero:
      zero(some_range());
      break;
    case Request::trim:
      trim(some_range());
      break;
    case Request::extents:
      extents(some_range());
      break;
    case Request::fail:
      fail_later();
      break;
    case Request::write_next:
      cache_->write_next(storage_);
      break;
    case Request::tick:
      cache_->tick();
      break;
    case Request::cluster_end:
      cache_->set_cluster_end(some_range().begin);
      break;
    case Request::less_memory:
      // With background writers requests wait for them, and there are none.
      if (background_)
        cache_->release_clean(input_.number(2));
      else
        budget_.set_limit(some_memory(input_));
      break;
    case Request::reconnect:
      cache_->drain(storage_);
      cache_->forget_all();
      cache_->learn_layout(storage_);
      break;
    case Request::drain:
      cache_->drain(storage_);
      break;
    }
  }

  ByteRange some_range() {
    const std::uint64_t size = model_.size();
    const std::uint64_t begin = input_.number(3) % size;
    const std::uint64_t rest = size - begin;
    const std::uint64_t unit = cache_->unit_size();
    std::uint64_t length = 1;
    switch (input_.number(1) % 6) {
    case 0:
      length = input_.number(2);
      break;
    case 1:
      length = input_.number(1);
      break;
    case 2: // to the end of the unit
      length = unit - begin % unit;
      break;
    case 3: // to the end of the export
      length = rest;
      break;
    case 4: // one whole unit
      return ByteRange{align_down(begin, unit), align_down(begin, unit) + unit}.intersection(
          {0, size});
    default:
      break;
    }
    return {begin, begin + std::clamp<std::uint64_t>(length, 1, rest)};
  }

  // ---- Failures

  void fail_later() {
    failing_ = input_.number(1) % 128; // a bit for each kind of call
    calls_until_failure_ = input_.number(1) % 8;
    failures_left_ = input_.one_of<std::size_t>({1, 2, 1000, 0});
    error_ = input_.one_of({EIO, ENOSPC, EPERM, ENOTSUP});
  }

  void fail_if_told(const MemoryStorage::Call& call) {
    if (peeking_ || (failing_ >> static_cast<unsigned>(call.kind) & 1U) == 0 || failures_left_ == 0)
      return;
    if (calls_until_failure_ > 0) {
      --calls_until_failure_;
      return;
    }
    --failures_left_;
    injected_.push_back(error_);
    throw std::system_error(error_, std::generic_category(), "injected");
  }

  /// Carries a request out; false when it failed, as it may when storage has.
  template <typename Work>
  bool succeeds(Work work) {
    try {
      work();
      return true;
    } catch (const std::system_error& error) {
      const int code = error.code().value();
      require(std::ranges::find(injected_, code) != injected_.end(),
              "an error that is not storage's");
      return false;
    }
  }

  // ---- Requests

  std::vector<std::byte> peek(const ByteRange& range) {
    std::vector<std::byte> data(range.size());
    if (data.empty())
      return data;
    peeking_ = true;
    cache_->read(storage_, range.begin, data);
    peeking_ = false;
    return data;
  }

  std::span<std::byte> expected(const ByteRange& range) {
    return std::span(model_).subspan(range.begin, range.size());
  }

  /// After a request that failed, or that may do one thing or another: each byte is as it was, or
  /// as it is in `other`, and stays what it is from then on.
  void either(const ByteRange& range, std::span<const std::byte> other, const char* what) {
    const std::vector<std::byte> found = peek(range);
    const std::span<std::byte> before = expected(range);
    if (same(found, before))
      return;
    for (std::size_t i = 0; i < found.size(); ++i)
      require(found[i] == before[i] || found[i] == other[i], what);
    copy_bytes(found, before.begin());
  }

  void unchanged(const ByteRange& range, const char* what) {
    require(same(peek(range), expected(range)), what);
  }

  void is_durable(const ByteRange& range, const char* what) {
    // The disk in memory does not know what was written before a FUA that nbdkit emulates.
    const Capabilities& capabilities = storage_.capabilities();
    const bool tells = capabilities.fua == Fua::native ||
                       (capabilities.fua == Fua::none && capabilities.can_flush);
    const std::vector<std::byte> stored = tells ? storage_.disk().durable() : storage_.disk().now();
    require(same(std::span(stored).subspan(range.begin, range.size()), expected(range)), what);
  }

  void write_data(const ByteRange& range, std::span<const std::byte> data, bool fua) {
    moved_ += range.size();
    last_end_ = range.end;
    if (!succeeds([&] { cache_->write(storage_, range.begin, data, fua); })) {
      either(range, data, "a failed write left other bytes");
      return;
    }
    copy_bytes(data, expected(range).begin());
    if (fua)
      is_durable(range, "a write with FUA is not durable");
  }

  void write(const ByteRange& range, bool fua) {
    write_data(range, some_bytes(range.size(), ++writes_), fua);
  }

  void append() {
    const std::uint64_t begin = last_end_ % model_.size();
    const std::uint64_t length = 1 + input_.number(1) * 97;
    write({begin, std::min<std::uint64_t>(begin + length, model_.size())}, false);
  }

  void write_header() {
    const std::vector<std::byte> image = qcow2_header(input_.one_of({16U, 9U, 12U, 17U, 21U, 22U}));
    const std::size_t end = std::min(image.size(), model_.size());
    const std::size_t middle = input_.number(1) % end;
    const bool fua = input_.yes();
    const std::uint64_t appending = last_end_;
    if (middle > 0)
      write_data({0, middle}, std::span(image).first(middle), fua);
    write_data({middle, end}, std::span(image).subspan(middle, end - middle), fua);
    last_end_ = appending;
  }

  void read(const ByteRange& range) {
    std::vector<std::byte> data(range.size());
    moved_ += range.size();
    if (succeeds([&] { cache_->read(storage_, range.begin, data); }))
      require(same(data, expected(range)), "a read returns other bytes");
  }

  void flush() {
    if (!succeeds([&] { cache_->flush(storage_); }))
      return;
    require(cache_->clean() && cache_->unsaved().bytes == 0, "a flush left bytes behind");
    if (storage_.capabilities().can_flush)
      require(same(storage_.disk().durable(), model_), "a flush is not durable");
    else
      require(same(storage_.disk().now(), model_), "a flush did not store everything");
  }

  void zero(const ByteRange& range) {
    const Capabilities& capabilities = storage_.capabilities();
    if (!capabilities.can_zero)
      return;
    moved_ += range.size();
    Storage::ZeroOptions options;
    const std::uint64_t chosen = input_.number(1);
    options.may_trim = (chosen & 1U) != 0;
    options.fua = (chosen & 2U) != 0;
    options.fast = (chosen & 4U) != 0 && capabilities.can_fast_zero;
    const std::vector<std::byte> zeros(range.size());
    const ByteRange blocks = align_inward(range, capabilities.minimum);
    if (options.fast && (blocks != range || storage_.pieces(blocks) != 1)) {
      try {
        cache_->zero(storage_, range, options);
        throw fuzz::Broken("a fast zero that takes several requests succeeded");
      } catch (const std::system_error& error) {
        require(error.code().value() == ENOTSUP, "a fast zero failed in another way");
      }
      unchanged(range, "a fast zero that failed changed bytes");
    } else if (succeeds([&] { cache_->zero(storage_, range, options); })) {
      copy_bytes(zeros, expected(range).begin());
      if (options.fua)
        is_durable(range, "a zero with FUA is not durable");
    } else if (options.fast && !options.fua) {
      unchanged(range, "a fast zero that failed changed bytes");
    } else {
      either(range, zeros, "a failed zero left other bytes");
    }
  }

  void trim(const ByteRange& range) {
    const Capabilities& capabilities = storage_.capabilities();
    if (!capabilities.can_trim)
      return;
    moved_ += range.size();
    const bool fua = input_.yes();
    succeeds([&] { cache_->trim(storage_, range, fua); });
    // Blocks that lie in it only in part keep what they have.
    std::vector<std::byte> trimmed(expected(range).begin(), expected(range).end());
    const ByteRange blocks = align_inward(range, capabilities.minimum);
    std::fill_n(trimmed.begin() + static_cast<std::ptrdiff_t>(blocks.begin - range.begin),
                blocks.size(), std::byte{0});
    either(range, trimmed, "a trim left other bytes");
  }

  void extents(const ByteRange& range) {
    if (!storage_.capabilities().can_extents)
      return;
    const bool only_first = input_.yes();
    Storage::Extents found;
    if (!succeeds([&] { found = cache_->extents(storage_, range, only_first); }))
      return;
    require(!found.empty(), "no extent");
    std::uint64_t end = range.begin;
    for (const Storage::Extent& extent : found) {
      require(extent.range.begin == end && extent.range.end > end && extent.range.end <= range.end,
              "extents with a gap, or outside of the range");
      end = extent.range.end;
      const bool reads_zero = extent.type == Storage::ExtentType::zero ||
                              extent.type == Storage::ExtentType::hole_and_zero;
      require(!reads_zero || all_zeros(expected(extent.range)),
              "an extent calls zeros what is none");
    }
  }

  // ---- What has to hold all the time

  void keeps_its_promises_to_storage() {
    const std::vector<std::string> violations = storage_.violations();
    if (!violations.empty())
      throw fuzz::Broken("a request that storage does not take: " + violations.front());
    // With a fixed cluster size and memory enough everything is cached.
    if (!settings_.cluster_size || !background_)
      return;
    const std::uint64_t alignment = storage_.capabilities().write_alignment();
    for (const MemoryStorage::Call& call : storage_.calls(Kind::write))
      require(call.range.begin % alignment == 0 &&
                  (call.range.end % alignment == 0 || call.range.end == model_.size()),
              "a write that is not aligned");
  }

  void ends_well() {
    failing_ = 0;
    injected_.clear();
    require(same(peek({0, model_.size()}), model_), "other bytes in the end");
    require(!cache_->drain(storage_), "storage takes everything, but not everything went");
    require(same(storage_.disk().now(), model_), "other bytes on storage in the end");
    flush();
    keeps_its_promises_to_storage();
    cache_->forget_all();
    require(budget_.used() == 0, "memory is in use for nothing");
    require(same(peek({0, model_.size()}), model_), "other bytes with nothing cached");
  }

  fuzz::Input& input_;
  const bool background_;
  RangeLock locks_;
  MemoryBudget budget_;
  MemoryStorage storage_;
  const WriteCache::Settings settings_;
  std::shared_ptr<WriteCache> cache_;
  std::vector<std::byte> model_;
  std::uint64_t writes_ = 0;
  std::uint64_t moved_ = 0;
  std::uint64_t last_end_ = 0;

  std::uint64_t failing_ = 0;
  std::uint64_t calls_until_failure_ = 0;
  std::size_t failures_left_ = 0;
  int error_ = EIO;
  bool peeking_ = false;
  std::vector<int> injected_;
};

} // namespace

void fuzz::requests(std::span<const std::byte> bytes) {
  Input input(bytes);
  Session(input).run();
}
