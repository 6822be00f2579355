#include "cache/write_rate.hpp"

namespace qcowcache {

namespace {
/// A measurement takes at least so long: single requests say little.
constexpr std::chrono::milliseconds measured{250};
/// What a new measurement counts beside those before it.
constexpr double weight = 0.25;
} // namespace

void WriteRate::began(Clock::time_point now) noexcept {
  if (under_way_ == 0)
    since_ = now;
  ++under_way_;
}

void WriteRate::ended(Clock::time_point now, std::uint64_t bytes) noexcept {
  --under_way_;
  busy_ += now - since_;
  since_ = now;
  bytes_ += bytes;
  if (busy_ < measured)
    return;
  const double rate = static_cast<double>(bytes_) / std::chrono::duration<double>(busy_).count();
  rate_ = rate_ ? *rate_ + weight * (rate - *rate_) : rate;
  busy_ = {};
  bytes_ = 0;
}

std::optional<std::uint64_t> WriteRate::bytes_in(Clock::duration time) const noexcept {
  if (!rate_)
    return std::nullopt;
  // A stop of storage may have made the rate as good as nothing: a double holds what comes out.
  return static_cast<std::uint64_t>(*rate_ * std::chrono::duration<double>(time).count());
}

} // namespace qcowcache
