#include "verify/qcow2/verdicts.hpp"

#include "catch.hpp"

#include <cstdint>
#include <optional>

using qcowcache::qcow2::CompressedCluster;
using qcowcache::qcow2::Decoding;
using qcowcache::qcow2::Verdicts;

namespace {
const Decoding good{Decoding::Result::whole, 300, ""};
const Decoding bad{Decoding::Result::damaged, 0, "broken"};
} // namespace

TEST_CASE("what decoding a stream has said is known of all that name it", "[verdicts]") {
  Verdicts verdicts;
  CHECK_FALSE(verdicts.find({1000, 512}, 1512));
  verdicts.note({1000, 512}, 1512, good);
  CHECK(verdicts.find({1000, 512}, 1512)->whole());
  CHECK(verdicts.find({1000, 512}, 1512)->stream_size == 300);
  CHECK_FALSE(verdicts.find({1001, 512}, 1513));
  verdicts.note({5000, 1024}, 6024, bad);
  CHECK(verdicts.find({5000, 1024}, 6024)->reason == bad.reason);
  CHECK_FALSE(verdicts.find({5001, 1024}, 6025));
  verdicts.clear();
  CHECK_FALSE(verdicts.find({1000, 512}, 1512));
}

TEST_CASE("a good stream is good whatever follows it, and no bad one is", "[verdicts]") {
  Verdicts verdicts;
  verdicts.note({1000, 512}, 1512, good);
  CHECK(verdicts.find({1000, 4096}, 5096)->whole());
  CHECK(verdicts.find({1000, 300}, 1300)->whole());
  CHECK_FALSE(verdicts.find({1000, 299}, 1299));
  CHECK_FALSE(verdicts.find({1000, 512}, 1299)); // the file ends in it
  verdicts.note({5000, 1024}, 6024, bad);
  CHECK_FALSE(verdicts.find({5000, 1536}, 6536));
  CHECK_FALSE(verdicts.find({5000, 1024}, 6000)); // the file has grown since, or shrunk
  // Both are known of one place.
  verdicts.note({1000, 200}, 1200, bad);
  CHECK_FALSE(verdicts.find({1000, 200}, 1200)->whole());
  CHECK(verdicts.find({1000, 512}, 1512)->whole());
}

TEST_CASE("what is written to is not known any more", "[verdicts]") {
  Verdicts verdicts;
  verdicts.note({1000, 512}, 1512, good);
  verdicts.note({5000, 1024}, 5100, bad); // the file ends in it
  verdicts.forget({0, 1000});
  verdicts.forget({1512, 5000});
  verdicts.forget({6024, 9000});
  CHECK(verdicts.find({1000, 512}, 1512));
  CHECK(verdicts.find({5000, 1024}, 5100));
  verdicts.forget({1511, 1512});
  verdicts.forget({6000, 6001});
  CHECK_FALSE(verdicts.find({1000, 512}, 1512));
  CHECK_FALSE(verdicts.find({5000, 1024}, 5100));
}

TEST_CASE("thousands of streams are known, and there is no limit to be met", "[verdicts]") {
  Verdicts verdicts;
  const auto known = [&](std::uint32_t count) {
    std::uint32_t found = 0;
    for (std::uint32_t i = 0; i < count; ++i)
      found += verdicts.find({std::uint64_t{i} * 512, 512}, std::uint64_t{i} * 512 + 512) ? 1U : 0U;
    return found;
  };
  for (std::uint32_t i = 0; i < 100000; ++i) {
    verdicts.note({std::uint64_t{i} * 512, 512}, std::uint64_t{i} * 512 + 512, i % 2 ? good : bad);
    if (i == 2000)
      CHECK(known(2000) > 1200);
  }
  CHECK(known(100000) > 2000);
}
