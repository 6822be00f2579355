#pragma once

#include <cstdio>
#include <memory>
#include <string>

namespace qcowcache {

struct CloseFile {
  void operator()(std::FILE* file) const noexcept { static_cast<void>(std::fclose(file)); }
};

/// An open file, closed by its owner. Who wants to know whether all was written closes it himself.
using File = std::unique_ptr<std::FILE, CloseFile>;

/// Throws std::system_error for `errno`.
[[noreturn]] void throw_errno();

/// A name beside `path`, with the number of this process, for what is to take its place.
[[nodiscard]] std::string fresh_name(const std::string& path);

/// Makes a file that was not there, so that nobody else's is written to, for reading and writing.
/// For fresh names: what an earlier process of the same number left behind is removed. Throws
/// std::system_error.
[[nodiscard]] File create_file(const std::string& path);

/// Whether this process can put a file at `path`, or another one into its place, as far as that
/// can be told before: what is wrong with it (as in "must be ..."), or nothing.
[[nodiscard]] std::string file_fault(const std::string& path);

} // namespace qcowcache
