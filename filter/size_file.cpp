#include "size_file.hpp"

#include "parameters.hpp"

#include <fstream>

namespace qcowcache {

std::optional<std::uint64_t> SizeFile::read() const {
  std::ifstream file(path_);
  std::string word;
  std::string more;
  if (!(file >> word) || file >> more)
    return std::nullopt;
  return parse_size(word);
}

std::optional<std::uint64_t> SizeFile::changed() {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  const auto now = std::chrono::steady_clock::now();
  if (!lock || now < next_look_)
    return std::nullopt; // somebody else looks, or it is too early
  next_look_ = now + least_interval;
  const std::optional<std::uint64_t> size = read();
  if (!size) {
    if (!complained_)
      complain_("qcowcache-size-file=" + path_ +
                ": must be a file that holds a size such as 64M; keeping the last size");
    complained_ = true;
    return std::nullopt;
  }
  complained_ = false;
  if (size == last_)
    return std::nullopt;
  last_ = size;
  return size;
}

} // namespace qcowcache
