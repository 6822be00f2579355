#include "counted_memory.hpp"

#include "catch.hpp"

#include <new>
#include <tuple>
#include <vector>

using qcowcache::CountedMemory;
using qcowcache::MemoryBudget;

TEST_CASE("memory for containers counts in the budget, and comes back", "[counted_memory]") {
  MemoryBudget budget(1U << 20U);
  CountedMemory memory(budget, 4);
  {
    std::pmr::vector<int> numbers(1000, &memory);
    CHECK(budget.used() >= 4000);
    CHECK(budget.used() >= memory.used());
  }
  CHECK(budget.used() == 0);
  CHECK(memory.used() == 0);
}

TEST_CASE("no more than its share can be had", "[counted_memory]") {
  MemoryBudget budget(1U << 20U);
  CountedMemory memory(budget, 4);
  std::vector<void*> pieces;
  for (;;) {
    try {
      pieces.push_back(memory.allocate(10000, 16));
    } catch (const std::bad_alloc&) {
      break;
    }
  }
  CHECK(pieces.size() > 10);
  CHECK(budget.used() <= (1U << 20U) / 4);
  for (void* piece : pieces)
    memory.deallocate(piece, 10000, 16);
  CHECK(budget.used() == 0);
}

TEST_CASE("where the budget is used up nothing can be had", "[counted_memory]") {
  MemoryBudget budget(100000);
  CountedMemory memory(budget, 2);
  const auto taken = budget.try_take(98304, 0);
  REQUIRE(taken);
  CHECK_THROWS_AS(std::pmr::vector<int>(10, &memory), std::bad_alloc);
  budget.set_limit(0);
  CHECK_THROWS_AS(std::pmr::vector<int>(10, &memory), std::bad_alloc);
}

TEST_CASE("what could be had is what an empty one hands out", "[counted_memory]") {
  MemoryBudget budget(1U << 20U);
  CountedMemory memory(budget, 4);
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
