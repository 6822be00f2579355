#include "model_sequence.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string_view>
#include <type_traits>

namespace {

using std::string_view_literals::operator""sv;

constexpr std::array sharing_names{"cache"sv, "disk"sv, "nothing"sv};
constexpr std::array fua_names{"none"sv, "emulate"sv, "native"sv};
constexpr std::array trims_names{"zeros"sv, "keeps"sv, "garbage"sv};
constexpr std::array kind_names{"connect"sv, "disconnect"sv, "vanish"sv, "write"sv,   "header"sv,
                                "read"sv,    "zero"sv,       "trim"sv,   "extents"sv, "cache"sv,
                                "flush"sv,   "tick"sv,       "queue"sv,  "turn"sv,    "budget"sv,
                                "size"sv,    "breaks"sv,     "heals"sv,  "look"sv,    "exchange"sv};
constexpr std::array done_names{"none"sv, "half"sv, "all"sv};
constexpr std::array fails_names{"nothing"sv, "any"sv,  "read"sv,    "write"sv, "flush"sv,
                                 "zero"sv,    "trim"sv, "extents"sv, "cache"sv};

constexpr const auto& names_of(Sharing /*value*/) {
  return sharing_names;
}
constexpr const auto& names_of(ModelFua /*value*/) {
  return fua_names;
}
constexpr const auto& names_of(Trims /*value*/) {
  return trims_names;
}
constexpr const auto& names_of(Done /*value*/) {
  return done_names;
}
constexpr const auto& names_of(StepKind /*value*/) {
  return kind_names;
}
constexpr const auto& names_of(Fails /*value*/) {
  return fails_names;
}

template <typename Value>
std::string value_to_text(const Value& value) {
  if constexpr (std::is_enum_v<Value>)
    return std::string(names_of(value)[static_cast<std::size_t>(value)]);
  else
    return std::to_string(value);
}

template <typename Value>
void value_from_text(std::string_view text, Value& value) {
  if constexpr (std::is_enum_v<Value>) {
    const auto& names = names_of(value);
    const auto found = std::ranges::find(names, text);
    if (found == names.end())
      throw std::invalid_argument("no such name: " + std::string(text));
    value = static_cast<Value>(found - names.begin());
  } else {
    std::uint64_t number = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (error != std::errc() || end != text.data() + text.size())
      throw std::invalid_argument("not a number: " + std::string(text));
    value = static_cast<Value>(number);
  }
}

/// Calls `visit` with the name and the value of each field.
template <typename Setup, typename Visit>
void for_each_setup_field(Setup& setup, Visit visit) {
  visit("sharing", setup.sharing);
  visit("connections", setup.connections);
  visit("stripe", setup.stripe);
  visit("memory", setup.memory);
  visit("cluster", setup.cluster);
  visit("max_write", setup.max_write);
  visit("reserve", setup.reserve);
  visit("expire", setup.expire);
  visit("hurried", setup.hurried);
  visit("retries", setup.retries);
  visit("background", setup.background);
  visit("size", setup.size);
  visit("minimum", setup.minimum);
  visit("preferred", setup.preferred);
  visit("maximum", setup.maximum);
  visit("can_flush", setup.can_flush);
  visit("can_trim", setup.can_trim);
  visit("can_zero", setup.can_zero);
  visit("can_fast_zero", setup.can_fast_zero);
  visit("can_extents", setup.can_extents);
  visit("can_cache", setup.can_cache);
  visit("fua", setup.fua);
  visit("grain", setup.grain);
  visit("shy", setup.shy);
  visit("trims", setup.trims);
  visit("filled", setup.filled);
  visit("header", setup.header);
  visit("loses_write", setup.loses_write);
}

template <typename Step, typename Visit>
void for_each_step_field(Step& step, Visit visit) {
  visit("connection", step.connection);
  visit("offset", step.offset);
  visit("length", step.length);
  visit("value", step.value);
  visit("fua", step.fua);
  visit("may_trim", step.may_trim);
  visit("fast", step.fast);
  visit("first", step.first);
  visit("read_only", step.read_only);
  visit("fails", step.fails);
  visit("nth", step.nth);
  visit("error", step.error);
  visit("done", step.done);
  visit("once", step.once);
}

/// `text`, and the fields of the object that differ from those of a fresh one.
template <typename Object, typename ForEach>
std::string changed_fields(std::string text, const Object& object, ForEach for_each) {
  std::map<std::string, std::string> usual;
  const Object fresh{};
  for_each(fresh, [&](const char* name, const auto& value) { usual[name] = value_to_text(value); });
  for_each(object, [&](const char* name, const auto& value) {
    if (value_to_text(value) != usual[name])
      text += std::string(" ") + name + "=" + value_to_text(value);
  });
  return text;
}

template <typename Object, typename ForEach>
void read_fields(std::istringstream& words, Object& object, ForEach for_each) {
  for (std::string word; words >> word;) {
    const std::size_t sign = word.find('=');
    if (sign == std::string::npos)
      throw std::invalid_argument("not a field: " + word);
    bool known = false;
    for_each(object, [&](const char* name, auto& value) {
      if (word.compare(0, sign, name) == 0) {
        value_from_text(std::string_view(word).substr(sign + 1), value);
        known = true;
      }
    });
    if (!known)
      throw std::invalid_argument("no such field: " + word);
  }
}

constexpr auto setup_fields = [](auto& setup, auto visit) { for_each_setup_field(setup, visit); };
constexpr auto step_fields = [](auto& step, auto visit) { for_each_step_field(step, visit); };

} // namespace

std::string to_text(const ModelStep& step) {
  return changed_fields(value_to_text(step.kind), step, step_fields);
}

std::string to_text(const ModelSequence& sequence) {
  std::string text = changed_fields("setup", sequence.setup, setup_fields) + "\n";
  for (const ModelStep& step : sequence.steps)
    text += to_text(step) + "\n";
  return text;
}

ModelSequence sequence_from_text(const std::string& text) {
  ModelSequence sequence;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string first;
    if (words >> first) {
      if (first == "setup") {
        read_fields(words, sequence.setup, setup_fields);
      } else {
        ModelStep step;
        value_from_text(first, step.kind);
        read_fields(words, step, step_fields);
        sequence.steps.push_back(step);
      }
    }
  }
  return sequence;
}
