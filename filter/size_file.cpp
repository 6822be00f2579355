#include "size_file.hpp"

#include "parameters.hpp"

#include <array>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <system_error>

namespace qcowcache {

namespace {
/// No size takes more characters, spaces and all.
constexpr std::size_t most_text = 256;
} // namespace

std::optional<std::uint64_t> SizeFile::read() const {
  // Opening anything else may wait for ever, and reading it may never end.
  std::error_code error;
  if (!std::filesystem::is_regular_file(path_, error))
    return std::nullopt;
  std::array<char, most_text> text{};
  std::ifstream file(path_, std::ios::binary);
  file.read(text.data(), text.size());
  const auto length = static_cast<std::size_t>(file.gcount());
  if (length == text.size())
    return std::nullopt;
  std::istringstream words(std::string(text.data(), length));
  std::string word;
  std::string more;
  if (!(words >> word) || words >> more)
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
