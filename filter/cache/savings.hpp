#pragma once

#include <cstdint>

namespace qcowcache {

/// Whether it pays to hold writes back: how many requests storage was spared of late by those that
/// were held, for each that it got.
///
/// Small writes one after the other save most of them. Small writes all over a large disk save
/// none: each unit goes out with the one write that it has seen, and what was held only has to be
/// written later, by fewer at once than clients would have had under way.
///
/// Not thread safe: guarded by the cache's mutex.
class Savings {
public:
  /// What was held, and would have cost storage `without` requests had each write gone through, has
  /// cost it `with`.
  void wrote(std::uint64_t without, std::uint64_t with) noexcept;
  /// As long as nothing is known it does.
  [[nodiscard]] bool pays() const noexcept;
  [[nodiscard]] bool known() const noexcept { return with_ > 0; }

private:
  double without_ = 0;
  double with_ = 0;
};

} // namespace qcowcache
