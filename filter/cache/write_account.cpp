// The part of WriteCache that keeps account of what it does: counts it, and tells those who listen.

#include "cache/write_cache.hpp"

#include <algorithm>
#include <array>
#include <exception>
#include <string>
#include <string_view>
#include <utility>

namespace qcowcache {

// ---- Counting

void WriteCache::count_write(const Lock& /*lock*/, const ByteRange& request) noexcept {
  Counters& counters = *settings_.counters;
  counters.add(Count::client_writes);
  counters.add(Count::client_written_bytes, request.size());
  if (align_inward(request, odd_grid) != request)
    counters.add(Count::client_odd_writes);
}

void WriteCache::count_fill_up(const ByteRange& range) {
  settings_.counters->add(Count::fill_up_reads);
  settings_.counters->add(Count::fill_up_read_bytes, range.size());
  tell(settings_.events.trace, [&] { return "filled up " + to_string(range); });
}

/// Counts a unit that storage has taken.
void WriteCache::count_written(const Lock& /*lock*/, const Unit& unit) noexcept {
  const auto count_for = [](Unit::Reason reason) {
    switch (reason) {
    case Unit::Reason::flush:
      return Count::partial_units_flush;
    case Unit::Reason::disconnect:
      return Count::partial_units_disconnect;
    case Unit::Reason::expiry:
      return Count::partial_units_expiry;
    case Unit::Reason::memory:
      return Count::partial_units_memory;
    case Unit::Reason::cluster_end:
      return Count::partial_units_cluster_end;
    case Unit::Reason::many_pieces:
      return Count::partial_units_many_pieces;
    case Unit::Reason::comparison:
      return Count::partial_units_comparison;
    case Unit::Reason::new_layout:
      break;
    }
    return Count::partial_units_new_layout;
  };
  if (!unit.in_flight().empty())
    settings_.counters->add(unit.started_whole ? Count::whole_units : count_for(unit.reason));
}

// ---- Telling

/// For listeners: what is cached from now on, when that has changed.
void WriteCache::tell_layout(const Lock& lock) {
  if (!settings_.events.decision)
    return;
  const bool unread = !has_layout_ && header_unread_ > 0;
  const Told now{has_layout_, unread, caching(lock), wanted_unit_size_};
  if (told_ == now)
    return;
  told_ = now;
  tell(settings_.events.decision, [&] {
    std::string line = now.header_unread ? "the header could not be read" : "no qcow2 header";
    if (settings_.cluster_size)
      line = "clusters of " + std::to_string(*settings_.cluster_size) + " bytes, as was asked for";
    else if (const std::optional<qcow2::Header> header = header_.header(size_))
      line = "qcow2 header of version " + std::to_string(header->version) + ", clusters of " +
             std::to_string(header->cluster_size()) + " bytes";
    if (now.caching)
      return line + ": caching in units of " + std::to_string(now.unit_size) + " bytes";
    if (now.has_layout)
      line += ", but " + std::to_string(budget_.limit()) +
              " bytes of memory are less than two units of " + std::to_string(now.unit_size) +
              " and their bookkeeping";
    return line + ": passing writes through";
  });
}

/// For listeners: the first of several refusals; how many they were is told with what was written.
void WriteCache::tell_refusal(const ByteRange& range, const std::exception& refusal) {
  const Lock lock(mutex_);
  if (told_refusal_)
    return;
  told_refusal_ = true;
  tell(settings_.events.decision,
       [&] { return "keeping " + to_string(range) + " in memory: " + refusal.what(); });
}

/// For listeners: what was written since they were last told, and why.
void WriteCache::tell_written(const Lock& /*lock*/, Unit::Reason reason) {
  if (!settings_.events.decision)
    return;
  Totals since = settings_.counters->totals();
  const Totals now = since;
  since -= told_written_;
  constexpr std::array<std::pair<Count, std::string_view>, 10> parts{{
      {Count::whole_units, "whole"},
      {Count::partial_units_flush, "partial for a flush"},
      {Count::partial_units_disconnect, "partial for a disconnect"},
      {Count::partial_units_expiry, "partial by time"},
      {Count::partial_units_memory, "partial for memory"},
      {Count::partial_units_cluster_end, "partial at a cluster's end"},
      {Count::partial_units_many_pieces, "partial in many pieces"},
      {Count::partial_units_new_layout, "partial of another layout"},
      {Count::partial_units_comparison, "partial for a new connection to compare"},
      {Count::refused_writes, "writes refused"},
  }};
  const bool nothing = std::all_of(parts.begin(), parts.end(),
                                   [&](const auto& part) { return since[part.first] == 0; });
  if (nothing)
    return;
  told_written_ = now;
  told_refusal_ = false;
  tell(settings_.events.decision, [&] {
    std::string line = reason == Unit::Reason::flush
                           ? "flush; units written since the last line:"
                           : "disconnect; units written since the last line:";
    for (const auto& [count, what] : parts) {
      if (since[count] > 0)
        line.append(" ").append(std::to_string(since[count])).append(" ").append(what).append(",");
    }
    line.pop_back();
    return line;
  });
}

} // namespace qcowcache
