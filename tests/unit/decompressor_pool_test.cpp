#include "decompressor_pool.hpp"

#include "catch.hpp"
#include "compressed_bytes.hpp"
#include "watched_thread.hpp"

#include <optional>

using qcowcache::DecompressorPool;
using qcowcache::qcow2::Compression;

TEST_CASE("a decompressor that was lent is kept for the next", "[decompressor_pool]") {
  DecompressorPool pool;
  const qcowcache::qcow2::Decompressor* first = nullptr;
  {
    const DecompressorPool::Loan loan = pool.borrow();
    first = &*loan;
    const auto stream = deflated(compressible(4096, 1));
    CHECK(loan->decode(Compression::deflate, stream, 4096).whole());
  }
  const DecompressorPool::Loan again = pool.borrow();
  CHECK(&*again == first);
  const DecompressorPool::Loan another = pool.borrow();
  CHECK(&*another != first);
}

TEST_CASE("who wants more decompressors than there are waits", "[decompressor_pool]") {
  DecompressorPool pool(2);
  const DecompressorPool::Loan first = pool.borrow();
  std::optional<DecompressorPool::Loan> second = pool.borrow();
  const qcowcache::qcow2::Decompressor* const expected = &**second;
  const qcowcache::qcow2::Decompressor* found = nullptr;
  WatchedThread third([&] { found = &*pool.borrow(); });
  CHECK(third.waits());
  second.reset();
  CHECK(third.ends());
  CHECK(found == expected);
}
