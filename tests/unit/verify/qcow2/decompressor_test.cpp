#include "verify/qcow2/decompressor.hpp"

#include "catch.hpp"
#include "compressed_bytes.hpp"
#include "image_bytes.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <string>

using namespace qcowcache::qcow2;
using Result = Decoding::Result;

namespace {

constexpr std::uint32_t cluster = 65536;

std::vector<std::byte> joined(std::span<const std::byte> first, std::span<const std::byte> second) {
  std::vector<std::byte> result(first.begin(), first.end());
  result.insert(result.end(), second.begin(), second.end());
  return result;
}

/// A frame without a content size, of raw blocks: 4 bytes of magic, descriptor, window, blocks.
std::vector<std::byte> frame_with_window(std::span<const std::byte> bytes, unsigned window) {
  std::vector<std::byte> frame;
  for (const unsigned byte : {0x28U, 0xb5U, 0x2fU, 0xfdU, 0U, window})
    frame.push_back(static_cast<std::byte>(byte));
  constexpr std::size_t block = 1024;
  for (std::size_t begin = 0; begin < bytes.size(); begin += block) {
    const std::size_t size = std::min(block, bytes.size() - begin);
    const auto header =
        static_cast<unsigned>(size << 3U | (begin + size == bytes.size() ? 1U : 0U));
    for (const unsigned shift : {0U, 8U, 16U})
      frame.push_back(static_cast<std::byte>(header >> shift & 0xffU));
    frame.insert(frame.end(), bytes.begin() + static_cast<std::ptrdiff_t>(begin),
                 bytes.begin() + static_cast<std::ptrdiff_t>(begin + size));
  }
  return frame;
}

} // namespace

TEST_CASE("a stream of one cluster decodes, whatever follows it", "[decompressor]") {
  const auto compression = GENERATE(Compression::deflate, Compression::zstd);
  const std::uint32_t size = GENERATE(512U, 4096U, cluster, 2U << 20U);
  const auto bytes = compressible(size, 1);
  const auto stream = compressed(compression, bytes);
  Decompressor decompressor;
  for (const std::size_t more : {0U, 1U, 511U, 70000U}) {
    const Decoding decoding =
        decompressor.decode(compression, joined(stream, pattern(more, 2)), size);
    CHECK(decoding.whole());
    CHECK(decoding.stream_size == stream.size());
    CHECK(std::string(decoding.reason).empty());
  }
}

TEST_CASE("a stream that is cut off anywhere is refused", "[decompressor]") {
  const auto compression = GENERATE(Compression::deflate, Compression::zstd);
  const auto stream = compressed(compression, compressible(4096, 1));
  Decompressor decompressor;
  for (std::size_t size = 0; size < stream.size(); ++size) {
    const Decoding decoding = decompressor.decode(compression, std::span(stream).first(size), 4096);
    CHECK_FALSE(decoding.whole());
    // Where nothing but the mark of its end is missing the cluster is whole by then.
    if (size + 4 < stream.size())
      CHECK(decoding.result == Result::too_short);
    CHECK_FALSE(std::string(decoding.reason).empty());
  }
}

TEST_CASE("more or less than one cluster is refused", "[decompressor]") {
  const auto compression = GENERATE(Compression::deflate, Compression::zstd);
  Decompressor decompressor;
  const auto less = compressed(compression, compressible(cluster - 1, 1));
  CHECK(decompressor.decode(compression, less, cluster).result == Result::too_little);
  const auto more = compressed(compression, compressible(cluster + 1, 1));
  CHECK(decompressor.decode(compression, more, cluster).result == Result::no_end);
  // And it decodes the next good one as ever.
  CHECK(decompressor.decode(compression, more, cluster + 1).whole());
}

TEST_CASE("the other codec's stream is refused", "[decompressor]") {
  Decompressor decompressor;
  const auto bytes = compressible(cluster, 1);
  CHECK_FALSE(decompressor.decode(Compression::zstd, deflated(bytes), cluster).whole());
  CHECK_FALSE(decompressor.decode(Compression::deflate, zstd_frame(bytes), cluster).whole());
}

TEST_CASE("zeros, ones and noise are refused, with a reason", "[decompressor]") {
  const auto compression = GENERATE(Compression::deflate, Compression::zstd);
  Decompressor decompressor;
  for (const auto& bytes : {std::vector<std::byte>(cluster), pattern(cluster, 3),
                            std::vector<std::byte>(cluster, std::byte{0xff}),
                            std::vector<std::byte>(1, std::byte{0x5a})}) {
    const Decoding decoding = decompressor.decode(compression, bytes, cluster);
    CHECK_FALSE(decoding.whole());
    CHECK(decoding.stream_size == 0);
    CHECK_FALSE(std::string(decoding.reason).empty());
  }
}

TEST_CASE("inflate's own words are the reason", "[decompressor]") {
  Decompressor decompressor;
  const std::array<std::byte, 4> bytes{std::byte{0x07}, std::byte{1}, std::byte{2}, std::byte{3}};
  const Decoding decoding = decompressor.decode(Compression::deflate, bytes, cluster);
  CHECK(decoding.result == Result::damaged);
  CHECK(std::string(decoding.reason) == "invalid block type");
}

TEST_CASE("zlib's own wrapping is not what QEMU writes", "[decompressor]") {
  Decompressor decompressor;
  const auto stream = deflated(compressible(cluster, 1), 15);
  CHECK_FALSE(decompressor.decode(Compression::deflate, stream, cluster).whole());
}

TEST_CASE("several frames may make up a cluster", "[decompressor]") {
  Decompressor decompressor;
  const auto bytes = compressible(cluster, 1);
  const auto first = zstd_frame(std::span(bytes).first(10000));
  const auto second = zstd_frame(std::span(bytes).subspan(10000));
  const auto both = joined(first, second);
  const Decoding decoding =
      decompressor.decode(Compression::zstd, joined(both, pattern(99, 1)), cluster);
  CHECK(decoding.whole());
  CHECK(decoding.stream_size == both.size());
  CHECK(decompressor.decode(Compression::zstd, first, cluster).result == Result::too_little);
  CHECK(decompressor.decode(Compression::zstd, joined(first, first), cluster).result ==
        Result::too_little);
  CHECK(decompressor.decode(Compression::zstd, joined(both, both), 10000).result == Result::whole);
}

TEST_CASE("a skippable frame is skipped", "[decompressor]") {
  std::vector<std::byte> skippable(8 + 20);
  const std::uint32_t magic = 0x184d2a53;
  for (unsigned i = 0; i < 4; ++i)
    skippable[i] = static_cast<std::byte>(magic >> 8U * i & 0xffU);
  skippable[4] = std::byte{20};
  const auto frame = zstd_frame(compressible(cluster, 1));
  const auto both = joined(skippable, frame);
  Decompressor decompressor;
  const Decoding decoding = decompressor.decode(Compression::zstd, both, cluster);
  CHECK(decoding.whole());
  CHECK(decoding.stream_size == both.size());
  CHECK(Decompressor::may_begin(Compression::zstd, both));
}

TEST_CASE("a frame that asks for more window than QEMU grants is refused", "[decompressor]") {
  const auto bytes = compressible(cluster, 1);
  Decompressor decompressor;
  constexpr unsigned window_of_1_mib = 10U << 3U;
  constexpr unsigned window_of_128_mib = 17U << 3U;
  CHECK(decompressor.decode(Compression::zstd, frame_with_window(bytes, window_of_1_mib), cluster)
            .whole());
  CHECK(decompressor.decode(Compression::zstd, frame_with_window(bytes, window_of_128_mib), cluster)
            .whole());
  CHECK(decompressor
            .decode(Compression::zstd, frame_with_window(bytes, window_of_128_mib + 1), cluster)
            .result == Result::damaged);
  CHECK(decompressor.decode(Compression::zstd, frame_with_window(bytes, 0xff), cluster).result ==
        Result::damaged);
}

TEST_CASE("what a frame says of its size is not believed", "[decompressor]") {
  auto frame = zstd_frame(compressible(cluster, 1));
  // Single segment, content size in 8 bytes, all of them ones.
  std::vector<std::byte> forged(frame.begin(), frame.begin() + 4);
  forged.push_back(std::byte{0xe0});
  forged.insert(forged.end(), 8, std::byte{0xff});
  forged.insert(forged.end(), frame.begin() + 8, frame.end());
  Decompressor decompressor;
  CHECK_FALSE(decompressor.decode(Compression::zstd, forged, cluster).whole());
}

TEST_CASE("single flipped bits are refused or decode to one whole cluster", "[decompressor]") {
  const auto compression = GENERATE(Compression::deflate, Compression::zstd);
  auto stream = compressed(compression, compressible(4096, 1));
  Decompressor decompressor;
  std::size_t refused = 0;
  for (std::size_t bit = 0; bit < stream.size() * 8; ++bit) {
    const std::byte mask{static_cast<unsigned char>(1U << bit % 8)};
    stream[bit / 8] ^= mask;
    const Decoding decoding = decompressor.decode(compression, stream, 4096);
    refused += decoding.whole() ? 0 : 1;
    CHECK(decoding.stream_size <= stream.size());
    stream[bit / 8] ^= mask;
  }
  CHECK(refused > 0);
  CHECK(decompressor.decode(compression, stream, 4096).whole());
}

TEST_CASE("what cannot begin a stream is told apart at once", "[decompressor]") {
  const auto bytes = compressible(cluster, 1);
  CHECK(Decompressor::may_begin(Compression::deflate, deflated(bytes)));
  CHECK(Decompressor::may_begin(Compression::zstd, zstd_frame(bytes)));
  CHECK_FALSE(Decompressor::may_begin(Compression::zstd, deflated(bytes)));
  CHECK_FALSE(Decompressor::may_begin(Compression::zstd, {}));
  CHECK_FALSE(Decompressor::may_begin(Compression::deflate, {}));
  CHECK_FALSE(Decompressor::may_begin(Compression::deflate, std::vector(9, std::byte{0xff})));
  CHECK_FALSE(Decompressor::may_begin(Compression::zstd, std::vector(3, std::byte{0x28})));
}
