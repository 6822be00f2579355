#include "verify/qcow2/header.hpp"

#include "catch.hpp"

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <random>
#include <span>
#include <vector>

using qcowcache::qcow2::Compression;
using qcowcache::qcow2::Header;
using qcowcache::qcow2::header_bytes;
using qcowcache::qcow2::parse_header;
using qcowcache::qcow2::TablePlace;

namespace {

constexpr std::uint64_t dirty = 1U << 0U;
constexpr std::uint64_t corrupt = 1U << 1U;
constexpr std::uint64_t external_data_file = 1U << 2U;
constexpr std::uint64_t compression_type = 1U << 3U;
constexpr std::uint64_t extended_l2 = 1U << 4U;

/// The bytes of a header, field by field, at the places where the specification has them.
class HeaderBytes {
public:
  /// What `qemu-img create` writes, but for the place of the tables.
  explicit HeaderBytes(std::uint32_t version) : bytes_(version == 2 ? 72 : header_bytes) {
    put(0, 0x514649fb, 4);
    put(4, version, 4);
    put(20, 16, 4);
    put(24, std::uint64_t{8} << 30U, 8);
    put(36, 16, 4);
    put(40, 3U << 16U, 8);
    put(48, 1U << 16U, 8);
    put(56, 1, 4);
    if (version >= 3) {
      put(96, 4, 4);
      put(100, 112, 4);
    }
  }

  HeaderBytes& magic(std::uint32_t value) { return put(0, value, 4); }
  HeaderBytes& version(std::uint32_t value) { return put(4, value, 4); }
  HeaderBytes& cluster_bits(std::uint32_t value) { return put(20, value, 4); }
  HeaderBytes& crypt_method(std::uint32_t value) { return put(32, value, 4); }
  HeaderBytes& tables_are_not_there_yet() { return put(24, 0, 8).put(36, 0, 4).put(40, 0, 8); }
  HeaderBytes& l1(std::uint64_t offset, std::uint32_t entries) {
    return put(40, offset, 8).put(36, entries, 4);
  }
  HeaderBytes& features(std::uint64_t value) { return put(72, value, 8); }
  HeaderBytes& refcount_order(std::uint32_t value) { return put(96, value, 4); }
  HeaderBytes& header_length(std::uint32_t value) { return put(100, value, 4); }
  HeaderBytes& compression(std::uint8_t value) { return put(104, value, 1); }

  [[nodiscard]] std::optional<Header> parse() const { return parse_header(bytes_); }
  [[nodiscard]] std::vector<std::byte> bytes() const { return bytes_; }

private:
  HeaderBytes& put(std::size_t offset, std::uint64_t value, std::size_t width) {
    for (std::size_t i = width; i-- > 0; value >>= 8U)
      bytes_[offset + i] = static_cast<std::byte>(value & 0xffU);
    return *this;
  }

  std::vector<std::byte> bytes_;
};

HeaderBytes version_2() {
  return HeaderBytes(2);
}
HeaderBytes version_3() {
  return HeaderBytes(3);
}

} // namespace

TEST_CASE("a header of version 2, or of version 3 without features, means deflate", "[header]") {
  for (const HeaderBytes& valid : {version_2(), version_3()}) {
    const std::optional<Header> header = valid.parse();
    REQUIRE(header);
    CHECK(header->length == (header->version == 2 ? 72 : 112));
    CHECK(header->cluster_bits == 16);
    CHECK(header->cluster_size() == 65536);
    CHECK(header->compression == Compression::deflate);
    CHECK_FALSE(header->extended_l2);
    CHECK(header->l1 == TablePlace{3U << 16U, 16});
  }
}

TEST_CASE("the bytes that qemu-img wrote for a zstd image are understood", "[header]") {
  // qemu-img create -f qcow2 -o cluster_size=4k,compression_type=zstd,extended_l2=off x 1M
  std::vector<std::byte> bytes(header_bytes);
  const std::map<std::size_t, unsigned> written = {
      {0, 0x51},  {1, 0x46},  {2, 0x49}, {3, 0xfb}, {7, 3},  {23, 12},   {29, 0x10}, {39, 1},
      {46, 0x30}, {54, 0x10}, {59, 1},   {79, 8},   {99, 4}, {103, 112}, {104, 1}};
  for (const auto& [offset, value] : written)
    bytes[offset] = static_cast<std::byte>(value);
  const std::optional<Header> header = parse_header(bytes);
  REQUIRE(header);
  CHECK(header->cluster_size() == 4096);
  CHECK(header->compression == Compression::zstd);
}

TEST_CASE("an image whose tables are not there yet has a header", "[header]") {
  CHECK(version_2().tables_are_not_there_yet().parse());
  CHECK(version_3().tables_are_not_there_yet().parse());
}

TEST_CASE("a table that no image can have is none", "[header]") {
  const auto l1 = [](std::uint64_t offset, std::uint32_t entries) {
    return version_3().l1(offset, entries).parse().value().l1.entries;
  };
  CHECK(l1(3U << 16U, 4U << 20U) == 4U << 20U);
  CHECK(l1(3U << 16U, (4U << 20U) + 1) == 0);
  CHECK(l1(3U << 16U, UINT32_MAX) == 0);
  CHECK(l1(3U << 16U, 0) == 0);
  CHECK(l1(0, 16) == 0);
  CHECK(l1(65535, 16) == 0);
  CHECK(l1(65536 + 512, 16) == 0);
  CHECK(l1((std::uint64_t{1} << 56U) - 65536, 16) == 16);
  CHECK(l1(std::uint64_t{1} << 56U, 16) == 0);
  CHECK(l1(UINT64_MAX - 65535, 16) == 0);
}

TEST_CASE("every byte of the magic number counts", "[header]") {
  for (const unsigned shift : {0U, 8U, 16U, 24U}) {
    CHECK_FALSE(version_2().magic(0x514649fb ^ (1U << shift)).parse());
    CHECK_FALSE(version_3().magic(0x514649fb ^ (1U << shift)).parse());
  }
}

TEST_CASE("only versions 2 and 3 are known", "[header]") {
  for (const std::uint32_t version : {0U, 1U, 4U, 0x100U, 0x02000000U, 0x03000000U, UINT32_MAX}) {
    INFO("version " << version);
    CHECK_FALSE(version_3().version(version).parse());
  }
}

TEST_CASE("clusters are 512 bytes to 2 MiB large", "[header]") {
  for (const HeaderBytes& valid : {version_2(), version_3()}) {
    for (std::uint32_t bits = 9; bits <= 21; ++bits) {
      const std::optional<Header> header = HeaderBytes(valid).cluster_bits(bits).parse();
      INFO("cluster_bits " << bits);
      REQUIRE(header);
      CHECK(header->cluster_bits == bits);
      CHECK(header->cluster_size() == std::uint32_t{1} << bits);
    }
    for (const std::uint32_t bits : {0U, 8U, 22U, 31U, 32U, 63U, 64U, 0x10000U + 16, UINT32_MAX}) {
      INFO("cluster_bits " << bits);
      CHECK_FALSE(HeaderBytes(valid).cluster_bits(bits).parse());
    }
  }
}

TEST_CASE("an image that is encrypted by LUKS has no compressed clusters", "[header]") {
  for (const HeaderBytes& valid : {version_2(), version_3()}) {
    CHECK(HeaderBytes(valid).crypt_method(0).parse());
    CHECK_FALSE(HeaderBytes(valid).crypt_method(2).parse());
    CHECK_FALSE(HeaderBytes(valid).crypt_method(3).parse());
    CHECK_FALSE(HeaderBytes(valid).crypt_method(UINT32_MAX).parse());
  }
}

TEST_CASE("an image with an external data file has no compressed clusters", "[header]") {
  CHECK_FALSE(version_3().features(external_data_file).parse());
  CHECK_FALSE(version_3().features(external_data_file | compression_type).compression(1).parse());
}

TEST_CASE("a dirty or corrupt image is still an image", "[header]") {
  CHECK(version_3().features(dirty).parse());
  CHECK(version_3().features(corrupt).parse());
}

TEST_CASE("an image with features that nobody knows still says how large its clusters are",
          "[header]") {
  CHECK_FALSE(version_3().features(dirty | corrupt | extended_l2).parse()->unknown_features);
  for (unsigned bit = 5; bit < 64; ++bit) {
    const std::optional<Header> header = version_3().features(std::uint64_t{1} << bit).parse();
    REQUIRE(header);
    CHECK(header->unknown_features);
  }
}

TEST_CASE("extended L2 entries need clusters of 16 KiB", "[header]") {
  for (const std::uint32_t bits : {9U, 13U})
    CHECK_FALSE(version_3().features(extended_l2).cluster_bits(bits).parse());
  for (const std::uint32_t bits : {14U, 21U}) {
    const std::optional<Header> header =
        version_3().features(extended_l2).cluster_bits(bits).parse();
    REQUIRE(header);
    CHECK(header->extended_l2);
  }
}

TEST_CASE("the compression type is zstd, deflate or unknown", "[header]") {
  HeaderBytes announced = version_3();
  announced.features(compression_type);

  const std::optional<Header> zstd = announced.compression(1).parse();
  REQUIRE(zstd);
  CHECK(zstd->compression == Compression::zstd);
  // The feature says that the type is another one than deflate.
  CHECK_FALSE(announced.compression(0).parse());
  CHECK_FALSE(announced.compression(2).parse());
  CHECK_FALSE(announced.compression(255).parse());
}

TEST_CASE("a compression type without its feature must be deflate", "[header]") {
  CHECK(version_3().compression(0).parse());
  CHECK_FALSE(version_3().compression(1).parse());
  CHECK_FALSE(version_3().compression(2).parse());
}

TEST_CASE("the compression type is a part of the header only when that is longer than 104 bytes",
          "[header]") {
  SECTION("announced, it has to be there") {
    CHECK_FALSE(version_3().features(compression_type).compression(1).header_length(104).parse());
    CHECK(version_3().features(compression_type).compression(1).header_length(105).parse());
    CHECK(version_3().features(compression_type).compression(1).header_length(112).parse());
  }
  SECTION("not announced, what stands behind the header is something else") {
    const std::optional<Header> header = version_3().compression(1).header_length(104).parse();
    REQUIRE(header);
    CHECK(header->compression == Compression::deflate);
  }
}

TEST_CASE("a header is 104 bytes to one cluster long", "[header]") {
  for (const std::uint32_t length : {104U, 105U, 112U, 65535U, 65536U}) {
    INFO("header_length " << length);
    CHECK(version_3().header_length(length).parse());
  }
  for (const std::uint32_t length : {0U, 72U, 103U, 65537U, UINT32_MAX}) {
    INFO("header_length " << length);
    CHECK_FALSE(version_3().header_length(length).parse());
  }
  CHECK(version_3().cluster_bits(9).header_length(512).parse());
  CHECK_FALSE(version_3().cluster_bits(9).header_length(513).parse());
}

TEST_CASE("reference counts are at most 64 bits wide", "[header]") {
  for (const std::uint32_t order : {0U, 4U, 6U})
    CHECK(version_3().refcount_order(order).parse());
  for (const std::uint32_t order : {7U, 64U, UINT32_MAX})
    CHECK_FALSE(version_3().refcount_order(order).parse());
}

TEST_CASE("what version 3 added does not matter in version 2", "[header]") {
  const std::optional<Header> header = version_3()
                                           .version(2)
                                           .features(UINT64_MAX)
                                           .header_length(0)
                                           .refcount_order(99)
                                           .compression(7)
                                           .parse();
  REQUIRE(header);
  CHECK(header->compression == Compression::deflate);
  CHECK_FALSE(header->extended_l2);
}

TEST_CASE("a header that is cut off is one only when all that it needs is there", "[header]") {
  const auto lengths_that_parse = [](const HeaderBytes& whole) {
    std::vector<std::byte> bytes = whole.bytes();
    bytes.resize(header_bytes);
    std::vector<std::size_t> lengths;
    for (std::size_t length = 0; length <= header_bytes; ++length) {
      // What follows would make it a whole header, and must not be looked at. The copy ends where
      // it is cut, so that an address sanitizer sees whoever does.
      const std::span<const std::byte> beginning = std::span(bytes).first(length);
      std::vector<std::byte> cut(beginning.begin(), beginning.end());
      cut.shrink_to_fit();
      REQUIRE(parse_header(cut).has_value() == parse_header(beginning).has_value());
      if (parse_header(beginning))
        lengths.push_back(length);
    }
    return lengths;
  };
  const auto from = [](std::size_t first) {
    std::vector<std::size_t> lengths;
    for (std::size_t length = first; length <= header_bytes; ++length)
      lengths.push_back(length);
    return lengths;
  };
  CHECK(lengths_that_parse(version_2()) == from(72));
  CHECK(lengths_that_parse(version_3()) == from(104));
  CHECK(lengths_that_parse(version_3().features(compression_type).compression(1)) == from(105));
}

TEST_CASE("what follows the header does not matter", "[header]") {
  std::vector<std::byte> bytes = version_3().bytes();
  bytes.resize(65536, std::byte{0xff});
  CHECK(parse_header(bytes));
}

TEST_CASE("of 100 000 random inputs none is taken that has a field out of range", "[header]") {
  const auto within_limits = [](const Header& header) {
    return (header.version == 2 || header.version == 3) && header.cluster_bits >= 9 &&
           header.cluster_bits <= 21 && (!header.extended_l2 || header.cluster_bits >= 14) &&
           (header.version == 3 ||
            (!header.extended_l2 && header.compression == Compression::deflate)) &&
           (header.compression == Compression::deflate || header.compression == Compression::zstd);
  };
  constexpr std::uint64_t seed = 20210401;
  INFO("seed " << seed);
  std::mt19937_64 dice(seed);
  int taken = 0;
  int refused = 0;
  for (int round = 0; round < 100'000; ++round) {
    // All random would never get past the magic number: most inputs are headers with some bytes
    // off.
    std::vector<std::byte> bytes;
    if (round % 4 == 0) {
      bytes.resize(dice() % (header_bytes + 1));
      for (std::byte& byte : bytes)
        byte = static_cast<std::byte>(dice());
    } else {
      bytes = HeaderBytes(round % 2 == 0 ? 2 : 3).bytes();
      for (std::uint64_t changes = 1 + dice() % 3; changes > 0; --changes)
        bytes[dice() % bytes.size()] =
            static_cast<std::byte>(dice() % (dice() % 2 == 0 ? 256 : 24));
    }
    const std::optional<Header> header = parse_header(bytes);
    ++(header ? taken : refused);
    if (header && !within_limits(*header)) {
      INFO("round " << round);
      FAIL("version " << header->version << ", cluster_bits " << header->cluster_bits);
    }
  }
  CHECK(taken > 10'000);
  CHECK(refused > 10'000);
}
