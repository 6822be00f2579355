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
#include <vector>

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

/// In the order of `Verify`.
constexpr std::array<std::string_view, 4> verify_names = {"off", "warn", "error", "all"};

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

/// One parameter: all that is said of it, and what it does.
struct Parameters::Row {
  std::string_view name;
  /// As `help` shows what it takes.
  std::string_view takes;
  /// In lines.
  std::string_view help;
  void (*set)(Parameters& parameters, std::string_view key, std::string_view value);
};

std::span<const Parameters::Row> Parameters::table() noexcept {
  static constexpr std::array rows{
      Row{"size", "<SIZE>", "Memory for cached data (default 64M, 0: cache nothing).",
          [](Parameters& parameters, std::string_view key, std::string_view value) {
            const std::optional<std::uint64_t> size = parse_size(value);
            if (!size)
              refuse(key, value, "a size such as 64M, or 0 to cache nothing");
            parameters.size_ = *size;
          }},
      Row{"cluster-size", "<SIZE>",
          "Host cluster size, 512 to 2M (default auto: as the qcow2\n"
          "header says, and without one nothing is cached).",
          [](Parameters& parameters, std::string_view key, std::string_view value) {
            const std::optional<std::uint64_t> size = parse_size(value);
            if (value != "auto" && (!size || !std::has_single_bit(*size) ||
                                    *size < least_cluster_size || *size > most_cluster_size))
              refuse(key, value, "auto or a power of two from 512 to 2M");
            parameters.cluster_size_ = size;
          }},
      Row{"size-file", "<FILE>", "Follow the size in this file instead.",
          [](Parameters& parameters, std::string_view key, std::string_view value) {
            // It need not be there yet, nor hold a size: that is looked at while nbdkit serves.
            std::error_code error;
            const std::filesystem::path absolute = std::filesystem::absolute(value, error);
            if (error || std::filesystem::is_directory(absolute, error))
              refuse(key, value, "the name of a file");
            parameters.size_file_ = absolute.string(); // nbdkit changes directory later
          }},
      Row{"writers", "<N>", "Background writers, 0 to 64 (default 4).",
          [](Parameters& parameters, std::string_view key, std::string_view value) {
            const std::optional<std::uint64_t> number = parse_number(value, most_writers);
            if (!number)
              refuse(key, value, "a number from 0 to 64");
            parameters.writers_ = static_cast<unsigned>(*number);
          }},
      Row{"max-write", "<SIZE>", "Largest write of several units, 64K to 32M (default 1M).",
          [](Parameters& parameters, std::string_view key, std::string_view value) {
            const std::optional<std::uint64_t> size = parse_size(value);
            if (!size || *size < least_max_write || *size > most_max_write)
              refuse(key, value, "a size from 64K to 32M");
            parameters.max_write_ = *size;
          }},
      Row{"expire", "<SECS>",
          "Write partial units after this idle time, up to 86400\n"
          "(default 5, 0: never by time).",
          [](Parameters& parameters, std::string_view key, std::string_view value) {
            parameters.expire_ = seconds_or_never(key, value);
          }},
      Row{"max-delay", "<SECS>",
          "Hold no more than storage writes in this time, up to\n"
          "86400 (default 10, 0: no such bound).",
          [](Parameters& parameters, std::string_view key, std::string_view value) {
            parameters.max_delay_ = seconds_or_never(key, value);
          }},
      Row{"reserve", "<SIZE>",
          "Reserve room on storage, so much at once, before a write is\n"
          "acknowledged, 2M to 1G (default 64M, 0: never).",
          [](Parameters& parameters, std::string_view key, std::string_view value) {
            const std::optional<std::uint64_t> size = parse_size(value);
            if (!size || (*size > 0 && (*size < least_reserve || *size > most_reserve)))
              refuse(key, value, "a size from 2M to 1G, or 0 to reserve nothing");
            parameters.reserve_ = *size;
          }},
      Row{"stats", "<FILE>",
          "Report statistics there at the end: *.json, *.prom\n"
          "(Prometheus), otherwise text; an absolute path.",
          [](Parameters& parameters, std::string_view key, std::string_view value) {
            parameters.stats_file_ = replaceable_file(key, value);
          }},
      Row{"stats-interval", "<SECS>",
          "Rewrite that report this often while serving, up to 86400\n"
          "(default 0, only at the end).",
          [](Parameters& parameters, std::string_view key, std::string_view value) {
            parameters.stats_interval_ = seconds_or_never(key, value);
          }},
      Row{"unclean", "<FILE>",
          "Keep the names of exports with unflushed bytes there, so\n"
          "that their loss is noticed after a crash; an absolute path.",
          [](Parameters& parameters, std::string_view key, std::string_view value) {
            parameters.unclean_file_ = replaceable_file(key, value);
          }},
      Row{"verify", "off|warn|error|all",
          "Check that compressed clusters can be read before a flush\n"
          "is acknowledged (default off).",
          [](Parameters& parameters, std::string_view key, std::string_view value) {
            const auto* const found = std::ranges::find(verify_names, value);
            if (found == verify_names.end())
              refuse(key, value, "off, warn, error or all");
            parameters.verify_ = static_cast<Verify>(found - verify_names.begin());
          }},
      Row{"readback", "<BOOL>",
          "Read back and compare each write to storage (default\n"
          "false).",
          [](Parameters& parameters, std::string_view key, std::string_view value) {
            const std::optional<bool> wanted = parse_bool(value);
            if (!wanted)
              refuse(key, value, "true or false");
            parameters.readback_ = *wanted;
          }},
  };
  return rows;
}

const char* Parameters::help() {
  constexpr std::size_t column = 31;
  static const std::string text = [] {
    std::string all;
    const auto indent = [&](std::size_t used) {
      if (used < column)
        all.append(column - used, ' ');
      else
        all.append(1, '\n').append(column, ' ');
    };
    for (const Row& row : table()) {
      all.append(all.empty() ? 0 : 1, '\n');
      const std::size_t begin = all.size();
      all.append(prefix).append(row.name).append("=").append(row.takes);
      indent(all.size() - begin);
      for (const char letter : row.help) {
        all.append(1, letter);
        if (letter == '\n')
          indent(0);
      }
    }
    return all;
  }();
  return text.c_str();
}

bool Parameters::set(std::string_view key, std::string_view value) {
  if (!key.starts_with(prefix))
    return false;
  const std::string_view name = key.substr(prefix.size());
  const auto row = std::ranges::find(table(), name, &Row::name);
  if (row == table().end())
    throw ParameterError(beginning_of_line(key, value) + "no such parameter; allowed: " + names() +
                         ", each after qcowcache-");
  row->set(*this, key, value);
  return true;
}

/// "a, b and c", sorted.
std::string Parameters::names() {
  std::vector<std::string_view> sorted;
  for (const Row& row : table())
    sorted.push_back(row.name);
  std::ranges::sort(sorted);
  std::string text;
  for (const std::string_view name : sorted)
    text.append(text.empty() ? "" : name == sorted.back() ? " and " : ", ").append(name);
  return text;
}

void Parameters::check() const {
  if (stats_interval_ && stats_file_.empty())
    refuse("qcowcache-stats-interval", std::to_string(stats_interval_->count()),
           "used together with qcowcache-stats, or 0");
  if (verify_ == Verify::off || !cluster_size_)
    return;
  std::string line("qcowcache-verify=");
  line.append(verify_names[static_cast<std::size_t>(verify_)])
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
