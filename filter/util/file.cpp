#include "util/file.hpp"

#include <cerrno>
#include <filesystem>
#include <system_error>
#include <unistd.h>

namespace qcowcache {

void throw_errno() {
  throw std::system_error(errno, std::generic_category());
}

std::string fresh_name(const std::string& path) {
  // Not a name that collectors of *.prom look at.
  return path + "." + std::to_string(getpid()) + ".new";
}

File create_file(const std::string& path) {
  File file(std::fopen(path.c_str(), "w+xe"));
  if (!file && errno == EEXIST) {
    // What an earlier process of this number left behind.
    static_cast<void>(std::remove(path.c_str()));
    file.reset(std::fopen(path.c_str(), "w+xe"));
  }
  if (!file)
    throw_errno();
  return file;
}

std::string file_fault(const std::string& path) {
  const std::filesystem::path file(path);
  if (!file.is_absolute() || !file.has_filename())
    return "the absolute path of a file";
  std::error_code error;
  const std::filesystem::file_type type = std::filesystem::status(file, error).type();
  error.clear();
  if (type != std::filesystem::file_type::not_found &&
      type != std::filesystem::file_type::regular && type != std::filesystem::file_type::none)
    return "a regular file or a new one, for it is replaced";
  const std::filesystem::path directory = file.parent_path();
  if (!std::filesystem::is_directory(directory, error) && !error)
    error = std::make_error_code(std::errc::not_a_directory);
  if (!error && access(directory.c_str(), W_OK | X_OK) != 0)
    error = std::error_code(errno, std::generic_category());
  if (error)
    return "in a directory that can be written to (" + error.message() + ")";
  return "";
}

} // namespace qcowcache
