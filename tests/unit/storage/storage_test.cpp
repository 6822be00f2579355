#include "storage/storage.hpp"

#include "catch.hpp"
#include "error_of.hpp"

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <random>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

using qcowcache::align_down;
using qcowcache::ByteRange;
using qcowcache::Capabilities;
using qcowcache::Fua;
using qcowcache::Storage;

namespace {

constexpr std::uint64_t mebibyte = std::uint64_t{1024} * 1024;
constexpr std::uint64_t gibibyte = 1024 * mebibyte;

/// What storage has at `offset`: other bytes in each block, so that pieces cannot be mixed up.
std::byte byte_at(std::uint64_t offset) {
  return static_cast<std::byte>((offset * 7 + offset / 251) % 256);
}

std::vector<std::byte> bytes_of(const ByteRange& range) {
  std::vector<std::byte> data;
  data.reserve(range.size());
  for (std::uint64_t at = range.begin; at < range.end; ++at)
    data.push_back(byte_at(at));
  return data;
}

/// Storage that writes down the requests that reach it, and has no bytes of its own.
class Recorder final : public Storage {
public:
  explicit Recorder(const Capabilities& capabilities) : capabilities_(capabilities) {}

  [[nodiscard]] const Capabilities& capabilities() const noexcept override { return capabilities_; }
  /// The requests so far, "read 0-4096, flush"; they are then forgotten.
  std::string requests() {
    ranges.clear();
    return std::exchange(requests_, {});
  }

  /// The ranges of the requests so far.
  std::vector<ByteRange> ranges;
  /// Refuses the request that begins here, with ENOSPC.
  std::optional<std::uint64_t> refused_at;
  /// What storage answers when asked for extents.
  Extents answer;
  /// Whether every byte written was the one of its place.
  bool wrote_right_bytes = true;

protected:
  void do_read(std::uint64_t offset, std::span<std::byte> data) override {
    record("read", {offset, offset + data.size()}, "");
    for (std::size_t i = 0; i < data.size(); ++i)
      data[i] = byte_at(offset + i);
  }
  void do_write(std::uint64_t offset, std::span<const std::byte> data, bool fua) override {
    record("write", {offset, offset + data.size()}, fua ? " fua" : "");
    for (std::size_t i = 0; i < data.size(); ++i)
      wrote_right_bytes = wrote_right_bytes && data[i] == byte_at(offset + i);
  }
  void do_flush() override { append("flush"); }
  void do_zero(const ByteRange& range, const ZeroOptions& options) override {
    record("zero", range,
           std::string(options.may_trim ? " may-trim" : "") + (options.fua ? " fua" : "") +
               (options.fast ? " fast" : ""));
  }
  void do_trim(const ByteRange& range, bool fua) override {
    record("trim", range, fua ? " fua" : "");
  }
  void do_cache(const ByteRange& range) override { record("cache", range, ""); }
  Extents do_extents(const ByteRange& range, bool only_first) override {
    record("extents", range, only_first ? " only-first" : "");
    return answer;
  }

private:
  void append(const std::string& request) {
    requests_ += (requests_.empty() ? "" : ", ") + request;
  }
  void record(const std::string& kind, const ByteRange& range, const std::string& flags) {
    append(kind + " " + std::to_string(range.begin) + "-" + std::to_string(range.end) + flags);
    ranges.push_back(range);
    if (refused_at == range.begin)
      throw std::system_error(ENOSPC, std::generic_category(), "full");
  }

  const Capabilities capabilities_;
  std::string requests_;
};

Capabilities blocks(std::uint32_t minimum, std::uint32_t maximum) {
  Capabilities capabilities;
  capabilities.size = 100 * gibibyte;
  capabilities.minimum = minimum;
  capabilities.maximum = maximum;
  capabilities.can_write = true;
  capabilities.can_flush = true;
  return capabilities;
}

Capabilities with_fua(Fua fua, bool can_flush = true) {
  Capabilities capabilities = blocks(1, 8192);
  capabilities.fua = fua;
  capabilities.can_flush = can_flush;
  return capabilities;
}

void write(Recorder& storage, const ByteRange& range, bool fua = false) {
  storage.write(range.begin, bytes_of(range), fua);
}

std::string extents_text(const Storage::Extents& extents) {
  std::string text;
  for (const Storage::Extent& extent : extents) {
    constexpr const char* names[] = {"data", "hole", "zero", "hole+zero"};
    text += (text.empty() ? "" : " ") + std::to_string(extent.range.begin) + "-" +
            std::to_string(extent.range.end) + ":" + names[static_cast<int>(extent.type)];
  }
  return text;
}

} // namespace

TEST_CASE("writes are aligned to 4096 where the limits of storage allow it", "[storage]") {
  CHECK(Capabilities{}.write_alignment() == 4096);
  CHECK(blocks(1, UINT32_MAX).write_alignment() == 4096);
  CHECK(blocks(512, 32 * 1024 * 1024).write_alignment() == 4096);
  CHECK(blocks(4096, 4096).write_alignment() == 4096);
  CHECK(blocks(65536, UINT32_MAX).write_alignment() == 65536);
  CHECK(blocks(1, 512).write_alignment() == 512);
  CHECK(blocks(512, 1536).write_alignment() == 1024);
  CHECK(blocks(1, 1).write_alignment() == 1);
}

TEST_CASE("a request that storage can take reaches it unchanged", "[storage]") {
  Recorder storage(blocks(1, UINT32_MAX));
  std::vector<std::byte> data(777);
  storage.read(4099, data);
  CHECK(storage.requests() == "read 4099-4876");
  CHECK(data == bytes_of({4099, 4876}));
  write(storage, {1, 100'001});
  CHECK(storage.requests() == "write 1-100001");
  storage.cache({5, 6});
  CHECK(storage.requests() == "cache 5-6");
  storage.trim({5, 70'000}, false);
  CHECK(storage.requests() == "trim 5-70000");
  CHECK(storage.wrote_right_bytes);
}

TEST_CASE("a request as large as storage's maximum is not split", "[storage]") {
  Recorder storage(blocks(512, 8192));
  write(storage, {512, 512 + 8192});
  CHECK(storage.requests() == "write 512-8704");
}

TEST_CASE("larger requests are split on multiples of the alignment", "[storage]") {
  Recorder storage(blocks(1, 8192));
  write(storage, {0, 20'000});
  CHECK(storage.requests() == "write 0-8192, write 8192-16384, write 16384-20000");
  write(storage, {100, 20'000});
  CHECK(storage.requests() == "write 100-8192, write 8192-16384, write 16384-20000");
  storage.cache({4095, 12'300});
  CHECK(storage.requests() == "cache 4095-8192, cache 8192-12300");
}

TEST_CASE("requests to storage that rewrites whole blocks are split between these", "[storage]") {
  Capabilities objects = blocks(1, 65536);
  objects.preferred = 65536;
  CHECK(objects.rewritten_block() == 65536);
  Recorder storage(objects);
  write(storage, {4096, 200'000});
  CHECK(storage.requests() == "write 4096-65536, write 65536-131072, write 131072-196608, "
                              "write 196608-200000");
  objects.maximum = 131072;
  CHECK(objects.rewritten_block() == 4096);
  objects.preferred = objects.maximum = 512;
  CHECK(objects.rewritten_block() == 512);
  CHECK(Capabilities{}.rewritten_block() == 4096);
}

TEST_CASE("each piece of a read lands in its place", "[storage]") {
  Recorder storage(blocks(1, 4096));
  std::vector<std::byte> data(3 * 4096);
  storage.read(1000, data);
  CHECK(data == bytes_of({1000, 1000 + 3 * 4096}));
  CHECK(storage.requests() == "read 1000-4096, read 4096-8192, read 8192-12288, read 12288-13288");
}

TEST_CASE("whatever the block sizes, pieces cover the request, fit, and meet on the alignment",
          "[storage]") {
  constexpr std::uint64_t seed = 7;
  INFO("seed " << seed);
  std::mt19937_64 dice(seed);
  const std::vector<std::pair<std::uint32_t, std::uint32_t>> limits = {
      {1, 512},     {1, 1000},        {512, 512},     {512, 1536},        {512, 5 * 512}, {1, 4096},
      {4096, 4096}, {4096, 3 * 4096}, {65536, 65536}, {65536, 3 * 65536}, {512, 100'352}};
  for (const auto& [minimum, maximum] : limits) {
    Recorder storage(blocks(minimum, maximum));
    const std::uint64_t alignment = storage.capabilities().write_alignment();
    for (int round = 0; round < 20; ++round) {
      const std::uint64_t begin = align_down(dice() % 300'000, minimum);
      const ByteRange range{begin, begin + minimum + align_down(dice() % 300'000, minimum)};
      INFO("blocks " << minimum << " to " << maximum << ", " << range.begin << "-" << range.end);
      write(storage, range);
      std::uint64_t reached = range.begin;
      bool all_fit = true;
      for (const ByteRange& piece : storage.ranges) {
        const bool meets = piece.end == range.end || piece.end % alignment == 0;
        all_fit =
            all_fit && piece.begin == reached && !piece.empty() && piece.size() <= maximum && meets;
        reached = piece.end;
      }
      REQUIRE(all_fit);
      REQUIRE(reached == range.end);
      REQUIRE(storage.wrote_right_bytes);
      storage.requests();
    }
  }
}

TEST_CASE("an empty request does not reach storage", "[storage]") {
  Recorder storage(blocks(1, UINT32_MAX));
  storage.read(5, {});
  storage.write(5, {}, false);
  storage.zero({5, 5}, {});
  storage.trim({5, 5}, false);
  storage.cache({5, 5});
  CHECK(storage.requests().empty());
  CHECK(storage.pieces({5, 5}) == 0);
}

TEST_CASE("native FUA goes along with every piece, one that costs a flush with the last, and where "
          "storage has none a flush follows",
          "[storage]") {
  const auto [fua, first, last] = GENERATE(table<Fua, std::string, std::string>(
      {{Fua::native, " fua", " fua"}, {Fua::emulate, "", " fua"}, {Fua::none, "", ", flush"}}));
  const auto both = [first = first, last = last](const std::string& kind) {
    return kind + " 0-8192" + first + ", " + kind + " 8192-10000" + last;
  };
  Recorder storage(with_fua(fua));
  write(storage, {0, 10'000}, true);
  CHECK(storage.requests() == both("write"));
  storage.zero({0, 10'000}, {.may_trim = false, .fua = true, .fast = false});
  CHECK(storage.requests() == both("zero"));
  storage.trim({0, 10'000}, true);
  CHECK(storage.requests() == both("trim"));
}

TEST_CASE("without FUA asked for there is neither FUA nor flush", "[storage]") {
  const Fua fua = GENERATE(Fua::none, Fua::emulate, Fua::native);
  Recorder storage(with_fua(fua));
  write(storage, {0, 10'000});
  storage.zero({0, 100}, {});
  storage.trim({0, 100}, false);
  CHECK(storage.requests() == "write 0-8192, write 8192-10000, zero 0-100, trim 0-100");
}

TEST_CASE("storage that cannot flush is never asked to", "[storage]") {
  Recorder storage(with_fua(Fua::none, false));
  storage.flush();
  write(storage, {0, 100}, true);
  CHECK(storage.requests() == "write 0-100");
}

TEST_CASE("storage that can flush is asked to once", "[storage]") {
  Recorder storage(blocks(1, UINT32_MAX));
  storage.flush();
  CHECK(storage.requests() == "flush");
}

TEST_CASE("what a zero request may do is passed on", "[storage]") {
  Recorder storage(blocks(1, UINT32_MAX));
  storage.zero({0, 100}, {});
  storage.zero({0, 100}, {.may_trim = true, .fua = false, .fast = false});
  storage.zero({0, 100}, {.may_trim = false, .fua = false, .fast = true});
  CHECK(storage.requests() == "zero 0-100, zero 0-100 may-trim, zero 0-100 fast");
}

TEST_CASE("zero and trim requests are at most 32 MiB large", "[storage]") {
  Recorder storage(blocks(1, UINT32_MAX));
  storage.zero({0, 32 * mebibyte}, {});
  CHECK(storage.requests() == "zero 0-33554432");
  storage.zero({0, 64 * mebibyte + 1}, {});
  CHECK(storage.requests() == "zero 0-33554432, zero 33554432-67108864, zero 67108864-67108865");
  storage.trim({4097, 32 * mebibyte + 4098}, false);
  CHECK(storage.requests() == "trim 4097-33558528, trim 33558528-33558530");
}

TEST_CASE("the number of pieces is the number of zero requests that are made", "[storage]") {
  for (const auto& [minimum, maximum] : std::vector<std::pair<std::uint32_t, std::uint32_t>>{
           {1, UINT32_MAX}, {512, 1024 * 1024}, {65536, 3 * 65536}}) {
    Recorder storage(blocks(minimum, maximum));
    for (const ByteRange& range :
         {ByteRange{0, 65536}, ByteRange{65536, 32 * mebibyte}, ByteRange{0, 32 * mebibyte},
          ByteRange{65536, 32 * mebibyte + 65536}, ByteRange{65536, 32 * mebibyte + 2 * 65536},
          ByteRange{0, 100 * mebibyte}}) {
      INFO("blocks " << minimum << " to " << maximum << ", " << range.begin << "-" << range.end);
      storage.zero(range, {});
      CHECK(storage.pieces(range) == storage.ranges.size());
      storage.requests();
    }
  }
}

TEST_CASE("requests stay below what nbdkit can count, in round pieces", "[storage]") {
  Recorder storage(blocks(1, UINT32_MAX));
  storage.cache({0, 5 * gibibyte});
  CHECK(storage.requests() == "cache 0-2147483648, cache 2147483648-4294967296, "
                              "cache 4294967296-5368709120");
}

TEST_CASE("the first piece that storage refuses ends a request, with storage's own error",
          "[storage]") {
  Recorder storage(with_fua(Fua::none));
  storage.refused_at = 8192;
  CHECK(error_of([&] { write(storage, {0, 30'000}, true); }) == ENOSPC);
  CHECK(storage.requests() == "write 0-8192, write 8192-16384");
  CHECK(error_of([&] { storage.trim({0, 30'000}, true); }) == ENOSPC);
  CHECK(storage.requests() == "trim 0-8192, trim 8192-16384");
  CHECK(error_of([&] {
          storage.zero({0, 30'000}, {.may_trim = false, .fua = true, .fast = false});
        }) == ENOSPC);
  CHECK(storage.requests() == "zero 0-8192, zero 8192-16384");
  std::vector<std::byte> data(30'000);
  CHECK(error_of([&] { storage.read(0, data); }) == ENOSPC);
  CHECK(storage.requests() == "read 0-8192, read 8192-16384");
}

TEST_CASE("extents are those of the range, whatever else storage speaks of", "[storage]") {
  using Type = Storage::ExtentType;
  Recorder storage(blocks(1, UINT32_MAX));
  storage.answer = {{{0, 100}, Type::zero},
                    {{100, 1000}, Type::data},
                    {{1000, 2000}, Type::hole},
                    {{2000, 3000}, Type::hole_and_zero},
                    {{3000, 4000}, Type::data}};
  CHECK(extents_text(storage.extents({500, 2500}, false)) ==
        "500-1000:data 1000-2000:hole 2000-2500:hole+zero");
  CHECK(storage.requests() == "extents 500-2500");
  CHECK(extents_text(storage.extents({100, 1000}, false)) == "100-1000:data");
}

TEST_CASE("storage is told when only the first extent is wanted", "[storage]") {
  Recorder storage(blocks(1, UINT32_MAX));
  storage.answer = {{{0, 4096}, Storage::ExtentType::data}};
  CHECK(extents_text(storage.extents({0, 8192}, true)) == "0-4096:data");
  CHECK(storage.requests() == "extents 0-8192 only-first");
}

TEST_CASE("extents of a range that is too large are those of its first piece", "[storage]") {
  Recorder storage(blocks(1, UINT32_MAX));
  storage.answer = {{{0, 10 * gibibyte}, Storage::ExtentType::hole_and_zero}};
  const Storage::Extents found = storage.extents({4096, 3 * gibibyte}, false);
  CHECK(storage.requests() == "extents 4096-2147487744");
  REQUIRE(found.size() == 1);
  CHECK(found[0].range.begin == 4096);
  CHECK(found[0].range.end <= 3 * gibibyte);
}
