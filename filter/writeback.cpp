#include "writeback.hpp"

#include <algorithm>
#include <cstdint>
#include <new>

namespace qcowcache {

Writeback::~Writeback() {
  stop();
}

void Writeback::start(unsigned writers) {
  if (writers == 0)
    return;
  const std::lock_guard lock(mutex_);
  for (unsigned i = 0; i < writers; ++i)
    writers_.emplace_back([this] { work(); });
  ticker_ = std::thread([this] { tick_until_stopped(); });
}

void Writeback::stop() noexcept {
  std::vector<std::thread> threads;
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    threads.swap(writers_);
  }
  work_.notify_all();
  stop_.notify_all();
  for (std::thread& writer : threads)
    writer.join();
  if (ticker_.joinable())
    ticker_.join();
}

void Writeback::add(const std::shared_ptr<Source>& source) {
  const std::lock_guard lock(mutex_);
  sources_.push_back(source);
}

void Writeback::remove(const std::shared_ptr<Source>& source) noexcept {
  const std::lock_guard lock(mutex_);
  std::erase(sources_, source);
  std::erase(ready_, source);
}

void Writeback::wake(const std::shared_ptr<Source>& source, std::size_t waiting) noexcept {
  try {
    std::unique_lock lock(mutex_);
    if (!source->ready_ && std::ranges::find(sources_, source) != sources_.end()) {
      ready_.push_back(source);
      source->ready_ = true;
    }
    const bool call = source->ready_ && waiting > awake_;
    lock.unlock(); // the one who is called would only run into it
    if (call)
      work_.notify_one();
  } catch (const std::bad_alloc&) {
    return;
  }
}

void Writeback::work() {
  std::unique_lock lock(mutex_);
  ++awake_;
  while (!stopping_) {
    if (ready_.empty()) {
      --awake_;
      work_.wait(lock);
      ++awake_;
    } else {
      const std::shared_ptr<Source> source = std::move(ready_.front());
      ready_.pop_front();
      source->ready_ = false;
      lock.unlock();
      // One unit is this writer's; where more wait, others may begin with them meanwhile.
      try {
        if (const std::size_t waiting = source->waiting(); waiting > 1)
          wake(source, waiting);
        source->write_one();
        if (const std::size_t waiting = source->waiting(); waiting > 0)
          wake(source, waiting);
      } catch (const std::bad_alloc&) {
        // What waits still waits, and is found at the next tick.
      }
      lock.lock();
    }
  }
}

void Writeback::tick_until_stopped() {
  std::unique_lock lock(mutex_);
  while (!stop_.wait_for(lock, tick_interval, [this] { return stopping_; })) {
    lock.unlock();
    try {
      tick_all();
    } catch (const std::bad_alloc&) {
      // The next tick does what this one did not.
    }
    lock.lock();
  }
}

void Writeback::tick_all() {
  if (on_tick_)
    on_tick_();
  std::vector<std::shared_ptr<Source>> sources;
  {
    const std::lock_guard lock(mutex_);
    sources = sources_;
  }
  for (const std::shared_ptr<Source>& source : sources) {
    source->tick();
    if (source->waiting() > 0)
      wake(source, SIZE_MAX);
  }
}

} // namespace qcowcache
