#include "memory/memory_budget.hpp"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <utility>

namespace qcowcache {

void MemoryBudget::Buffer::Release::operator()(std::byte* memory) const noexcept {
  ::operator delete[](memory, std::align_val_t{page_size});
}

MemoryBudget::Buffer::Buffer(Buffer&& other) noexcept
    : budget_(std::exchange(other.budget_, nullptr)), memory_(std::move(other.memory_)),
      size_(other.size_), extra_(other.extra_) {}

MemoryBudget::Buffer::~Buffer() {
  if (budget_ != nullptr)
    budget_->give_back(std::move(memory_), size_, extra_);
}

std::size_t MemoryBudget::limit() const {
  const std::lock_guard lock(mutex_);
  return limit_;
}

void MemoryBudget::set_limit(std::size_t limit) {
  const std::lock_guard lock(mutex_);
  limit_ = limit;
  drop_kept_until(limit_);
  ++changes_;
  changed_.notify_all();
}

std::size_t MemoryBudget::excess() const {
  const std::lock_guard lock(mutex_);
  return used_ > limit_ ? used_ - limit_ : 0;
}

std::size_t MemoryBudget::used() const {
  const std::lock_guard lock(mutex_);
  return used_;
}

std::size_t MemoryBudget::peak() const {
  const std::lock_guard lock(mutex_);
  return peak_;
}

bool MemoryBudget::allows_two(std::size_t size, std::size_t extra) const {
  return limit() / 2 >= size + extra;
}

MemoryBudget::Account::Account(MemoryBudget& budget) : budget_(budget) {
  const std::lock_guard lock(budget_.mutex_);
  budget_.accounts_.push_back(this);
}

MemoryBudget::Account::~Account() {
  const std::lock_guard lock(budget_.mutex_);
  budget_.unclean_ -= unclean_;
  std::erase(budget_.accounts_, this);
}

void MemoryBudget::add_unclean(Account& account, std::ptrdiff_t bytes) noexcept {
  const std::lock_guard lock(mutex_);
  account.unclean_ += static_cast<std::size_t>(bytes);
  unclean_ += static_cast<std::size_t>(bytes);
}

void MemoryBudget::set_shares(Account& account, bool shares) noexcept {
  const std::lock_guard lock(mutex_);
  account.shares_ = shares;
}

std::size_t MemoryBudget::sharers() const {
  const std::lock_guard lock(mutex_);
  return static_cast<std::size_t>(
      std::ranges::count_if(accounts_, [](const Account* account) { return account->shares_; }));
}

void MemoryBudget::write_began(Account& account) noexcept {
  const std::lock_guard lock(mutex_);
  if (account.under_way_ == 0)
    account.since_ = Clock::now();
  ++account.under_way_;
}

void MemoryBudget::write_ended(Account& account, bool stored) noexcept {
  const std::lock_guard lock(mutex_);
  --account.under_way_;
  account.takes_writes_ = stored;
  account.since_ = Clock::now();
}

void MemoryBudget::answered(Account& account, bool stored) noexcept {
  const std::lock_guard lock(mutex_);
  account.takes_writes_ = stored;
  account.since_ = Clock::now();
}

bool MemoryBudget::may_have(const Account& account, std::size_t more) const {
  const std::lock_guard lock(mutex_);
  if (unclean_ + account.unclean_ + more > limit_)
    return false;
  const auto now = Clock::now();
  const auto does_its_work = [now](const Account& each) {
    return each.takes_writes_ && (each.under_way_ == 0 || now - each.since_ < slow);
  };
  if (does_its_work(account))
    return true;
  std::size_t of_all_such = 0;
  for (const Account* const each : accounts_)
    of_all_such += does_its_work(*each) ? 0 : each->unclean_;
  return of_all_such + account.unclean_ + more <= limit_ / 2;
}

std::shared_ptr<MemoryBudget::Buffer> MemoryBudget::try_take(std::size_t size, std::size_t extra) {
  Buffer::Memory memory;
  {
    const std::lock_guard lock(mutex_);
    if (used_ + size + extra > limit_)
      return nullptr;
    used_ += size + extra;
    peak_ = std::max(peak_, used_);
    const auto kept = kept_by_size_.find(size);
    if (kept != kept_by_size_.end() && !kept->second.empty()) {
      memory = std::move(kept->second.back());
      kept->second.pop_back();
      kept_ -= size;
    }
    drop_kept_until(limit_);
  }
  if (!memory) {
    try {
      memory.reset(static_cast<std::byte*>(::operator new[](size, std::align_val_t{page_size})));
    } catch (const std::bad_alloc&) {
      const std::lock_guard lock(mutex_);
      used_ -= size + extra;
      throw;
    }
  }
  // From here on the Buffer's destructor gives the charge back, whatever throws.
  Buffer buffer(*this, std::move(memory), size, extra);
  return std::make_shared<Buffer>(std::move(buffer));
}

void MemoryBudget::give_back(Buffer::Memory memory, std::size_t size, std::size_t extra) noexcept {
  const std::lock_guard lock(mutex_);
  used_ -= size + extra;
  ++changes_;
  changed_.notify_all();
  if (used_ + kept_ + size > limit_)
    return;
  try {
    kept_by_size_[size].push_back(std::move(memory));
    kept_ += size;
  } catch (const std::bad_alloc&) {
    // Not kept, but freed: nothing depends on its being kept.
  }
}

void MemoryBudget::drop_kept_until(std::size_t wanted) noexcept {
  for (auto& [size, kept] : kept_by_size_) {
    while (used_ + kept_ > wanted && !kept.empty()) {
      kept.pop_back();
      kept_ -= size;
    }
  }
}

void MemoryBudget::add_holder(const std::shared_ptr<Holder>& holder) {
  const std::lock_guard lock(mutex_);
  std::erase_if(holders_, [](const std::weak_ptr<Holder>& known) { return known.expired(); });
  holders_.push_back(holder);
}

std::vector<std::shared_ptr<MemoryBudget::Holder>> MemoryBudget::holders() const {
  const std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<Holder>> living;
  living.reserve(holders_.size());
  for (const std::weak_ptr<Holder>& known : holders_) {
    if (std::shared_ptr<Holder> holder = known.lock())
      living.push_back(std::move(holder));
  }
  return living;
}

bool MemoryBudget::reclaim(std::size_t bytes) {
  std::size_t given = 0;
  for (const std::shared_ptr<Holder>& holder : holders()) {
    if (given < bytes)
      given += holder->release_clean(bytes - given);
  }
  const std::lock_guard lock(mutex_);
  if (!holders_.empty()) // the next one that needs memory begins with another holder
    std::rotate(holders_.begin(), holders_.begin() + 1, holders_.end());
  return given > 0;
}

bool MemoryBudget::press(Holder& own) {
  if (own.writing())
    return true;
  if (own.oldest()) {
    own.queue_oldest();
    return true;
  }
  std::shared_ptr<Holder> oldest;
  std::optional<Holder::Clock::time_point> since;
  for (const std::shared_ptr<Holder>& holder : holders()) {
    if (holder->writing())
      return true;
    const std::optional<Holder::Clock::time_point> unused_since = holder->oldest();
    if (unused_since && (!since || *unused_since < *since)) {
      since = unused_since;
      oldest = holder;
    }
  }
  if (!oldest)
    return false;
  oldest->queue_oldest();
  return true;
}

std::uint64_t MemoryBudget::changes() const {
  const std::lock_guard lock(mutex_);
  return changes_;
}

void MemoryBudget::note_change() noexcept {
  const std::lock_guard lock(mutex_);
  ++changes_;
  changed_.notify_all();
}

bool MemoryBudget::wait_for_change(std::uint64_t seen, std::chrono::milliseconds longest) const {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, longest, [&] { return changes_ != seen; });
}

} // namespace qcowcache
