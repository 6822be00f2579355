#include "cache/savings.hpp"

namespace qcowcache {

void Savings::wrote(std::uint64_t without, std::uint64_t with) noexcept {
  // The last dozen or so count.
  constexpr double remembered = 15.0 / 16.0;
  without_ = without_ * remembered + static_cast<double>(without);
  with_ = with_ * remembered + static_cast<double>(with);
}

bool Savings::pays() const noexcept {
  constexpr double worthwhile = 1.5;
  return without_ >= worthwhile * with_;
}

} // namespace qcowcache
