#include "parameters.hpp"

#include "catch.hpp"

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <regex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

using qcowcache::ParameterError;
using qcowcache::Parameters;
using qcowcache::parse_size;

namespace {

/// What the operator is told; "" when the parameter is accepted.
std::string complaint(std::string_view key, std::string_view value) {
  Parameters parameters;
  try {
    parameters.set(key, value);
  } catch (const ParameterError& error) {
    return error.what();
  }
  return "";
}

bool has(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

constexpr std::uint64_t kibibyte = 1024;
constexpr std::uint64_t mebibyte = 1024 * kibibyte;

} // namespace

TEST_CASE("what is not said has its default", "[parameters]") {
  const Parameters parameters;
  CHECK(parameters.size() == 64 * mebibyte);
  CHECK_FALSE(parameters.cluster_size());
  CHECK(parameters.writers() == 4);
  CHECK(parameters.max_write() == mebibyte);
  CHECK(parameters.expire() == std::chrono::seconds(5));
  CHECK(parameters.size_file().empty());
  CHECK_FALSE(parameters.readback());
}

TEST_CASE("the defaults that the help names are those that apply", "[parameters]") {
  const std::string help = Parameters::help();
  const std::regex described("(qcowcache-[a-z-]+)=[^=]*\\(default\\s+([0-9A-Za-z]+)");
  const Parameters untouched;
  int found = 0;
  for (std::sregex_iterator next(help.begin(), help.end(), described), end; next != end; ++next) {
    const std::string key = next->str(1);
    const std::string value = next->str(2);
    INFO(key << '=' << value);
    Parameters parameters;
    CHECK(parameters.set(key, value));
    CHECK(parameters.size() == untouched.size());
    CHECK(parameters.cluster_size() == untouched.cluster_size());
    CHECK(parameters.writers() == untouched.writers());
    CHECK(parameters.max_write() == untouched.max_write());
    CHECK(parameters.expire() == untouched.expire());
    ++found;
  }
  CHECK(found >= 5);
}

TEST_CASE("a size is digits and one letter at most, as nbdkit writes it", "[parameters]") {
  const std::vector<std::pair<std::string_view, std::uint64_t>> sizes = {
      {"0", 0},
      {"1", 1},
      {"0007", 7},
      {"12b", 12},
      {"12B", 12},
      {"3s", 1536},
      {"3S", 1536},
      {"4k", 4096},
      {"4K", 4096},
      {"64M", 64 * mebibyte},
      {"64m", 64 * mebibyte},
      {"2G", 2048 * mebibyte},
      {"2g", 2048 * mebibyte},
      {"1T", mebibyte * mebibyte},
      {"1t", mebibyte * mebibyte},
      {"1P", kibibyte * mebibyte * mebibyte},
      {"7E", 7 * mebibyte * mebibyte * mebibyte},
      {"0E", 0},
      {"9223372036854775807", 9223372036854775807U},
  };
  for (const auto& [text, size] : sizes) {
    INFO(text);
    CHECK(parse_size(text) == size);
  }
}

TEST_CASE("what is not a size is none", "[parameters]") {
  for (const std::string_view text :
       {"",     " ",    "M",    "k4",   "-1",  "+1",  "- 1", " 1",   "1 ", "1 M", "1MB",
        "1KiB", "1.5M", "1,5M", "0x10", "1e3", "64X", "64%", "auto", "\n", "1\n", "\xff"}) {
    INFO('"' << text << '"');
    CHECK_FALSE(parse_size(text));
  }
  CHECK_FALSE(parse_size(std::string_view{}));
  CHECK_FALSE(parse_size(std::string_view("1\0", 2)));
}

TEST_CASE("a size that does not fit into 63 bits is none", "[parameters]") {
  for (const std::string_view text :
       {"9223372036854775808", "18446744073709551615", "18446744073709551616",
        "99999999999999999999999999", "8E", "8192P", "9007199254740992K", "18014398509481984s"}) {
    INFO(text);
    CHECK_FALSE(parse_size(text));
  }
  CHECK(parse_size("9007199254740991K") == 9007199254740991U * 1024);
  CHECK(parse_size("18014398509481983s") == 18014398509481983U * 512);
}

TEST_CASE("a size ends where its text ends, not where memory does", "[parameters]") {
  const std::string_view text = "64M4096";
  CHECK(parse_size(text.substr(0, 1)) == 6);
  CHECK(parse_size(text.substr(0, 2)) == 64);
  CHECK(parse_size(text.substr(0, 3)) == 64 * mebibyte);
}

TEST_CASE("qcowcache-size takes any size, the last one counts", "[parameters]") {
  Parameters parameters;
  CHECK(parameters.set("qcowcache-size", "16M"));
  CHECK(parameters.size() == 16 * mebibyte);
  CHECK(parameters.set("qcowcache-size", "0"));
  CHECK(parameters.size() == 0);
  CHECK(parameters.set("qcowcache-size", "1"));
  CHECK(parameters.size() == 1);
}

TEST_CASE("qcowcache-cluster-size takes powers of two from 512 to 2M", "[parameters]") {
  Parameters parameters;
  for (std::uint64_t size = 512; size <= 2 * mebibyte; size *= 2) {
    INFO(size);
    CHECK(parameters.set("qcowcache-cluster-size", std::to_string(size)));
    CHECK(parameters.cluster_size() == size);
  }
  CHECK(parameters.set("qcowcache-cluster-size", "1s"));
  CHECK(parameters.cluster_size() == 512);
  CHECK(parameters.set("qcowcache-cluster-size", "2M"));
  CHECK(parameters.cluster_size() == 2 * mebibyte);
}

TEST_CASE("qcowcache-cluster-size=auto goes back to the header", "[parameters]") {
  Parameters parameters;
  CHECK(parameters.set("qcowcache-cluster-size", "64k"));
  CHECK(parameters.set("qcowcache-cluster-size", "auto"));
  CHECK_FALSE(parameters.cluster_size());
}

TEST_CASE("qcowcache-writers takes 0 to 64", "[parameters]") {
  Parameters parameters;
  for (const unsigned number : {0U, 1U, 16U, 64U}) {
    CHECK(parameters.set("qcowcache-writers", std::to_string(number)));
    CHECK(parameters.writers() == number);
  }
}

TEST_CASE("qcowcache-max-write takes 64K to 32M", "[parameters]") {
  Parameters parameters;
  CHECK(parameters.set("qcowcache-max-write", "64K"));
  CHECK(parameters.max_write() == 64 * kibibyte);
  CHECK(parameters.set("qcowcache-max-write", "32M"));
  CHECK(parameters.max_write() == 32 * mebibyte);
}

TEST_CASE("qcowcache-expire takes seconds up to a day, and 0 for never", "[parameters]") {
  Parameters parameters;
  CHECK(parameters.set("qcowcache-expire", "86400"));
  CHECK(parameters.expire() == std::chrono::hours(24));
  CHECK(parameters.set("qcowcache-expire", "0"));
  CHECK_FALSE(parameters.expire());
  CHECK(parameters.set("qcowcache-expire", "1"));
  CHECK(parameters.expire() == std::chrono::seconds(1));
}

TEST_CASE("qcowcache-max-delay takes seconds up to a day, and 0 for no bound", "[parameters]") {
  Parameters parameters;
  CHECK(parameters.max_delay() == std::chrono::seconds(10));
  CHECK(parameters.set("qcowcache-max-delay", "0"));
  CHECK_FALSE(parameters.max_delay());
  CHECK(parameters.set("qcowcache-max-delay", "86400"));
  CHECK(parameters.max_delay() == std::chrono::hours(24));
}

TEST_CASE("qcowcache-reserve takes a size, and 0 for never", "[parameters]") {
  Parameters parameters;
  CHECK(parameters.reserve() == std::uint64_t{64} * 1024 * 1024);
  CHECK(parameters.set("qcowcache-reserve", "0"));
  CHECK(parameters.reserve() == 0);
  CHECK(parameters.set("qcowcache-reserve", "2M"));
  CHECK(parameters.reserve() == std::uint64_t{2} * 1024 * 1024);
}

TEST_CASE("qcowcache-size-file takes a name, which is made absolute at once", "[parameters]") {
  Parameters parameters;
  CHECK(parameters.set("qcowcache-size-file", "/run/size"));
  CHECK(parameters.size_file() == "/run/size");
  CHECK(parameters.set("qcowcache-size-file", "size"));
  CHECK(parameters.size_file() == (std::filesystem::current_path() / "size").string());
  CHECK(parameters.set("qcowcache-size-file", "/no/such/directory/size"));
  CHECK(parameters.size_file() == "/no/such/directory/size");
}

TEST_CASE("qcowcache-size-file is no directory", "[parameters]") {
  for (const std::string_view value : {"", "/", "/.", ".", ".."}) {
    const std::string line = complaint("qcowcache-size-file", value);
    INFO(value << ": " << line);
    CHECK(line == "qcowcache-size-file=" + std::string(value) + ": must be the name of a file");
  }
}

TEST_CASE("a line stays one line, whatever the value", "[parameters]") {
  for (const std::string_view key :
       {"qcowcache-size", "qcowcache-cluster-size", "qcowcache-writers", "qcowcache-max-write",
        "qcowcache-expire", "qcowcache-nonsense"}) {
    const std::string line = complaint(key, "1\n2\r3\t4\x1b[31m");
    INFO(line);
    CHECK(line.starts_with(std::string(key) + R"(=1\x0a2\x0d3\x094\x1b[31m: )"));
    CHECK(complaint(key, "caf\xc3\xa9").starts_with(std::string(key) + "=caf\xc3\xa9: "));
  }
}

TEST_CASE(
    "qcowcache-stats and qcowcache-unclean take the absolute path of a file that can be written",
    "[parameters]") {
  Parameters parameters;
  CHECK(parameters.stats_file().empty());
  CHECK(parameters.unclean_file().empty());
  const std::string file = (std::filesystem::temp_directory_path() / "qcowcache.json").string();
  CHECK(parameters.set("qcowcache-stats", file));
  CHECK(parameters.stats_file() == file);
  CHECK(parameters.unclean_file().empty());
  CHECK(parameters.set("qcowcache-unclean", file));
  CHECK(parameters.unclean_file() == file);
  for (const std::string key : {"qcowcache-stats", "qcowcache-unclean"}) {
    for (const char* wrong : {"", "s.json", "./s.json", "/no/such/directory/s.json", "/dev/null"}) {
      const std::string line = complaint(key, wrong);
      INFO(line);
      CHECK(has(line, key + "=" + std::string(wrong) + ": must be "));
      CHECK_FALSE(has(line, "\n"));
    }
  }
}

TEST_CASE("qcowcache-stats-interval takes seconds up to a day, and needs a file", "[parameters]") {
  Parameters parameters;
  CHECK_FALSE(parameters.stats_interval());
  CHECK(parameters.set("qcowcache-stats-interval", "86400"));
  CHECK(parameters.stats_interval() == std::chrono::seconds(86400));
  CHECK_THROWS_AS(parameters.check(), ParameterError);
  CHECK(parameters.set("qcowcache-stats-interval", "0"));
  CHECK_FALSE(parameters.stats_interval());
  CHECK_NOTHROW(parameters.check());
  CHECK(parameters.set("qcowcache-stats-interval", "10"));
  CHECK(parameters.set("qcowcache-stats", "/tmp/qcowcache.json"));
  CHECK_NOTHROW(parameters.check());
  for (const char* wrong : {"", "-1", "junk", "86401", "1.5", "10s"}) {
    const std::string line = complaint("qcowcache-stats-interval", wrong);
    INFO(line);
    CHECK(has(line, "qcowcache-stats-interval=" + std::string(wrong) + ": must be "));
    CHECK(has(line, "0 to 86400"));
  }
}

TEST_CASE("one line names a wrong value, its parameter and what is allowed", "[parameters]") {
  struct Wrong {
    std::string_view key;
    std::vector<std::string_view> values;
    /// What is allowed.
    std::vector<std::string_view> says;
  };
  const std::vector<Wrong> all = {
      {"qcowcache-size",
       {"",
        "lots",
        "-1",
        "-0",
        "64MB",
        "64KiB",
        "64Q",
        "M64",
        "6 4M",
        " 64M",
        "64M ",
        "1.5M",
        "0x10",
        "1e6",
        "auto",
        "8E",
        "64M,1",
        "9223372036854775808",
        "18446744073709551616",
        "99999999999999999999"},
       {"64M", "0"}},
      {"qcowcache-cluster-size",
       {"", "0", "1", "256", "511", "513", "3K", "2097153", "3M", "4M", "7E", "AUTO", "auto ",
        "-512", "off", "64KB", "64Q", "65536.0", "99999999999999999999"},
       {"auto", "power of two", "512", "2M"}},
      {"qcowcache-writers",
       {"", "65", "-1", "+1", "4k", "1.5", "four", " 4", "4 ", "0x4", "4294967296",
        "18446744073709551616"},
       {"from 0 to 64"}},
      {"qcowcache-max-write",
       {"", "0", "65535", "32M1", "33554433", "64M", "-1", "big", "1MB", "1.5M", "1Q",
        "9223372036854775808", "99999999999999999999"},
       {"from 64K to 32M"}},
      {"qcowcache-expire",
       {"", "86401", "-1", "5s", "1.5", "never", " 5", "5 ", "0x5", "18446744073709551616",
        "99999999999999999999"},
       {"from 0 to 86400"}},
      {"qcowcache-reserve", {"", "1", "2097151", "1025M", "-1", "some"}, {"from 2M to 1G"}},
      {"qcowcache-max-delay", {"", "86401", "-1", "5s", "1.5", "never"}, {"from 0 to 86400"}},
  };
  for (const Wrong& wrong : all) {
    for (const std::string_view value : wrong.values) {
      const std::string line = complaint(wrong.key, value);
      INFO(wrong.key << "=" << value << " -> " << line);
      CHECK(line.starts_with(std::string(wrong.key) + "=" + std::string(value) + ": "));
      for (const std::string_view allowed : wrong.says)
        CHECK(has(line, allowed));
      CHECK_FALSE(has(line, "\n"));
    }
  }
}

TEST_CASE("qcowcache-readback takes yes and no as nbdkit writes them", "[parameters]") {
  Parameters parameters;
  for (const char* yes : {"1", "t", "true", "TRUE", "y", "Yes", "on"}) {
    CHECK(parameters.set("qcowcache-readback", "off"));
    CHECK_FALSE(parameters.readback());
    CHECK(parameters.set("qcowcache-readback", yes));
    CHECK(parameters.readback());
  }
  for (const char* no : {"0", "f", "false", "False", "n", "NO", "off"}) {
    CHECK(parameters.set("qcowcache-readback", "on"));
    CHECK(parameters.set("qcowcache-readback", no));
    CHECK_FALSE(parameters.readback());
  }
  for (const char* neither : {"", "2", "yess", "ye", " on", "tru\xc3\xa9"}) {
    const std::string line = complaint("qcowcache-readback", neither);
    CHECK(has(line, "qcowcache-readback=" + std::string(neither)));
    CHECK(has(line, "true or false"));
  }
}

TEST_CASE("a value that is refused leaves the one before it", "[parameters]") {
  Parameters parameters;
  parameters.set("qcowcache-size", "16M");
  parameters.set("qcowcache-cluster-size", "4k");
  CHECK_THROWS_AS(parameters.set("qcowcache-size", "wrong"), ParameterError);
  CHECK_THROWS_AS(parameters.set("qcowcache-cluster-size", "wrong"), ParameterError);
  CHECK_THROWS_AS(parameters.set("qcowcache-writers", "wrong"), ParameterError);
  CHECK_THROWS_AS(parameters.set("qcowcache-max-write", "wrong"), ParameterError);
  CHECK_THROWS_AS(parameters.set("qcowcache-expire", "wrong"), ParameterError);
  CHECK(parameters.size() == 16 * mebibyte);
  CHECK(parameters.cluster_size() == 4096);
  CHECK(parameters.writers() == 4);
  CHECK(parameters.max_write() == mebibyte);
  CHECK(parameters.expire() == std::chrono::seconds(5));
}

TEST_CASE("one line names a parameter that there is not, its value, and those that there are",
          "[parameters]") {
  for (const std::string_view key :
       {"qcowcache-", "qcowcache-sizes", "qcowcache-siz", "qcowcache-Size", "qcowcache-size "}) {
    const std::string line = complaint(key, "12M");
    INFO(line);
    CHECK(has(line, std::string(key) + "=12M"));
    CHECK(has(line, "allowed"));
    for (const char* there : {"size", "size-file", "cluster-size", "writers", "max-write", "expire",
                              "stats", "stats-interval"})
      CHECK(has(line, there));
    CHECK_FALSE(has(line, "\n"));
  }
}

TEST_CASE("what is not this filter's is left to others, whatever its value", "[parameters]") {
  Parameters parameters;
  for (const std::string_view key : {"", "file", "size", "cache-max-size", "cache-size",
                                     "qcowcache", "qcow", "Qcowcache-size", "xqcowcache-size"}) {
    INFO(key);
    CHECK_FALSE(parameters.set(key, "nonsense"));
  }
  CHECK(parameters.size() == 64 * mebibyte);
}

TEST_CASE("the help names each parameter with its default", "[parameters]") {
  const std::string help = Parameters::help();
  CHECK(has(help, "qcowcache-size="));
  CHECK(has(help, "64M"));
  CHECK(has(help, "qcowcache-cluster-size="));
  CHECK(has(help, "auto"));
  for (const char* key : {"size-file", "writers", "max-write", "expire", "stats", "stats-interval"})
    CHECK(has(help, "qcowcache-" + std::string(key) + "="));
  CHECK(complaint("qcowcache-size", "64M").empty());
  CHECK(complaint("qcowcache-cluster-size", "auto").empty());
}
