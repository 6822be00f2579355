#include "memory/memory_budget.hpp"

#include "catch.hpp"

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <latch>
#include <list>
#include <memory>
#include <new>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

using qcowcache::MemoryBudget;

namespace {

constexpr std::size_t page = 4096;
constexpr std::size_t kibibyte = 1024;

using Buffers = std::vector<std::shared_ptr<MemoryBudget::Buffer>>;

/// What the operators below have handed out, and whether they refuse to.
std::atomic<std::size_t> bytes_in_the_process = 0;
std::atomic<bool> system_has_memory = true;

/// As many buffers as the budget allows now.
Buffers take_all(MemoryBudget& budget, std::size_t size, std::size_t extra) {
  Buffers taken;
  while (std::shared_ptr<MemoryBudget::Buffer> buffer = budget.try_take(size, extra))
    taken.push_back(std::move(buffer));
  return taken;
}

/// Gives what it is asked for as long as it has anything, and writes down its name.
class NamedHolder final : public MemoryBudget::Holder {
public:
  NamedHolder(std::string name, std::size_t has, std::string& asked)
      : name_(std::move(name)), has_(has), asked_(asked) {}

  std::size_t release_clean(std::size_t bytes) override {
    asked_ += name_ + std::to_string(bytes) + " ";
    const std::size_t given = std::min(bytes, has_);
    has_ -= given;
    return given;
  }
  [[nodiscard]] bool writing() const override { return is_writing; }
  [[nodiscard]] std::optional<Clock::time_point> oldest() const override { return oldest_data; }
  void queue_oldest() override { asked_ += name_ + " queues "; }

  bool is_writing = false;
  std::optional<Clock::time_point> oldest_data;

private:
  std::string name_;
  std::size_t has_;
  std::string& asked_;
};

/// A budget with such holders.
struct Held {
  std::shared_ptr<NamedHolder> add(const std::string& name, std::size_t has) {
    auto holder = std::make_shared<NamedHolder>(name, has, asked);
    budget.add_holder(holder);
    return holder;
  }

  MemoryBudget budget{page};
  std::string asked;
};

} // namespace

// Buffers come from these, and nothing else in the program does: so what the budget keeps for later
// can be seen. Each stands one alignment behind the beginning of its memory, where its size is.

void* operator new[](std::size_t size, std::align_val_t alignment) {
  const auto gap = static_cast<std::size_t>(alignment);
  const std::size_t whole_blocks = (size + gap - 1) / gap * gap;
  void* const memory = system_has_memory ? std::aligned_alloc(gap, gap + whole_blocks) : nullptr;
  if (memory == nullptr)
    throw std::bad_alloc();
  std::memcpy(memory, &size, sizeof size);
  bytes_in_the_process += size;
  return static_cast<std::byte*>(memory) + gap;
}

void operator delete[](void* buffer, std::align_val_t alignment) noexcept {
  if (buffer == nullptr)
    return;
  void* const memory = static_cast<std::byte*>(buffer) - static_cast<std::size_t>(alignment);
  std::size_t size = 0;
  std::memcpy(&size, memory, sizeof size);
  bytes_in_the_process -= size;
  std::free(memory);
}

void operator delete[](void* buffer, std::size_t /*size*/, std::align_val_t alignment) noexcept {
  operator delete[](buffer, alignment);
}

TEST_CASE("a buffer has the size asked for, begins on a page, and can be written",
          "[memory_budget]") {
  MemoryBudget budget(1024 * kibibyte);
  for (const std::size_t size : {page, 64 * kibibyte, 256 * kibibyte}) {
    const auto buffer = budget.try_take(size, 100);
    REQUIRE(buffer);
    CHECK(buffer->bytes().size() == size);
    CHECK(reinterpret_cast<std::uintptr_t>(buffer->bytes().data()) % page == 0);
    std::memset(buffer->bytes().data(), 0xa5, size);
  }
}

TEST_CASE("without a limit to speak of nothing is handed out", "[memory_budget]") {
  MemoryBudget budget(0);
  CHECK(budget.try_take(page, 0) == nullptr);
  CHECK_FALSE(budget.allows_two(page, 0));
}

TEST_CASE("two buffers can be had when half of the limit holds one with its bookkeeping",
          "[memory_budget]") {
  MemoryBudget budget(2 * (page + 100));
  CHECK(budget.allows_two(page, 100));
  CHECK_FALSE(budget.allows_two(page, 101));
  CHECK_FALSE(budget.allows_two(2 * page, 0));
  const Buffers taken = take_all(budget, page, 0); // whatever is handed out just now
  CHECK(budget.allows_two(page, 100));
}

TEST_CASE("a buffer that came back is handed out again", "[memory_budget]") {
  MemoryBudget budget(10 * page);
  Buffers taken = take_all(budget, page, 0);
  std::set<const std::byte*> places;
  for (const auto& buffer : taken)
    places.insert(buffer->bytes().data());
  taken.clear();
  CHECK(budget.used() == 0);
  taken = take_all(budget, page, 0);
  CHECK(taken.size() == 10);
  for (const auto& buffer : taken)
    CHECK(places.contains(buffer->bytes().data()));
}

TEST_CASE("kept buffers give way to buffers of another size", "[memory_budget]") {
  MemoryBudget budget(8 * page);
  take_all(budget, page, 0).clear();
  CHECK(budget.used() == 0);
  CHECK(bytes_in_the_process == 8 * page);
  const auto first = budget.try_take(4 * page, 0);
  CHECK(bytes_in_the_process == 8 * page);
  const auto second = budget.try_take(4 * page, 0);
  REQUIRE(second);
  CHECK(budget.used() == 8 * page);
  CHECK(bytes_in_the_process == 8 * page);
}

TEST_CASE("kept buffers and bookkeeping together stay within the limit", "[memory_budget]") {
  MemoryBudget budget(8 * page);
  take_all(budget, page, 0).clear();
  const auto with_bookkeeping = budget.try_take(page, 3 * page);
  REQUIRE(with_bookkeeping);
  CHECK(bytes_in_the_process == 5 * page);
}

TEST_CASE("a lower limit frees what was kept for later", "[memory_budget]") {
  MemoryBudget budget(8 * page);
  auto held = budget.try_take(2 * page, 0);
  take_all(budget, page, 0).clear();
  CHECK(bytes_in_the_process == 8 * page);
  budget.set_limit(3 * page);
  CHECK(bytes_in_the_process == 3 * page);
  budget.set_limit(page);
  CHECK(bytes_in_the_process == 2 * page);
  held.reset();
  CHECK(bytes_in_the_process == 0);
}

TEST_CASE("nothing stays charged when the system has no memory", "[memory_budget]") {
  MemoryBudget budget(8 * page);
  system_has_memory = false;
  CHECK_THROWS_AS(budget.try_take(page, 100), std::bad_alloc);
  system_has_memory = true;
  CHECK(budget.used() == 0);
  CHECK(budget.try_take(8 * page, 0));
}

TEST_CASE("what was kept is freed with the budget", "[memory_budget]") {
  {
    MemoryBudget budget(8 * page);
    take_all(budget, page, 0).clear();
    CHECK(bytes_in_the_process > 0);
  }
  CHECK(bytes_in_the_process == 0);
}

TEST_CASE("the limit holds while buffers of many sizes come and go", "[memory_budget]") {
  constexpr std::size_t limit = 64 * page;
  MemoryBudget budget(limit);
  Buffers held;
  std::size_t charged = 0;
  std::vector<std::size_t> charges;
  for (std::size_t round = 0; round < 2000; ++round) {
    const std::size_t size = (1 + round * 7 % 13) * page;
    const std::size_t extra = round * 31 % 500;
    auto buffer = budget.try_take(size, extra);
    REQUIRE((buffer != nullptr) == (charged + size + extra <= limit));
    if (buffer != nullptr) {
      REQUIRE(buffer->bytes().size() == size);
      std::memset(buffer->bytes().data(), 1, buffer->bytes().size());
      held.push_back(std::move(buffer));
      charges.push_back(size + extra);
      charged += size + extra;
    }
    if (buffer == nullptr && round % 3 == 0 && !held.empty()) {
      const std::size_t victim = round % held.size();
      charged -= charges[victim];
      held.erase(held.begin() + static_cast<std::ptrdiff_t>(victim));
      charges.erase(charges.begin() + static_cast<std::ptrdiff_t>(victim));
    }
    REQUIRE(budget.used() == charged);
    REQUIRE(bytes_in_the_process <= limit);
  }
}

TEST_CASE("a buffer that was moved is given back once", "[memory_budget]") {
  MemoryBudget budget(10 * page);
  {
    const auto original = budget.try_take(page, 10);
    const MemoryBudget::Buffer moved(std::move(*original));
    CHECK(moved.bytes().size() == page);
    CHECK(budget.used() == page + 10);
  }
  CHECK(budget.used() == 0);
}

TEST_CASE("reclaiming asks one holder after the other for what is still wanted",
          "[memory_budget]") {
  Held held;
  const auto poor = held.add("poor", 10);
  const auto rich = held.add("rich", 1000);
  const auto spared = held.add("spared", 1000);
  CHECK(held.budget.reclaim(100));
  CHECK(held.asked == "poor100 rich90 ");
}

TEST_CASE("each reclaim begins with the next holder", "[memory_budget]") {
  Held held;
  const std::array holders{held.add("a", 1000), held.add("b", 1000), held.add("c", 1000)};
  for (int i = 0; i < 6; ++i)
    CHECK(held.budget.reclaim(1));
  CHECK(held.asked == "a1 b1 c1 a1 b1 c1 ");
}

TEST_CASE("reclaiming says so when nobody has anything to give", "[memory_budget]") {
  Held held;
  CHECK_FALSE(held.budget.reclaim(1));
  const auto empty = held.add("empty", 0);
  CHECK_FALSE(held.budget.reclaim(5));
  CHECK(held.asked == "empty5 ");
}

TEST_CASE("holders that are gone are not asked, nor kept", "[memory_budget]") {
  Held held;
  auto gone = held.add("gone", 1000);
  const auto there = held.add("there", 1000);
  gone.reset();
  CHECK(held.budget.reclaim(7));
  CHECK(held.asked == "there7 ");
  const auto late = held.add("late", 1000);
  CHECK(held.budget.reclaim(2000));
  CHECK(held.asked.find("late") != std::string::npos);
  CHECK(held.asked.find("gone") == std::string::npos);
}

TEST_CASE("a holder may give buffers back to the budget that asks it", "[memory_budget]") {
  class BufferHolder final : public MemoryBudget::Holder {
  public:
    explicit BufferHolder(Buffers buffers) : buffers_(std::move(buffers)) {}
    std::size_t release_clean(std::size_t bytes) override {
      std::size_t given = 0;
      while (given < bytes && !buffers_.empty()) {
        given += buffers_.back()->bytes().size();
        buffers_.pop_back();
      }
      return given;
    }

    [[nodiscard]] bool writing() const override { return false; }
    [[nodiscard]] std::optional<Clock::time_point> oldest() const override { return std::nullopt; }
    void queue_oldest() override {}

  private:
    Buffers buffers_;
  };
  MemoryBudget budget(8 * page);
  const auto holder = std::make_shared<BufferHolder>(take_all(budget, page, 0));
  budget.add_holder(holder);
  CHECK(budget.try_take(2 * page, 0) == nullptr);
  CHECK(budget.reclaim(2 * page));
  CHECK(budget.used() == 6 * page);
  CHECK(budget.try_take(2 * page, 0) != nullptr);
}

TEST_CASE("threads that take and give back at the same time never exceed the limit",
          "[memory_budget]") {
  constexpr std::size_t limit = 16 * page;
  MemoryBudget budget(limit);
  std::atomic<int> excesses = 0;
  std::atomic<int> taken = 0;
  {
    constexpr unsigned threads = 4;
    std::latch all_there(threads);
    std::vector<std::jthread> workers;
    for (unsigned self = 0; self < threads; ++self) {
      workers.emplace_back([&, self] {
        all_there.arrive_and_wait();
        for (std::size_t round = 0; round < 1000; ++round) {
          const auto buffer = budget.try_take((1 + (round + self) % 8) * page, 0);
          if (buffer) {
            ++taken;
            std::memset(buffer->bytes().data(), static_cast<int>(self), buffer->bytes().size());
          }
          if (budget.used() > limit)
            ++excesses;
        }
      });
    }
  }
  CHECK(taken > 1000);
  CHECK(excesses == 0);
  CHECK(budget.used() == 0);
}

TEST_CASE("who needs memory presses itself first, then whoever holds the oldest data",
          "[memory_budget]") {
  Held held;
  const auto own = held.add("own", 0);
  const auto young = held.add("young", 0);
  const auto old = held.add("old", 0);

  CHECK_FALSE(held.budget.press(*own));
  const auto now = MemoryBudget::Holder::Clock::now();
  young->oldest_data = now;
  old->oldest_data = now - std::chrono::seconds(1);
  CHECK(held.budget.press(*own));
  CHECK(held.asked == "old queues ");
  own->oldest_data = now;
  CHECK(held.budget.press(*own));
  CHECK(held.asked == "old queues own queues ");
  own->oldest_data.reset();
  young->is_writing = true; // memory will come back without anybody's being asked
  CHECK(held.budget.press(*own));
  CHECK(held.asked == "old queues own queues ");
}

TEST_CASE("waiting for a change ends with a change", "[memory_budget]") {
  MemoryBudget budget(page);
  const std::uint64_t seen = budget.changes();
  std::thread changing([&] { budget.note_change(); });
  CHECK(budget.wait_for_change(seen, std::chrono::hours(1)));
  changing.join();
  CHECK_FALSE(budget.wait_for_change(budget.changes(), std::chrono::milliseconds(1)));
  CHECK(budget.changes() != seen);
  {
    const auto buffer = budget.try_take(page, 0);
    REQUIRE(buffer);
  }
  CHECK(budget.changes() != seen + 1); // a buffer came back
}

TEST_CASE("a lower limit takes effect as memory comes back, a higher one at once",
          "[memory_budget]") {
  MemoryBudget budget(4 * page);
  auto first = budget.try_take(2 * page, 0);
  REQUIRE(first);
  budget.set_limit(page);
  CHECK_FALSE(budget.try_take(page, 0));
  first.reset();
  CHECK(budget.try_take(page, 0));
  CHECK_FALSE(budget.try_take(2 * page, 0));
  budget.set_limit(8 * page);
  CHECK(budget.try_take(8 * page, 0));
}

TEST_CASE("those who need a share of the memory are counted", "[memory_budget]") {
  MemoryBudget budget(1024 * kibibyte);
  MemoryBudget::Account first(budget);
  CHECK(budget.sharers() == 0);
  {
    MemoryBudget::Account second(budget);
    budget.set_shares(first, true);
    budget.set_shares(second, true);
    CHECK(budget.sharers() == 2);
  }
  CHECK(budget.sharers() == 1);
  budget.set_shares(first, false);
  CHECK(budget.sharers() == 0);
}

TEST_CASE("a fair share is half of the memory for one, and leaves some for the next",
          "[memory_budget]") {
  MemoryBudget budget(8 * page);
  MemoryBudget::Account first(budget);
  MemoryBudget::Account second(budget);
  for (MemoryBudget::Account* account : {&first, &second})
    budget.answered(*account, true); // storage takes what it is given
  CHECK(budget.may_have(first, 8 * page));
  budget.add_unclean(first, 4 * page);
  CHECK_FALSE(budget.may_have(first, page));
  CHECK(budget.may_have(second, page));
  budget.add_unclean(first, -static_cast<std::ptrdiff_t>(page));
  CHECK(budget.may_have(first, page));
}

TEST_CASE("those whose storage takes nothing leave half of the memory to others, however many "
          "they are",
          "[memory_budget]") {
  MemoryBudget budget(64 * page);
  const int what = GENERATE(0, 1, 2);
  std::list<MemoryBudget::Account> such;
  std::size_t taken = 0;
  for (int i = 0; i < 50; ++i) {
    MemoryBudget::Account& account = such.emplace_back(budget);
    if (what == 1) {
      budget.write_began(account); // and hangs, from the first write on
    } else if (what == 2) {
      budget.write_began(account);
      budget.write_ended(account, false);
    }
    for (; budget.may_have(account, page); taken += page)
      budget.add_unclean(account, static_cast<std::ptrdiff_t>(page));
  }
  CHECK(taken <= 32 * page);
  CHECK(taken >= 16 * page);

  MemoryBudget::Account works(budget);
  budget.answered(works, true);
  CHECK(budget.may_have(works, 16 * page));
  such.clear();
  CHECK(budget.may_have(works, 64 * page));
}

TEST_CASE("storage that has not answered for long counts as such that takes nothing, until it does",
          "[memory_budget]") {
  MemoryBudget budget(8 * page);
  MemoryBudget::Account account(budget);
  budget.answered(account, true);
  budget.write_began(account);
  CHECK(budget.may_have(account, 8 * page));
  while (budget.may_have(account, 8 * page))
    std::this_thread::yield();
  CHECK(budget.may_have(account, 4 * page));
  budget.write_ended(account, true);
  CHECK(budget.may_have(account, 8 * page));
}
