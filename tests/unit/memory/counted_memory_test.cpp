#include "memory/counted_memory.hpp"

#include "catch.hpp"

#include <memory>
#include <new>
#include <tuple>
#include <vector>

using qcowcache::CountedMemory;
using qcowcache::MemoryBudget;
using qcowcache::MemoryShare;

namespace {

/// Takes pieces until there are no more.
class Greedy {
public:
  Greedy(MemoryBudget& budget, const std::shared_ptr<MemoryShare>& share)
      : memory_(budget, share) {}
  Greedy(const Greedy&) = delete;
  Greedy& operator=(const Greedy&) = delete;
  ~Greedy() { give_up(0); }

  std::size_t take_all() {
    try {
      for (;;)
        pieces_.push_back(memory_.allocate(size, 16));
    } catch (const std::bad_alloc&) {
      return pieces() * size;
    }
  }
  void give_up(std::size_t remaining) {
    while (pieces_.size() > remaining) {
      memory_.deallocate(pieces_.back(), size, 16);
      pieces_.pop_back();
    }
  }
  void give_up_too_much() {
    while (memory_.too_much())
      give_up(pieces_.size() - 1);
  }
  [[nodiscard]] std::size_t used() const { return pieces() * size; }
  [[nodiscard]] std::size_t pieces() const { return pieces_.size(); }

private:
  static constexpr std::size_t size = 10000;

  CountedMemory memory_;
  std::vector<void*> pieces_;
};

} // namespace

TEST_CASE("memory for containers counts in the budget, and comes back", "[counted_memory]") {
  MemoryBudget budget(1U << 20U);
  CountedMemory memory(budget, std::make_shared<MemoryShare>(4));
  {
    std::pmr::vector<int> numbers(1000, &memory);
    CHECK(budget.used() >= 4000);
  }
  CHECK(budget.used() == 0);
}

TEST_CASE("no more than its share can be had", "[counted_memory]") {
  MemoryBudget budget(1U << 20U);
  {
    Greedy alone(budget, std::make_shared<MemoryShare>(4));
    alone.take_all();
    CHECK(alone.pieces() > 8);
    CHECK(budget.used() <= (1U << 20U) / 4);
  }
  CHECK(budget.used() == 0);
}

TEST_CASE("all together have one share, and whoever comes last finds some of it",
          "[counted_memory]") {
  constexpr std::size_t size = std::size_t{64} << 20U;
  MemoryBudget budget(size);
  const auto share = std::make_shared<MemoryShare>(8);
  std::vector<std::unique_ptr<Greedy>> all;
  for (unsigned i = 0; i < 12; ++i) {
    all.push_back(std::make_unique<Greedy>(budget, share));
    CHECK(all.back()->take_all() > 0);
    CHECK(budget.used() <= size / 8);
    if (i == 0)
      CHECK(all.front()->used() > size / 8 / 3);
    // Those who have more than the others give it back, as they are told.
    for (unsigned round = 0; round < 20; ++round) {
      for (const auto& each : all) {
        each->give_up_too_much();
        each->take_all();
        CHECK(budget.used() <= size / 8);
      }
    }
  }
  for (const auto& each : all) {
    CHECK(each->used() < all.front()->used() * 5 / 4);
    CHECK(each->used() > all.front()->used() * 3 / 4);
    CHECK(each->used() > size / 8 / 20);
  }
  all.clear();
  CHECK(share->taken() == 0);
  CHECK(budget.used() == 0);
}

TEST_CASE("what could not be had altogether is not held for nothing", "[counted_memory]") {
  MemoryBudget budget(1U << 20U);
  const auto share = std::make_shared<MemoryShare>(4);
  CountedMemory memory(budget, share);
  CHECK_THROWS_AS(std::ignore = memory.allocate(1U << 19U, 16), std::bad_alloc);
  CHECK(share->taken() == 0);
  CHECK(budget.used() == 0);
}

TEST_CASE("where the budget is used up nothing can be had", "[counted_memory]") {
  MemoryBudget budget(100000);
  const auto share = std::make_shared<MemoryShare>(2);
  CountedMemory memory(budget, share);
  const auto taken = budget.try_take(98304, 0);
  REQUIRE(taken);
  CHECK_THROWS_AS(std::pmr::vector<int>(10, &memory), std::bad_alloc);
  CHECK(share->taken() == 0);
  budget.set_limit(0);
  CHECK_THROWS_AS(std::pmr::vector<int>(10, &memory), std::bad_alloc);
}

TEST_CASE("what could be had is what an empty one hands out", "[counted_memory]") {
  MemoryBudget budget(1U << 20U);
  const auto share = std::make_shared<MemoryShare>(2);
  CountedMemory memory(budget, share);
  CountedMemory others(budget, share);
  const std::pmr::vector<char> theirs(GENERATE(1U, 100000U), &others);
  std::size_t most = 0;
  while (memory.could_have(most + 1))
    ++most;
  CHECK(most > 100000);
  memory.deallocate(memory.allocate(most, 16), most, 16);
  CHECK_THROWS_AS(std::ignore = memory.allocate(most + 1, 16), std::bad_alloc);
  const std::pmr::vector<char> other(most / 2, &memory);
  CHECK(memory.could_have(most));
  CHECK_FALSE(memory.could_have(most + 1));
}
