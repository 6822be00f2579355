#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <stdexcept>
#include <string_view>

/// What is fuzzed. Each target takes any bytes, and throws `Broken`, or lets a sanitizer speak,
/// when something that is promised for all inputs does not hold for this one. A target keeps
/// nothing from one input to the next, and does the same each time it is given the same bytes.
namespace fuzz {

/// A promise that does not hold; `what()` says which.
class Broken : public std::logic_error {
public:
  using std::logic_error::logic_error;
};

void decompressor(std::span<const std::byte> input);
void header(std::span<const std::byte> input);
void requests(std::span<const std::byte> input);
void verifier(std::span<const std::byte> input);

struct Target {
  /// Of its corpus, too: fuzz/corpus/NAME.
  std::string_view name;
  void (*run)(std::span<const std::byte> input);
};

inline constexpr std::array targets{
    Target{"decompressor", decompressor},
    Target{"header", header},
    Target{"requests", requests},
    Target{"verifier", verifier},
};

} // namespace fuzz
