#include "journal.hpp"

#include <algorithm>

using qcowcache::ByteRange;

namespace {

std::string text_of(const Change& change, std::uint64_t offset) {
  static constexpr const char* names[] = {"write", "zero", "trim", "flush"};
  std::string text = names[static_cast<std::size_t>(change.kind)];
  if (change.kind != Change::Kind::flush)
    text += " " + std::to_string(change.range.begin) + "-" + std::to_string(change.range.end) +
            " byte " + std::to_string(std::to_integer<int>(change.byte_at(offset)));
  return text + (change.fua ? " FUA" : "");
}

} // namespace

void Change::apply(const ByteRange& part, std::vector<std::byte>& image) const {
  const auto target = image.begin() + static_cast<std::ptrdiff_t>(part.begin);
  if (kind == Kind::write)
    std::copy_n(data.begin() + static_cast<std::ptrdiff_t>(part.begin - range.begin), part.size(),
                target);
  else
    std::fill_n(target, part.size(), std::byte{0});
}

std::size_t Journal::begin(Side side, Change change) {
  const std::lock_guard lock(mutex_);
  changes_.push_back(std::move(change));
  entries_.push_back({side, Moment::begin, changes_.size() - 1});
  return changes_.size() - 1;
}

void Journal::end(Side side, std::size_t change) {
  const std::lock_guard lock(mutex_);
  entries_.push_back({side, Moment::end, change});
}

std::string Journal::history(std::uint64_t offset, std::size_t count) const {
  std::string text;
  for (std::size_t i = 0; i < count; ++i) {
    const Change& concerned = change(entries_[i]);
    if (concerned.kind == Change::Kind::flush || concerned.range.contains({offset, offset + 1})) {
      text += "  " + std::to_string(i) +
              (entries_[i].side == Side::client ? " client  " : " storage ") +
              (entries_[i].moment == Moment::begin ? "begins " : "ends   ") + "#" +
              std::to_string(entries_[i].change) + " " + text_of(concerned, offset) + "\n";
    }
  }
  return text;
}
