// A filter for nbdkit that appends to a file what passes through it: the begin and the end of each
// write (with its bytes), zero, trim and flush. It is compiled twice, JOURNAL_FILTER being its name
// and JOURNAL_SIDE what is above it, for nbdkit keeps one state for each file that it loads: one
// goes above the filter under test, one beneath, and both append to the same file. The kernel puts
// appended records in one order, which is that of the events that they stand for.
//
//   JOURNAL_FILTER=FILE   where to append; absolute

#include "journal_file.hpp"

#include <nbdkit-filter.h>

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <string>

namespace {

using Kind = Change::Kind;
using Moment = JournalRecord::Moment;

std::string path;
int file = -1;
std::atomic<std::uint64_t> requests = 0;

bool append(JournalRecord record, const void* data) {
  const std::size_t size = data == nullptr ? 0 : record.count;
  const std::array<iovec, 2> parts{iovec{&record, sizeof(record)},
                                   iovec{const_cast<void*>(data), size}};
  // At once, or another's record could come in between.
  if (writev(file, parts.data(), 2) == static_cast<ssize_t>(sizeof(record) + size))
    return true;
  nbdkit_error("%s: cannot append a record: %m", path.c_str());
  return false;
}

/// Notes a request down, passes it on by `next`, and notes what became of it.
template <typename Next>
int pass(Kind kind, std::uint64_t offset, std::uint64_t count, const void* data,
         std::uint32_t flags, int* err, Next next) {
  const bool fua = (flags & NBDKIT_FLAG_FUA) != 0;
  JournalRecord record{
      Journal::Side::JOURNAL_SIDE, Moment::begin, kind, fua, requests++, offset, count};
  if (!append(record, data)) {
    *err = EIO;
    return -1;
  }
  *err = 0;
  const int result = next();
  record.moment = result == -1 ? Moment::failed : Moment::end;
  if (!append(record, nullptr)) {
    *err = EIO;
    return -1;
  }
  return result;
}

int journal_config(nbdkit_next_config* next, nbdkit_backend* backend, const char* key,
                   const char* value) {
  if (std::string(key) != JOURNAL_FILTER)
    return next(backend, key, value);
  path = value;
  return 0;
}

int journal_get_ready(int /*thread_model*/) {
  file = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (file == -1)
    nbdkit_error(JOURNAL_FILTER "=%s: %m", path.c_str());
  return file == -1 ? -1 : 0;
}

void journal_unload() {
  if (file != -1)
    close(file);
}

int journal_pwrite(nbdkit_next* next, void* /*handle*/, const void* data, std::uint32_t count,
                   std::uint64_t offset, std::uint32_t flags, int* err) {
  return pass(Kind::write, offset, count, data, flags, err,
              [&] { return next->pwrite(next, data, count, offset, flags, err); });
}

int journal_flush(nbdkit_next* next, void* /*handle*/, std::uint32_t flags, int* err) {
  return pass(Kind::flush, 0, 0, nullptr, flags, err,
              [&] { return next->flush(next, flags, err); });
}

int journal_trim(nbdkit_next* next, void* /*handle*/, std::uint32_t count, std::uint64_t offset,
                 std::uint32_t flags, int* err) {
  return pass(Kind::trim, offset, count, nullptr, flags, err,
              [&] { return next->trim(next, count, offset, flags, err); });
}

int journal_zero(nbdkit_next* next, void* /*handle*/, std::uint32_t count, std::uint64_t offset,
                 std::uint32_t flags, int* err) {
  return pass(Kind::zero, offset, count, nullptr, flags, err,
              [&] { return next->zero(next, count, offset, flags, err); });
}

nbdkit_filter make_filter() {
  nbdkit_filter filter = nbdkit_filter();
  filter.name = JOURNAL_FILTER;
  filter.config = journal_config;
  filter.get_ready = journal_get_ready;
  filter.unload = journal_unload;
  filter.pwrite = journal_pwrite;
  filter.flush = journal_flush;
  filter.trim = journal_trim;
  filter.zero = journal_zero;
  return filter;
}

nbdkit_filter filter = make_filter();

} // namespace

NBDKIT_REGISTER_FILTER(filter)
