#include "writeback.hpp"

#include <algorithm>
#include <chrono>
#include <new>

namespace qcowcache {

Writeback::~Writeback() {
  stop();
}

void Writeback::start(unsigned writers) {
  const std::lock_guard lock(mutex_);
  for (unsigned i = 0; i < writers; ++i) {
    const bool ticks = writers_.empty();
    writers_.emplace_back([this, ticks] { work(ticks); });
  }
}

void Writeback::stop() noexcept {
  std::vector<std::thread> writers;
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    writers.swap(writers_);
  }
  work_.notify_all();
  for (std::thread& writer : writers)
    writer.join();
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

void Writeback::wake(const std::shared_ptr<Source>& source) noexcept {
  try {
    const std::lock_guard lock(mutex_);
    make_ready(source);
  } catch (const std::bad_alloc&) {
    return;
  }
}

void Writeback::make_ready(const std::shared_ptr<Source>& source) {
  if (source->ready_ || std::ranges::find(sources_, source) == sources_.end())
    return;
  ready_.push_back(source);
  source->ready_ = true;
  work_.notify_one();
}

void Writeback::work(bool ticks) {
  std::unique_lock lock(mutex_);
  auto next_tick = std::chrono::steady_clock::now() + tick_interval;
  while (!stopping_) {
    if (ticks && std::chrono::steady_clock::now() >= next_tick) {
      lock.unlock();
      try {
        tick_all();
      } catch (const std::bad_alloc&) {
        // The next tick does what this one did not.
      }
      lock.lock();
      next_tick = std::chrono::steady_clock::now() + tick_interval;
    } else if (!ready_.empty()) {
      const std::shared_ptr<Source> source = std::move(ready_.front());
      ready_.pop_front();
      source->ready_ = false;
      lock.unlock();
      // One unit is this writer's; where more wait, others may begin with them meanwhile.
      try {
        if (source->waiting() > 1)
          wake(source);
        source->write_one();
        if (source->waiting() > 0)
          wake(source);
      } catch (const std::bad_alloc&) {
        // What waits still waits, and is found at the next tick.
      }
      lock.lock();
    } else if (ticks) {
      work_.wait_until(lock, next_tick);
    } else {
      work_.wait(lock);
    }
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
      wake(source);
  }
}

} // namespace qcowcache
