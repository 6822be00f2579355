#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>

namespace qcowcache {

/// A parameter that cannot be accepted; `what()` is one line that names the parameter, the value
/// and what is allowed.
class ParameterError : public std::invalid_argument {
public:
  using std::invalid_argument::invalid_argument;
};

/// What a compressed cluster that cannot be read does to a flush.
enum class Verify {
  off,   ///< nobody looks
  warn,  ///< the operator is told
  error, ///< and the flush fails
  all,   ///< the same, and the first flush looks at the whole image
};

/// The filter's part of nbdkit's command line. Not thread safe; read only once nbdkit serves.
class Parameters {
public:
  /// All parameters of this filter begin with this.
  static constexpr std::string_view prefix = "qcowcache-";

  /// What `nbdkit --filter=qcowcache --help` prints about them.
  static const char* help();

  /// Takes `key=value`. Returns false for a key that is not this filter's; throws ParameterError.
  bool set(std::string_view key, std::string_view value);
  /// To be called when all have been set. Throws ParameterError when they do not go together.
  void check() const;

  /// Bytes for cached data and its bookkeeping, all exports together; 0 passes everything through.
  [[nodiscard]] std::uint64_t size() const noexcept { return size_; }
  /// Bytes, a power of two; nothing (`auto`): from the qcow2 header.
  [[nodiscard]] std::optional<std::uint64_t> cluster_size() const noexcept { return cluster_size_; }

  /// Background writers; 0: none.
  [[nodiscard]] unsigned writers() const noexcept { return writers_; }
  /// Bytes; the largest write that several units are merged into.
  [[nodiscard]] std::uint64_t max_write() const noexcept { return max_write_; }
  /// After how long an idle partial unit is left behind; nothing: never by time.
  [[nodiscard]] std::optional<std::chrono::seconds> expire() const noexcept { return expire_; }
  /// Bytes of room that storage is asked for at once; 0: it is not asked.
  [[nodiscard]] std::uint64_t reserve() const noexcept { return reserve_; }
  /// No more is held than storage writes in this time; nothing: no such bound.
  [[nodiscard]] std::optional<std::chrono::seconds> max_delay() const noexcept {
    return max_delay_;
  }
  /// Absolute path of a file that holds a size, or empty.
  [[nodiscard]] const std::string& size_file() const noexcept { return size_file_; }
  /// Absolute path of the file that statistics are reported in, or empty.
  [[nodiscard]] const std::string& stats_file() const noexcept { return stats_file_; }
  /// Whether that file can be made, once more, for the process may have become another user.
  /// Throws ParameterError.
  void check_stats_file() const;
  /// Absolute path of the file that names exports which hold unflushed bytes, or empty.
  [[nodiscard]] const std::string& unclean_file() const noexcept { return unclean_file_; }
  /// How often the report is rewritten while nbdkit serves; nothing: only at the end.
  [[nodiscard]] std::optional<std::chrono::seconds> stats_interval() const noexcept {
    return stats_interval_;
  }

  /// What a flush does about compressed clusters that cannot be read.
  [[nodiscard]] Verify verify() const noexcept { return verify_; }
  /// Whether each write to storage is read back and compared.
  [[nodiscard]] bool readback() const noexcept { return readback_; }

private:
  struct Row;

  [[nodiscard]] static std::span<const Row> table() noexcept;
  [[nodiscard]] static std::string names();

  std::uint64_t size_ = std::uint64_t{64} * 1024 * 1024;
  std::optional<std::uint64_t> cluster_size_;
  unsigned writers_ = 4;
  std::uint64_t max_write_ = std::uint64_t{1024} * 1024;
  std::optional<std::chrono::seconds> expire_ = std::chrono::seconds(5);
  std::uint64_t reserve_ = std::uint64_t{64} * 1024 * 1024;
  std::optional<std::chrono::seconds> max_delay_ = std::chrono::seconds(10);
  std::string size_file_;
  std::string stats_file_;
  std::string unclean_file_;
  std::optional<std::chrono::seconds> stats_interval_;
  bool readback_ = false;
  Verify verify_ = Verify::off;
};

/// A number of bytes as nbdkit writes it: digits, then nothing or one of B, K, M, G, T, P, E
/// (powers of 1024) or S (sectors of 512), in either case. Nothing when `text` is not that, or when
/// the number does not fit into 63 bits.
[[nodiscard]] std::optional<std::uint64_t> parse_size(std::string_view text) noexcept;

/// A yes or no as nbdkit writes it: 1, t, true, y, yes, on, or 0, f, false, n, no, off, in any
/// case.
[[nodiscard]] std::optional<bool> parse_bool(std::string_view text) noexcept;

} // namespace qcowcache
