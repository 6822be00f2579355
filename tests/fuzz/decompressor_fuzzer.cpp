// The strict decoders, and what L1 and L2 entries say.

#include "targets.hpp"

#include "input.hpp"
#include "verify/qcow2/decompressor.hpp"
#include "verify/qcow2/l2_table.hpp"

#include <algorithm>
#include <vector>

using namespace qcowcache::qcow2;

namespace {

void entries(const Header& header, std::span<const std::byte> bytes) {
  const std::size_t count = bytes.size() / header.l2_entry_size();
  for (std::size_t index = 0; index < count; ++index) {
    const std::uint64_t entry = l2_entry(bytes, index, header);
    if (const auto table = l2_table_offset(entry, header);
        table && (*table == 0 || *table % header.cluster_size() != 0))
      throw fuzz::Broken("an L2 table that lies on no cluster");
    if (is_compressed(entry)) {
      const CompressedCluster cluster = compressed_cluster(entry, header);
      if (cluster.length == 0 || cluster.length > 2 * header.cluster_size() ||
          (cluster.offset + cluster.length) % 512 != 0)
        throw fuzz::Broken("a compressed cluster of a length that no entry can say");
    }
  }
}

} // namespace

/// Two bytes say which codec, and how large clusters are; the rest is a stream, and entries.
void fuzz::decompressor(std::span<const std::byte> input) {
  Input dice(input);
  const Compression compression = dice.yes() ? Compression::zstd : Compression::deflate;
  Header header;
  header.cluster_bits = 9 + static_cast<std::uint32_t>(dice.number(1) % 13);
  header.extended_l2 = header.cluster_bits >= 14 && dice.yes();
  // A copy that ends where the input does, so that the address sanitizer sees who reads on.
  std::vector<std::byte> bytes(
      input.begin() + static_cast<std::ptrdiff_t>(std::min<std::size_t>(3, input.size())),
      input.end());
  bytes.shrink_to_fit();
  entries(header, bytes);

  Decompressor decompressor;
  const Decoding found = decompressor.decode(compression, bytes, header.cluster_size());
  if (!found.whole()) {
    if (found.stream_size != 0 || found.reason[0] == '\0')
      throw Broken("a refusal without a reason");
    return;
  }
  if (found.stream_size == 0 || found.stream_size > bytes.size())
    throw Broken("a stream that is longer than its data");
  if (!Decompressor::may_begin(compression, bytes))
    throw Broken("a stream that was said to be none");

  const std::vector<std::byte> stream(
      bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(found.stream_size));
  const Decoding again = decompressor.decode(compression, stream, header.cluster_size());
  if (!again.whole() || again.stream_size != found.stream_size)
    throw Broken("what follows the stream matters");
  const std::span<const std::byte> shorter = std::span(stream).first(stream.size() - 1);
  if (decompressor.decode(compression, shorter, header.cluster_size()).whole())
    throw Broken("a stream that is cut off is whole");
}
