#include "cache/header_watch.hpp"

#include "as_text.hpp"
#include "catch.hpp"
#include "image_bytes.hpp"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

using qcowcache::HeaderWatch;
using qcowcache::qcow2::Header;
using qcowcache::qcow2::header_bytes;

namespace {

constexpr std::uint64_t large = std::uint64_t{1} << 30U;

/// A whole cluster that begins with a header.
std::vector<std::byte> image(unsigned cluster_bits) {
  std::vector<std::byte> bytes = qcow2_header(cluster_bits);
  bytes.resize(65536);
  return bytes;
}

/// The bytes of such a cluster from `begin` up to `end`.
std::vector<std::byte> part(unsigned cluster_bits, std::size_t begin, std::size_t end) {
  const std::vector<std::byte> bytes = image(cluster_bits);
  const auto at = [&](std::size_t offset) {
    return bytes.begin() + static_cast<std::ptrdiff_t>(offset);
  };
  return {at(begin), at(end)};
}

unsigned cluster_bits(const HeaderWatch& watch) {
  const std::optional<Header> header = watch.header(large);
  return header ? header->cluster_bits : 0;
}

} // namespace

TEST_CASE("a watch that has seen nothing has no header", "[header_watch]") {
  const HeaderWatch watch;
  CHECK_FALSE(watch.complete(large));
  CHECK_FALSE(watch.header(large));
}

TEST_CASE("a header written at once is seen", "[header_watch]") {
  HeaderWatch watch;
  watch.wrote(0, image(16));
  CHECK(watch.complete(large));
  CHECK(cluster_bits(watch) == 16);
}

TEST_CASE("a header that arrives in pieces, in any order, is seen with the last of them",
          "[header_watch]") {
  const std::size_t piece = GENERATE(1U, 7U, 24U, 111U);
  HeaderWatch watch;
  for (std::size_t at = (header_bytes - 1) / piece * piece; at > 0; at -= piece) {
    watch.wrote(at, part(16, at, at + piece));
    REQUIRE_FALSE(watch.complete(large));
    REQUIRE_FALSE(watch.header(large));
  }
  watch.wrote(0, part(16, 0, piece));
  CHECK(watch.complete(large));
  CHECK(cluster_bits(watch) == 16);
}

TEST_CASE("a later write to a part of the header replaces that part", "[header_watch]") {
  HeaderWatch watch;
  watch.wrote(0, image(16));
  watch.wrote(20, part(21, 20, 24));
  CHECK(cluster_bits(watch) == 21);
  watch.wrote(1, as_text::parse("x"));
  CHECK(watch.complete(large));
  CHECK_FALSE(watch.header(large));
}

TEST_CASE("a write that begins inside the header and ends behind it changes the inside only",
          "[header_watch]") {
  HeaderWatch watch;
  watch.wrote(0, part(12, 0, 20));
  watch.wrote(20, part(9, 20, 65536));
  CHECK(cluster_bits(watch) == 9);
}

TEST_CASE("writes, zeros and reads behind the header do not matter", "[header_watch]") {
  HeaderWatch watch;
  watch.wrote(0, image(16));
  watch.wrote(header_bytes, as_text::parse("behind"));
  watch.zeroed({header_bytes, large});
  watch.forget({header_bytes, large});
  watch.learn(header_bytes, as_text::parse("behind"));
  CHECK(cluster_bits(watch) == 16);
}

TEST_CASE("zeros over the header take it away, and are known", "[header_watch]") {
  HeaderWatch watch;
  watch.wrote(0, image(16));
  watch.zeroed({0, 512});
  CHECK(watch.complete(large));
  CHECK_FALSE(watch.header(large));
}

TEST_CASE("zeros count as bytes that were seen", "[header_watch]") {
  HeaderWatch watch;
  watch.zeroed({0, large});
  CHECK(watch.complete(large));
  watch.wrote(0, part(16, 0, 104));
  CHECK(cluster_bits(watch) == 16);
}

TEST_CASE("what is forgotten must be seen again before there is a header", "[header_watch]") {
  HeaderWatch watch;
  watch.wrote(0, image(16));
  watch.forget({50, 60});
  CHECK_FALSE(watch.complete(large));
  CHECK_FALSE(watch.header(large));
  watch.wrote(50, part(16, 50, 59));
  CHECK_FALSE(watch.complete(large));
  watch.wrote(59, part(16, 59, 60));
  CHECK(cluster_bits(watch) == 16);
}

TEST_CASE("what storage has fills in what is not known and nothing else", "[header_watch]") {
  HeaderWatch watch;
  watch.wrote(20, part(12, 20, 24));
  watch.learn(0, image(16));
  CHECK(watch.complete(large));
  CHECK(cluster_bits(watch) == 12);
}

TEST_CASE("storage may be read in pieces, from the middle of the header on", "[header_watch]") {
  HeaderWatch watch;
  watch.learn(40, part(16, 40, 65536));
  CHECK_FALSE(watch.complete(large));
  watch.learn(0, part(16, 0, 41));
  CHECK(cluster_bits(watch) == 16);
}

TEST_CASE("after bytes were forgotten, storage's are taken again", "[header_watch]") {
  HeaderWatch watch;
  watch.wrote(0, image(16));
  watch.forget({0, header_bytes});
  watch.learn(0, image(18));
  CHECK(cluster_bits(watch) == 18);
}

TEST_CASE("an export smaller than a header is watched to its end", "[header_watch]") {
  CHECK(HeaderWatch::watched(0) == qcowcache::ByteRange{0, 0});
  CHECK(HeaderWatch::watched(50) == qcowcache::ByteRange{0, 50});
  CHECK(HeaderWatch::watched(large) == qcowcache::ByteRange{0, header_bytes});

  HeaderWatch watch;
  CHECK(watch.complete(0));
  CHECK_FALSE(watch.header(0));
  watch.wrote(0, part(16, 0, 104));
  CHECK(watch.complete(104));
  CHECK_FALSE(watch.complete(105));
  CHECK(watch.header(104).has_value());
  CHECK_FALSE(watch.header(105));
  CHECK_FALSE(watch.header(103));
}
