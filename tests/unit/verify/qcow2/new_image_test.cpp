#include "verify/qcow2/new_image.hpp"

#include "catch.hpp"
#include "image_bytes.hpp"

#include <cstddef>
#include <span>
#include <vector>

using qcowcache::qcow2::begins_image;

TEST_CASE("what begins a new image, and what an image in use has written to its header",
          "[new_image]") {
  // With an L1 table, and clusters of 64 KiB.
  std::vector<std::byte> image = qcow2_header(16);
  image.resize(std::size_t{3} << 16U);
  image[39] = std::byte{1};
  image[45] = std::byte{3};
  const std::span all(image);
  constexpr std::size_t cluster = std::size_t{1} << 16U;

  SECTION("zeros, or anything else than an image") {
    const std::vector<std::byte> zeros(512);
    CHECK(begins_image(0, zeros));
    CHECK(begins_image(0, std::span(zeros).first(4)));
    CHECK(begins_image(0, all.subspan(1, 512)));
  }
  SECTION("an image that somebody copies") {
    CHECK(begins_image(0, all));
    CHECK(begins_image(0, all.first(4096)));
    CHECK(begins_image(0, all.first(112)));
  }
  SECTION("an image that QEMU creates has no L1 table yet") {
    image[39] = std::byte{0};
    CHECK(begins_image(0, all.first(cluster)));
    // Then come the names of the features, and an L1 table later.
    image[112] = std::byte{0x68};
    CHECK_FALSE(begins_image(0, all.first(cluster)));
  }
  SECTION("an update of the header in use") {
    CHECK_FALSE(begins_image(0, all.first(cluster)));
    CHECK_FALSE(begins_image(36, all.subspan(36, 12)));
    CHECK_FALSE(begins_image(72, all.subspan(72, 8)));
  }
  SECTION("less than can be judged, and data") {
    CHECK_FALSE(begins_image(0, all.first(3)));
    CHECK_FALSE(begins_image(0, all.first(4)));
    CHECK_FALSE(begins_image(0, all.first(71)));
    CHECK_FALSE(begins_image(0, {}));
    CHECK_FALSE(begins_image(cluster, all.subspan(1, 512)));
    CHECK_FALSE(begins_image(1, all.subspan(1, 512)));
  }
}
