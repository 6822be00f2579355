#pragma once

#include "journal.hpp"

#include <cstddef>
#include <cstdint>
#include <vector>

/// A disk with a volatile write cache, and what a power cut may leave of it: everything that it has
/// flushed, and of everything else any part, sector by sector. Not thread safe.
class VolatileDisk {
public:
  static constexpr std::uint64_t sector = 512;

  /// A change of which the disk has not said yet that it will survive.
  struct Pending {
    const Change* change;
    std::size_t number;
    /// Where it may still make a difference: not where a later one is durable already.
    qcowcache::ByteRanges open;
    bool ended = false;
  };

  explicit VolatileDisk(std::vector<std::byte> durable)
      : durable_(std::move(durable)), image_(durable_) {}

  /// `change` outlives the disk. Throws std::logic_error when a change begins while another in the
  /// same bytes has not ended: what the disk holds then is anybody's guess.
  void begin(std::size_t number, const Change& change);
  void end(std::size_t number, const Change& change);

  /// In the order in which they began.
  [[nodiscard]] const std::vector<Pending>& pending() const noexcept { return pending_; }
  /// The bytes that pending changes may still change.
  [[nodiscard]] qcowcache::ByteRanges undecided() const;

  /// What a power cut leaves when of each pending change, given by its place in `pending`, those
  /// sectors survive, given by their offset, of which `survives` says so. Valid until the next
  /// call.
  template <typename Survives>
  [[nodiscard]] const std::vector<std::byte>& image(Survives survives);

private:
  struct Flush {
    std::size_t number;
    /// The changes that had ended when it began.
    std::vector<std::size_t> covers;
  };
  void make_durable(std::size_t number);

  std::vector<std::byte> durable_;
  std::vector<Pending> pending_;
  std::vector<Flush> flushes_;
  /// `durable_`, but for what the last call of `image` put into `touched_`.
  std::vector<std::byte> image_;
  qcowcache::ByteRanges touched_;
};

template <typename Survives>
const std::vector<std::byte>& VolatileDisk::image(Survives survives) {
  using qcowcache::ByteRange;
  const auto at = [](std::uint64_t offset) { return static_cast<std::ptrdiff_t>(offset); };
  for (const ByteRange& range : touched_)
    std::copy_n(durable_.begin() + at(range.begin), range.size(), image_.begin() + at(range.begin));
  touched_ = undecided();
  for (std::size_t i = 0; i < pending_.size(); ++i) {
    for (const ByteRange& range : pending_[i].open) {
      for (ByteRange rest = range; !rest.empty();) {
        const ByteRange within{qcowcache::align_down(rest.begin, sector),
                               qcowcache::align_down(rest.begin, sector) + sector};
        const ByteRange part = rest.intersection(within);
        if (survives(i, within.begin))
          pending_[i].change->apply(part, image_);
        rest.begin = part.end;
      }
    }
  }
  return image_;
}
