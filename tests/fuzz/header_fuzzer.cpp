// The qcow2 header, all at once and in pieces.

#include "targets.hpp"

#include "cache/header_watch.hpp"
#include "input.hpp"
#include "verify/qcow2/header.hpp"

#include <algorithm>
#include <optional>
#include <vector>

namespace {

using qcowcache::HeaderWatch;
using qcowcache::qcow2::Compression;
using qcowcache::qcow2::Header;
using qcowcache::qcow2::header_bytes;
using qcowcache::qcow2::parse_header;

bool same(const std::optional<Header>& a, const std::optional<Header>& b) {
  if (!a || !b)
    return a.has_value() == b.has_value();
  return a->version == b->version && a->cluster_bits == b->cluster_bits &&
         a->compression == b->compression && a->extended_l2 == b->extended_l2;
}

void within_limits(const Header& header) {
  if (header.version < 2 || header.version > 3)
    throw fuzz::Broken("version");
  if (header.cluster_bits < 9 || header.cluster_bits > 21)
    throw fuzz::Broken("cluster_bits");
  if (header.extended_l2 && (header.version == 2 || header.cluster_bits < 14))
    throw fuzz::Broken("extended L2 entries");
  if (header.compression != Compression::deflate &&
      (header.version == 2 || header.compression != Compression::zstd))
    throw fuzz::Broken("compression type");
}

} // namespace

void fuzz::header(std::span<const std::byte> input) {
  // A copy that ends where the input does, so that the address sanitizer sees who reads on.
  std::vector<std::byte> bytes(input.begin(), input.end());
  bytes.shrink_to_fit();
  const std::optional<Header> found = parse_header(bytes);
  if (found)
    within_limits(*found);

  const std::size_t size = std::min(bytes.size(), header_bytes);
  const std::span<const std::byte> watched = std::span(bytes).first(size);
  if (!same(found, parse_header(watched)))
    throw Broken("what is behind the header was looked at");

  // Pieces, in an order that the input itself decides, and overlapping; the last one wins.
  HeaderWatch watch;
  Input dice(bytes);
  for (int i = 0; i < 4 && size > 0; ++i) {
    const std::size_t begin = dice.number(1) % size;
    watch.wrote(begin, watched.subspan(begin, dice.number(1) % (size - begin)));
  }
  watch.zeroed({0, size / 2});
  watch.forget({size / 3, size});
  watch.wrote(0, watched.first(size / 2));
  watch.learn(0, bytes);
  if (!same(found, watch.header(size)) && size > 0)
    throw Broken("a header that arrives in pieces is another one");
}
