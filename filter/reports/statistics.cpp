#include "reports/statistics.hpp"

#include <boost/locale/utf.hpp>

#include <algorithm>
#include <charconv>
#include <optional>
#include <utility>

namespace qcowcache {

namespace {

enum class CountedIn { number, bytes, nanoseconds };

/// A count as reports show it. Rows of one name stand together and differ by their cause.
struct Row {
  Count count;
  std::string_view name;
  std::string_view cause;
  CountedIn unit;
  std::string_view help;
  /// It falls, too.
  bool is_gauge = false;
};

constexpr std::string_view partial_help = "Units written before clients had filled them";

constexpr std::array<Row, counts> table{{
    {Count::client_writes, "client_writes", "", CountedIn::number, "Write requests of clients"},
    {Count::client_odd_writes, "client_odd_writes", "", CountedIn::number,
     "Write requests of clients that are not whole blocks of 4096 bytes"},
    {Count::client_written_bytes, "client_written_bytes", "", CountedIn::bytes,
     "Bytes in write requests of clients"},
    {Count::client_reads, "client_reads", "", CountedIn::number, "Read requests of clients"},
    {Count::client_read_bytes, "client_read_bytes", "", CountedIn::bytes,
     "Bytes in read requests of clients"},
    {Count::client_flushes, "client_flushes", "", CountedIn::number, "Flush requests of clients"},
    {Count::client_zeros, "client_zeros", "", CountedIn::number, "Zero requests of clients"},
    {Count::client_trims, "client_trims", "", CountedIn::number, "Trim requests of clients"},
    {Count::storage_writes, "storage_writes", "", CountedIn::number,
     "Writes that storage has carried out"},
    {Count::storage_written_bytes, "storage_written_bytes", "", CountedIn::bytes,
     "Bytes in writes that storage has carried out"},
    {Count::merged_writes, "merged_writes", "", CountedIn::number,
     "Writes of several units at once that storage has carried out"},
    {Count::whole_units, "whole_units", "", CountedIn::number,
     "Units written after clients had filled them"},
    {Count::partial_units_flush, "partial_units", "flush", CountedIn::number, partial_help},
    {Count::partial_units_disconnect, "partial_units", "disconnect", CountedIn::number,
     partial_help},
    {Count::partial_units_expiry, "partial_units", "expiry", CountedIn::number, partial_help},
    {Count::partial_units_memory, "partial_units", "memory", CountedIn::number, partial_help},
    {Count::partial_units_cluster_end, "partial_units", "cluster_end", CountedIn::number,
     partial_help},
    {Count::partial_units_many_pieces, "partial_units", "many_pieces", CountedIn::number,
     partial_help},
    {Count::partial_units_new_layout, "partial_units", "new_layout", CountedIn::number,
     partial_help},
    {Count::partial_units_comparison, "partial_units", "comparison", CountedIn::number,
     partial_help},
    {Count::writes_through, "writes_through", "", CountedIn::number,
     "Writes of clients, or parts of them, that storage had before they were acknowledged"},
    {Count::storage_reads, "storage_reads", "", CountedIn::number,
     "Reads that storage has carried out"},
    {Count::storage_read_bytes, "storage_read_bytes", "", CountedIn::bytes,
     "Bytes in reads that storage has carried out"},
    {Count::fill_up_reads, "fill_up_reads", "", CountedIn::number,
     "Reads of what was missing of a block before it could be written"},
    {Count::fill_up_read_bytes, "fill_up_read_bytes", "", CountedIn::bytes,
     "Bytes read because they were missing of a block"},
    {Count::storage_flushes, "storage_flushes", "", CountedIn::number,
     "Flushes that storage has carried out"},
    {Count::storage_zeros, "storage_zeros", "", CountedIn::number,
     "Zero requests that storage has carried out"},
    {Count::storage_trims, "storage_trims", "", CountedIn::number,
     "Trims that storage has carried out"},
    {Count::reservations, "reservations", "", CountedIn::number,
     "Times that storage has reserved room for writes of clients"},
    {Count::reserved_bytes, "reserved_bytes", "", CountedIn::bytes,
     "Bytes of room that it reserved"},
    {Count::refused_reservations, "refused_reservations", "", CountedIn::number,
     "Times that it had no room for so much as a unit"},
    {Count::memory_wait, "memory_wait_seconds", "", CountedIn::nanoseconds,
     "Time that writes of clients waited for memory"},
    {Count::verified_deflate_clusters, "verified_deflate_clusters", "", CountedIn::number,
     "Clusters compressed by deflate that were found to be readable"},
    {Count::verified_deflate_bytes, "verified_deflate_bytes", "", CountedIn::bytes,
     "Compressed bytes of these clusters"},
    {Count::verified_zstd_clusters, "verified_zstd_clusters", "", CountedIn::number,
     "Clusters compressed by zstd that were found to be readable"},
    {Count::verified_zstd_bytes, "verified_zstd_bytes", "", CountedIn::bytes,
     "Compressed bytes of these clusters"},
    {Count::unreadable_clusters, "unreadable_clusters", "", CountedIn::number,
     "Compressed clusters that could not be read when they were last checked", true},
    {Count::unreadable_alarms, "unreadable_alarms", "", CountedIn::number,
     "Compressed clusters that were found not to be readable, each time"},
    {Count::refused_writes, "refused_writes", "", CountedIn::number,
     "Writes that storage has refused"},
    {Count::retries, "retries", "", CountedIn::number,
     "Units that were tried again after storage had refused them"},
    {Count::lost_bytes, "lost_bytes", "", CountedIn::bytes,
     "Acknowledged bytes that storage never took and that are gone"},
}};

constexpr bool in_order() {
  for (std::size_t i = 0; i < counts; ++i) {
    if (static_cast<std::size_t>(table[i].count) != i)
      return false;
  }
  return true;
}
static_assert(in_order(), "the table has one row for each count, in the order of the enumeration");

/// What is said of the server as a whole.
struct ServerRow {
  std::uint64_t Snapshot::*value;
  std::string_view name;
  CountedIn unit;
  std::string_view help;
};

constexpr std::array<ServerRow, 4> server_table{{
    {&Snapshot::elapsed_nanoseconds, "elapsed_seconds", CountedIn::nanoseconds,
     "Time since the server began"},
    {&Snapshot::memory_limit_bytes, "memory_limit_bytes", CountedIn::bytes,
     "Memory allowed for cached data of all exports"},
    {&Snapshot::memory_used_bytes, "memory_used_bytes", CountedIn::bytes,
     "Memory in use for cached data of all exports"},
    {&Snapshot::memory_peak_bytes, "memory_peak_bytes", CountedIn::bytes,
     "The most memory that was in use for cached data of all exports"},
}};

std::optional<double> quotient(std::uint64_t dividend, std::uint64_t divisor) {
  if (divisor == 0)
    return std::nullopt;
  return static_cast<double>(dividend) / static_cast<double>(divisor);
}

/// What follows from counts: a quotient of two.
struct DerivedRow {
  Count dividend;
  Count divisor;
  std::string_view name;
  CountedIn unit;
  std::string_view help;

  [[nodiscard]] std::optional<double> of(const Totals& totals) const {
    return quotient(totals[dividend], totals[divisor]);
  }
};

constexpr std::array<DerivedRow, 3> derived_table{{
    {Count::client_written_bytes, Count::client_writes, "average_client_write_bytes",
     CountedIn::bytes, "Average write request of clients"},
    {Count::storage_written_bytes, Count::storage_writes, "average_storage_write_bytes",
     CountedIn::bytes, "Average write that storage has carried out"},
    {Count::storage_written_bytes, Count::client_written_bytes, "write_amplification",
     CountedIn::number, "Bytes written to storage for each byte that clients wrote"},
}};

std::string decimal(double value, int digits) {
  // Not printf, which would use the decimal point of a locale that a plugin may have set.
  std::array<char, 400> text{};
  const std::to_chars_result result = std::to_chars(text.data(), text.data() + text.size(), value,
                                                    std::chars_format::fixed, digits);
  return {text.data(), result.ptr};
}

/// For machines: exact.
std::string number(std::uint64_t value, CountedIn unit) {
  if (unit != CountedIn::nanoseconds)
    return std::to_string(value);
  constexpr std::uint64_t second = 1'000'000'000;
  const std::string fraction = std::to_string(value % second);
  return std::to_string(value / second) + "." + std::string(9 - fraction.size(), '0') + fraction;
}

/// For people: as nbdkit's own stats filter writes sizes and times.
std::string legible(double value, CountedIn unit) {
  if (unit == CountedIn::nanoseconds)
    return decimal(value / 1e9, 3) + " s";
  std::size_t power = 0;
  constexpr std::array<std::string_view, 5> units{"bytes", "KiB", "MiB", "GiB", "TiB"};
  while (power + 1 < units.size() && value >= 1024) {
    value /= 1024;
    ++power;
  }
  return decimal(value, power == 0 ? 0 : 2) + " " + std::string(units[power]);
}

std::string legible(std::uint64_t value, CountedIn unit) {
  return unit == CountedIn::number ? std::to_string(value)
                                   : legible(static_cast<double>(value), unit);
}

/// In double quotes, for JSON and Prometheus, which agree about what `printable` leaves.
std::string in_quotes(std::string_view printable_text) {
  std::string text = "\"";
  for (const char character : printable_text) {
    if (character == '"' || character == '\\')
      text += '\\';
    text += character;
  }
  return text + "\"";
}

Totals total_of(const Snapshot& snapshot) {
  Totals total = snapshot.others.value_or(Totals());
  for (const Snapshot::Export& of : snapshot.exports)
    total += of.totals;
  return total;
}

void add_text_line(std::string& text, const std::string& value, std::string_view help) {
  constexpr std::size_t width = 16;
  text.append(value.size() < width ? width - value.size() : 0, ' ');
  text.append(value).append("  ").append(help);
}

void add_text(std::string& text, const std::string& title, const Totals& totals) {
  text += "\n" + title + "\n";
  for (const Row& row : table) {
    add_text_line(text, legible(totals[row.count], row.unit), row.help);
    if (!row.cause.empty())
      text.append(": ").append(row.cause);
    text += "\n";
  }
  for (const DerivedRow& row : derived_table) {
    const std::optional<double> value = row.of(totals);
    const std::string shown = row.unit == CountedIn::bytes ? legible(value.value_or(0), row.unit)
                                                           : decimal(value.value_or(0), 3);
    add_text_line(text, value ? shown : "-", row.help);
    text += "\n";
  }
}

void add_json(std::string& text, const std::string& name, const Totals& totals) {
  text += R"({"name": )" + name;
  for (std::size_t i = 0; i < table.size(); ++i) {
    const Row& row = table[i];
    const bool first = i == 0 || table[i - 1].name != row.name;
    const bool last = i + 1 == table.size() || table[i + 1].name != row.name;
    text += ", ";
    if (first)
      text.append("\"").append(row.name).append("\": ");
    if (!row.cause.empty())
      text.append(first ? "{\"" : "\"").append(row.cause).append("\": ");
    text += number(totals[row.count], row.unit);
    if (!row.cause.empty() && last)
      text += "}";
  }
  for (const DerivedRow& row : derived_table) {
    const std::optional<double> value = row.of(totals);
    text.append(", \"").append(row.name).append("\": ").append(value ? decimal(*value, 6) : "null");
  }
  text += "}";
}

void begin_family(std::string& text, const std::string& name, std::string_view help,
                  const char* type) {
  text.append("# HELP ").append(name).append(" ").append(help).append("\n");
  text.append("# TYPE ").append(name).append(" ").append(type).append("\n");
}

void add_sample(std::string& text, const std::string& name, const std::string& labels,
                const Row& row, const Totals& totals) {
  text += name + "{" + labels;
  if (!row.cause.empty())
    text += ",cause=" + in_quotes(row.cause);
  text += "} " + number(totals[row.count], row.unit) + "\n";
}

} // namespace

Totals& Totals::operator+=(const Totals& other) noexcept {
  for (std::size_t i = 0; i < counts; ++i)
    values_[i] += other.values_[i];
  return *this;
}

Totals& Totals::operator-=(const Totals& other) noexcept {
  for (std::size_t i = 0; i < counts; ++i)
    values_[i] -= other.values_[i];
  return *this;
}

Totals Counters::totals() const noexcept {
  Totals totals;
  for (std::size_t i = 0; i < counts; ++i)
    totals[static_cast<Count>(i)] = values_[i].load(std::memory_order_relaxed);
  return totals;
}

std::shared_ptr<Counters> Statistics::counters(const std::string& export_name) {
  const std::lock_guard lock(mutex_);
  if (const auto found = exports_.find(export_name); found != exports_.end())
    return found->second;
  auto fresh = std::make_shared<Counters>();
  if (exports_.size() < most_names)
    return exports_.try_emplace(export_name, std::move(fresh)).first->second;
  if (!others_)
    others_ = std::move(fresh);
  return others_;
}

Snapshot Statistics::snapshot() const {
  const std::lock_guard lock(mutex_);
  Snapshot taken;
  taken.exports.reserve(exports_.size());
  for (const auto& [name, counters] : exports_)
    taken.exports.push_back({name, counters->totals()});
  if (others_)
    taken.others = others_->totals();
  return taken;
}

std::string printable(std::string_view name) {
  namespace utf = boost::locale::utf;
  std::string text;
  const char* const end = name.data() + name.size();
  for (const char* at = name.data(); at != end;) {
    const char* behind = at;
    const utf::code_point character = utf::utf_traits<char>::decode(behind, end);
    const bool valid = character != utf::illegal && character != utf::incomplete;
    const bool control = character < 0x20 || (character >= 0x7f && character < 0xa0);
    if (valid && !control && character != '\\') {
      text.append(at, behind);
    } else {
      if (!valid)
        behind = at + 1;
      for (; at != behind; ++at) {
        constexpr std::string_view digits = "0123456789abcdef";
        const auto byte = static_cast<unsigned char>(*at);
        text.append("\\x").append(1, digits[byte >> 4U]).append(1, digits[byte & 0xfU]);
      }
    }
    at = behind;
  }
  return text;
}

std::string text_report(const Snapshot& snapshot) {
  std::string text = "nbdkit-qcowcache-filter\n";
  for (const ServerRow& row : server_table) {
    add_text_line(text, legible(snapshot.*row.value, row.unit), row.help);
    text += "\n";
  }
  for (const Snapshot::Export& of : snapshot.exports)
    add_text(text, "export \"" + printable(of.name) + "\"", of.totals);
  if (snapshot.others)
    add_text(text, "exports with other names", *snapshot.others);
  if (snapshot.exports.size() > 1)
    add_text(text, "all exports", total_of(snapshot));
  return text;
}

std::string json_report(const Snapshot& snapshot) {
  std::string text = "{\"version\": 2";
  for (const ServerRow& row : server_table)
    text.append(",\n \"").append(row.name).append("\": ").append(
        number(snapshot.*row.value, row.unit));
  text += ",\n \"exports\": [";
  bool first = true;
  for (const Snapshot::Export& of : snapshot.exports) {
    text += first ? "\n  " : ",\n  ";
    first = false;
    add_json(text, in_quotes(printable(of.name)), of.totals);
  }
  text += "],\n \"others\": ";
  if (snapshot.others)
    add_json(text, "null", *snapshot.others);
  else
    text += "null";
  text += ",\n \"total\": ";
  add_json(text, "null", total_of(snapshot));
  return text + "}\n";
}

std::string prometheus_report(const Snapshot& snapshot, std::string_view server) {
  const std::string server_label = "server=" + in_quotes(printable(server));
  std::string text;
  for (const ServerRow& row : server_table) {
    const std::string name = "qcowcache_" + std::string(row.name);
    begin_family(text, name, row.help, "gauge");
    text.append(name).append("{").append(server_label).append("} ");
    text.append(number(snapshot.*row.value, row.unit)).append("\n");
  }
  for (const auto* first = table.begin(); first != table.end();) {
    const auto* const last = std::find_if(
        first, table.end(), [first](const Row& row) { return row.name != first->name; });
    const std::string name =
        "qcowcache_" + std::string(first->name) + (first->is_gauge ? "" : "_total");
    begin_family(text, name, first->help, first->is_gauge ? "gauge" : "counter");
    for (const auto* row = first; row != last; ++row) {
      const std::string labels = server_label + ",export=";
      for (const Snapshot::Export& of : snapshot.exports)
        add_sample(text, name, labels + in_quotes(printable(of.name)), *row, of.totals);
      if (snapshot.others)
        add_sample(text, name, labels + in_quotes("\\other"), *row, *snapshot.others);
    }
    first = last;
  }
  return text;
}

} // namespace qcowcache
