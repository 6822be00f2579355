#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>

namespace qcowcache {

/// A file that holds a size in bytes (as `parse_size` reads it), followed while it changes. It has
/// to be a regular file, of less than 256 bytes. Thread safe.
class SizeFile {
public:
  /// It is looked at no more often than this.
  static constexpr std::chrono::milliseconds least_interval{100};

  /// `complain` is told once when the file cannot be read or holds no size, and again only after it
  /// has been good in between. `path` is absolute.
  SizeFile(std::string path, std::function<void(const std::string&)> complain)
      : path_(std::move(path)), complain_(std::move(complain)) {}

  /// The size, when it is time to look and the file holds one that it did not hold before.
  std::optional<std::uint64_t> changed();

private:
  [[nodiscard]] std::optional<std::uint64_t> read() const;

  const std::string path_;
  const std::function<void(const std::string&)> complain_;
  std::mutex mutex_;
  std::chrono::steady_clock::time_point next_look_;
  std::optional<std::uint64_t> last_;
  bool complained_ = false;
};

} // namespace qcowcache
