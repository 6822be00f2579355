#include "journal_file.hpp"

#include <fstream>
#include <map>
#include <stdexcept>
#include <utility>
#include <vector>

namespace {

struct Read {
  JournalRecord record;
  std::vector<std::byte> data;
};

std::vector<Read> read_all(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const auto take = [&](void* target, std::uint64_t size) {
    file.read(static_cast<char*>(target), static_cast<std::streamsize>(size));
    if (!file)
      throw std::runtime_error(path + ": not a whole journal");
  };
  std::vector<Read> all;
  while (file.peek() != std::ifstream::traits_type::eof()) {
    Read& read = all.emplace_back();
    take(&read.record, sizeof(read.record));
    const JournalRecord& record = read.record;
    if (record.kind == Change::Kind::write && record.moment == JournalRecord::Moment::begin) {
      read.data.resize(record.count);
      take(read.data.data(), record.count);
    }
  }
  if (all.empty())
    throw std::runtime_error(path + ": no journal");
  return all;
}

} // namespace

void read_journal(const std::string& path, Journal& journal) {
  using Key = std::pair<Journal::Side, std::uint64_t>;
  std::vector<Read> all = read_all(path);
  std::map<Key, bool> failed;
  for (const auto& [record, data] : all) {
    if (record.moment == JournalRecord::Moment::failed)
      failed[{record.side, record.request}] = true;
  }
  std::map<Key, std::size_t> numbers;
  for (auto& [record, data] : all) {
    const Key key{record.side, record.request};
    if (!failed.contains(key)) {
      if (record.moment == JournalRecord::Moment::begin)
        numbers[key] = journal.begin(record.side, {record.kind,
                                                   {record.offset, record.offset + record.count},
                                                   std::move(data),
                                                   record.fua != 0});
      else
        journal.end(record.side, numbers.at(key));
    }
  }
}
