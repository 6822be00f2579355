#include "parameters.hpp"

#include "reports/statistics.hpp"
#include "util/file.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cctype>
#include <charconv>
#include <filesystem>
#include <system_error>

namespace qcowcache {

namespace {

constexpr std::uint64_t least_max_write = std::uint64_t{64} * 1024;
constexpr std::uint64_t most_max_write = std::uint64_t{32} * 1024 * 1024;
constexpr std::uint64_t least_reserve = std::uint64_t{2} * 1024 * 1024;
constexpr std::uint64_t most_reserve = std::uint64_t{1024} * 1024 * 1024;
constexpr std::uint64_t most_writers = 64;
constexpr std::uint64_t most_seconds = 86400;
constexpr std::uint64_t least_cluster_size = 512;
constexpr std::uint64_t most_cluster_size = std::uint64_t{2} * 1024 * 1024;

/// `key=value: `, on one line whatever the value is.
std::string beginning_of_line(std::string_view key, std::string_view value) {
  return std::string(key).append("=").append(printable(value)).append(": ");
}

[[noreturn]] void refuse(std::string_view key, std::string_view value, std::string_view allowed) {
  throw ParameterError(beginning_of_line(key, value).append("must be ").append(allowed));
}

std::optional<std::uint64_t> parse_number(std::string_view text, std::uint64_t most) noexcept {
  std::uint64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc{} || end != text.data() + text.size() || number > most)
    return std::nullopt;
  return number;
}

/// A time of which 0 says that it never comes.
std::optional<std::chrono::seconds> seconds_or_never(std::string_view key, std::string_view value) {
  const std::optional<std::uint64_t> seconds = parse_number(value, most_seconds);
  if (!seconds)
    refuse(key, value, "a number of seconds from 0 to 86400");
  return *seconds > 0 ? std::optional(std::chrono::seconds(*seconds)) : std::nullopt;
}

std::string replaceable_file(std::string_view key, std::string_view value) {
  std::string path(value);
  if (const std::string fault = file_fault(path); !fault.empty())
    refuse(key, value, fault);
  return path;
}

} // namespace

std::optional<std::uint64_t> parse_size(std::string_view text) noexcept {
  std::uint64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc{})
    return std::nullopt;
  const std::string_view suffix = text.substr(static_cast<std::size_t>(end - text.data()));
  if (suffix.size() > 1)
    return std::nullopt;
  unsigned shift = 0;
  if (!suffix.empty()) {
    constexpr std::string_view powers = "BKMGTPE";
    const auto letter = static_cast<char>(std::toupper(static_cast<unsigned char>(suffix[0])));
    if (letter == 'S') {
      shift = 9;
    } else {
      const std::size_t power = powers.find(letter);
      if (power == std::string_view::npos)
        return std::nullopt;
      shift = static_cast<unsigned>(power) * 10;
    }
  }
  constexpr auto most = static_cast<std::uint64_t>(INT64_MAX);
  if (number > (most >> shift))
    return std::nullopt;
  return number << shift;
}

std::optional<bool> parse_bool(std::string_view text) noexcept {
  const auto is = [text](std::string_view word) {
    return std::ranges::equal(text, word, [](char left, char right) {
      return std::tolower(static_cast<unsigned char>(left)) == right;
    });
  };
  constexpr std::array<std::string_view, 6> yes = {"1", "t", "true", "y", "yes", "on"};
  constexpr std::array<std::string_view, 6> no = {"0", "f", "false", "n", "no", "off"};
  if (std::ranges::any_of(yes, is))
    return true;
  if (std::ranges::any_of(no, is))
    return false;
  return std::nullopt;
}

const char* Parameters::help() noexcept {
  return "qcowcache-size=<SIZE>          Memory for cached data (default 64M, 0: cache nothing).\n"
         "qcowcache-cluster-size=<SIZE>  Host cluster size, 512 to 2M (default auto: as the qcow2\n"
         "                               header says, and without one nothing is cached).\n"
         "qcowcache-size-file=<FILE>     Follow the size in this file instead.\n"
         "qcowcache-writers=<N>          Background writers, 0 to 64 (default 4).\n"
         "qcowcache-max-write=<SIZE>     Largest merged write, 64K to 32M (default 1M).\n"
         "qcowcache-expire=<SECS>        Write partial units after this idle time, up to 86400\n"
         "                               (default 5, 0: never by time).\n"
         "qcowcache-max-delay=<SECS>     Hold no more than storage writes in this time, up to\n"
         "                               86400 (default 10, 0: no such bound).\n"
         "qcowcache-reserve=<SIZE>       Reserve room on storage, so much at once, before a write "
         "is\n"
         "                               acknowledged, 2M to 1G (default 64M, 0: never).\n"
         "qcowcache-stats=<FILE>         Report statistics there at the end: *.json, *.prom\n"
         "                               (Prometheus), otherwise text; an absolute path.\n"
         "qcowcache-stats-interval=<SECS>\n"
         "                               Rewrite that report this often while serving, up to "
         "86400\n"
         "                               (default 0, only at the end).\n"
         "qcowcache-unclean=<FILE>       Keep the names of exports with unflushed bytes there, so\n"
         "                               that their loss is noticed after a crash; an absolute "
         "path.\n"
         "qcowcache-verify=off|warn|error|all\n"
         "                               Check that compressed clusters can be read before a "
         "flush\n"
         "                               is acknowledged (default off).\n"
         "qcowcache-readback=<BOOL>      Read back and compare each write to storage (default\n"
         "                               false).";
}

bool Parameters::set(std::string_view key, std::string_view value) {
  if (key == "qcowcache-size") {
    const std::optional<std::uint64_t> size = parse_size(value);
    if (!size)
      refuse(key, value, "a size such as 64M, or 0 to cache nothing");
    size_ = *size;
    return true;
  }
  if (key == "qcowcache-cluster-size") {
    if (value == "auto") {
      cluster_size_.reset();
      return true;
    }
    const std::optional<std::uint64_t> size = parse_size(value);
    if (!size || !std::has_single_bit(*size) || *size < least_cluster_size ||
        *size > most_cluster_size)
      refuse(key, value, "auto or a power of two from 512 to 2M");
    cluster_size_ = size;
    return true;
  }
  if (key == "qcowcache-writers") {
    const std::optional<std::uint64_t> number = parse_number(value, most_writers);
    if (!number)
      refuse(key, value, "a number from 0 to 64");
    writers_ = static_cast<unsigned>(*number);
    return true;
  }
  if (key == "qcowcache-max-write") {
    const std::optional<std::uint64_t> size = parse_size(value);
    if (!size || *size < least_max_write || *size > most_max_write)
      refuse(key, value, "a size from 64K to 32M");
    max_write_ = *size;
    return true;
  }
  if (key == "qcowcache-expire") {
    expire_ = seconds_or_never(key, value);
    return true;
  }
  if (key == "qcowcache-max-delay") {
    max_delay_ = seconds_or_never(key, value);
    return true;
  }
  if (key == "qcowcache-reserve") {
    const std::optional<std::uint64_t> size = parse_size(value);
    if (!size || (*size > 0 && (*size < least_reserve || *size > most_reserve)))
      refuse(key, value, "a size from 2M to 1G, or 0 to reserve nothing");
    reserve_ = *size;
    return true;
  }
  if (key == "qcowcache-stats") {
    stats_file_ = replaceable_file(key, value);
    return true;
  }
  if (key == "qcowcache-unclean") {
    unclean_file_ = replaceable_file(key, value);
    return true;
  }
  if (key == "qcowcache-stats-interval") {
    stats_interval_ = seconds_or_never(key, value);
    return true;
  }
  if (key == "qcowcache-size-file") {
    // It need not be there yet, nor hold a size: that is looked at while nbdkit serves.
    std::error_code error;
    const std::filesystem::path absolute = std::filesystem::absolute(value, error);
    if (error || std::filesystem::is_directory(absolute, error))
      refuse(key, value, "the name of a file");
    size_file_ = absolute.string(); // nbdkit changes directory later
    return true;
  }
  if (key == "qcowcache-verify") {
    if (value == "off")
      verify_ = Verify::off;
    else if (value == "warn")
      verify_ = Verify::warn;
    else if (value == "error")
      verify_ = Verify::error;
    else if (value == "all")
      verify_ = Verify::all;
    else
      refuse(key, value, "off, warn, error or all");
    return true;
  }
  if (key == "qcowcache-readback") {
    const std::optional<bool> wanted = parse_bool(value);
    if (!wanted)
      refuse(key, value, "true or false");
    readback_ = *wanted;
    return true;
  }
  if (key.substr(0, prefix.size()) == prefix) {
    throw ParameterError(
        beginning_of_line(key, value) +
        "no such parameter; allowed: cluster-size, expire, max-delay, "
        "max-write, readback, reserve, size, size-file, stats, stats-interval, unclean, "
        "verify and writers, each after qcowcache-");
  }
  return false;
}

void Parameters::check() const {
  if (stats_interval_ && stats_file_.empty())
    refuse("qcowcache-stats-interval", std::to_string(stats_interval_->count()),
           "used together with qcowcache-stats, or 0");
  if (verify_ == Verify::off || !cluster_size_)
    return;
  const auto name = [this] {
    return verify_ == Verify::warn ? "warn" : verify_ == Verify::error ? "error" : "all";
  };
  std::string line("qcowcache-verify=");
  line.append(name())
      .append(": conflicts with qcowcache-cluster-size=")
      .append(std::to_string(*cluster_size_))
      .append(", which must be auto so that the qcow2 header is looked at");
  throw ParameterError(line);
}

void Parameters::check_stats_file() const {
  if (!stats_file_.empty())
    static_cast<void>(replaceable_file("qcowcache-stats", stats_file_));
}

} // namespace qcowcache
