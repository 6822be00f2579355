#include "verify/qcow2/l2_table.hpp"

#include "catch.hpp"

#include <random>
#include <vector>

using namespace qcowcache::qcow2;

namespace {

Header with_cluster_bits(std::uint32_t bits, bool extended = false) {
  Header header;
  header.cluster_bits = bits;
  header.extended_l2 = extended;
  return header;
}

/// An entry as QEMU makes it (qcow2_alloc_compressed_cluster_offset) for so many bytes at `offset`.
std::uint64_t entry_of(std::uint64_t offset, std::uint64_t size, std::uint32_t cluster_bits) {
  const std::uint64_t sectors = (offset + size - 1) / 512 - offset / 512;
  return std::uint64_t{1} << 62U | sectors << (62 - (cluster_bits - 8)) | offset;
}

} // namespace

TEST_CASE("a compressed cluster lies where its entry says", "[l2_table]") {
  const std::uint32_t bits = GENERATE(9U, 12U, 14U, 16U, 21U);
  const Header header = with_cluster_bits(bits);
  for (const std::uint64_t offset : {std::uint64_t{1} << bits, (std::uint64_t{3} << bits) + 1,
                                     (std::uint64_t{5} << bits) + 511, std::uint64_t{1} << 45U}) {
    for (const std::uint64_t size :
         {std::uint64_t{1}, std::uint64_t{300}, header.cluster_size() - std::uint64_t{1}}) {
      const std::uint64_t entry = entry_of(offset, size, bits);
      REQUIRE(is_compressed(entry));
      const CompressedCluster found = compressed_cluster(entry, header);
      CHECK(found.offset == offset);
      CHECK(found.length >= size);
      CHECK(found.length < size + 512);
      CHECK((found.offset + found.length) % 512 == 0);
    }
  }
}

TEST_CASE("one sector less makes it 512 bytes shorter", "[l2_table]") {
  const Header header = with_cluster_bits(16);
  const std::uint64_t entry = entry_of(70000, 30000, 16);
  const std::uint64_t shorter = entry - (std::uint64_t{1} << 54U);
  CHECK(compressed_cluster(shorter, header).offset == 70000);
  CHECK(compressed_cluster(shorter, header).length + 512 ==
        compressed_cluster(entry, header).length);
}

TEST_CASE("no entry makes a cluster longer than two, or empty", "[l2_table]") {
  std::mt19937_64 random(1);
  for (std::uint32_t bits = 9; bits <= 21; ++bits) {
    const Header header = with_cluster_bits(bits);
    for (unsigned i = 0; i < 2000; ++i) {
      const CompressedCluster found =
          compressed_cluster(random() | std::uint64_t{1} << 62U, header);
      CHECK(found.length > 0);
      CHECK(found.length <= 2 * header.cluster_size());
      CHECK(found.offset < std::uint64_t{1} << 61U);
    }
  }
}

TEST_CASE("standard, zero and absent clusters are not compressed", "[l2_table]") {
  CHECK_FALSE(is_compressed(0));
  CHECK_FALSE(is_compressed(1));
  CHECK_FALSE(is_compressed(0x8000'0000'0005'0000));
  CHECK(is_compressed(0x4000'0000'0005'0001));
}

TEST_CASE("an L1 entry names an L2 table, or none", "[l2_table]") {
  const Header header = with_cluster_bits(16);
  CHECK(l2_table_offset(0x8000'0000'0004'0000, header) == 0x40000);
  CHECK(l2_table_offset(0x0000'0000'0004'0000, header) == 0x40000);
  CHECK_FALSE(l2_table_offset(0, header));
  CHECK_FALSE(l2_table_offset(0x8000'0000'0000'0000, header));
  CHECK_FALSE(l2_table_offset(0x8000'0000'0004'0200, header)); // not on a cluster
  CHECK(l2_table_offset(0x8000'0000'0004'0200, with_cluster_bits(9)) == 0x40200);
  CHECK(l2_table_offset(0xffff'ffff'ffff'01ff, with_cluster_bits(9)) == 0xff'ffff'ffff'0000);
}

TEST_CASE("entries are 8 bytes, or the first 8 of 16", "[l2_table]") {
  std::vector<std::byte> bytes(64);
  for (std::size_t i = 0; i < bytes.size(); ++i)
    bytes[i] = static_cast<std::byte>(i);
  CHECK(l2_entry(bytes, 0, with_cluster_bits(16)) == 0x0001020304050607);
  CHECK(l2_entry(bytes, 7, with_cluster_bits(16)) == 0x38393a3b3c3d3e3f);
  CHECK(l2_entry(bytes, 1, with_cluster_bits(16, true)) == 0x1011121314151617);
  CHECK(l2_entry(bytes, 3, with_cluster_bits(16, true)) == 0x3031323334353637);
}

TEST_CASE("the guest offset counts clusters through all tables", "[l2_table]") {
  const Header standard = with_cluster_bits(16);
  CHECK(standard.l2_entries() == 8192);
  CHECK(standard.guest_offset(0, 5) == 5 * 65536);
  CHECK(standard.guest_offset(2, 1) == (std::uint64_t{2} * 8192 + 1) * 65536);
  const Header extended = with_cluster_bits(16, true);
  CHECK(extended.l2_entries() == 4096);
  CHECK(extended.guest_offset(1, 0) == std::uint64_t{4096} * 65536);
}
