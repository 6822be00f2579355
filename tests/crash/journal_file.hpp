#pragma once

#include "journal.hpp"

#include <cstdint>
#include <string>

/// A journal as nbdkit-journal-above-filter and nbdkit-journal-below-filter write it: records in
/// the order in which they were appended, in the byte order of the machine, those of writes that
/// begin followed by the bytes written.
struct JournalRecord {
  enum class Moment : std::uint32_t {
    begin,
    end,
    /// The request failed, and is taken to have changed nothing.
    failed,
  };

  Journal::Side side;
  Moment moment;
  Change::Kind kind;
  std::uint32_t fua;
  /// The same at the begin and the end of a request; different for requests of the same side.
  std::uint64_t request;
  std::uint64_t offset;
  /// Bytes.
  std::uint64_t count;
};

/// Appends the records of a file to `journal`, but for requests that failed. Throws
/// std::runtime_error when the file cannot be read or ends inside a record.
void read_journal(const std::string& path, Journal& journal);
