#include "reports/loss_message.hpp"

#include "reports/statistics.hpp"

#include <cstddef>
#include <string_view>

namespace qcowcache {

namespace {

constexpr std::size_t most_ranges = 4;
constexpr std::size_t longest_name = 64;

std::string shortened(std::string_view name) {
  return printable(name.substr(0, longest_name)) + (name.size() > longest_name ? "..." : "");
}

} // namespace

std::string loss_message(const std::string& export_name, const Unsaved& lost) {
  std::string where;
  std::size_t named = 0;
  for (const ByteRange& range : lost.ranges) {
    if (named == most_ranges)
      break;
    where += (named == 0 ? "" : ", ") + to_string(range);
    ++named;
  }
  if (lost.ranges.count() > named)
    where += ", and " + std::to_string(lost.ranges.count() - named) + " more";
  return "export \"" + shortened(export_name) + "\": lost " + std::to_string(lost.bytes) +
         " bytes that were acknowledged, because storage refused them: " + where;
}

} // namespace qcowcache
