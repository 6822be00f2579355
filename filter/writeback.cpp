#include "writeback.hpp"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <new>
#include <system_error>
#include <utility>

namespace qcowcache {

Writeback::~Writeback() {
  stop();
}

void Writeback::start(unsigned writers) {
  if (writers == 0)
    return;
  const Lock lock(mutex_);
  wanted_ = writers;
  hire(lock);
  ticker_ = std::thread([this] { tick_until_stopped(); });
}

void Writeback::stop() noexcept {
  {
    const Lock lock(mutex_);
    stopping_ = true;
  }
  work_.notify_all();
  stop_.notify_all();
  // From here on nobody is hired: the list stays as it is.
  if (ticker_.joinable())
    ticker_.join();
  for (Writer& writer : writers_)
    writer.thread.join();
  writers_.clear();
}

std::size_t Writeback::at_work(const Lock& /*lock*/) const {
  return static_cast<std::size_t>(std::ranges::count_if(
      writers_, [](const Writer& writer) { return !writer.caught && !writer.ended; }));
}

/// Throws std::system_error.
void Writeback::hire(const Lock& lock) {
  for (std::size_t there = at_work(lock); there < wanted_; ++there) {
    Writer& writer = writers_.emplace_back();
    try {
      writer.thread = std::thread([this, &writer] { work(writer); });
    } catch (...) {
      writers_.pop_back();
      throw;
    }
  }
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

/// The source whose turn it is among those that may have another writer; nullptr: none.
std::shared_ptr<Writeback::Source> Writeback::take_ready(const Lock& /*lock*/) {
  const auto found = std::ranges::find_if(
      ready_, [this](const auto& source) { return source->writers_ < wanted_; });
  if (found == ready_.end())
    return nullptr;
  std::shared_ptr<Source> source = std::move(*found);
  ready_.erase(found);
  source->ready_ = false;
  return source;
}

void Writeback::work(Writer& self) {
  Lock lock(mutex_);
  ++awake_;
  while (!stopping_ && at_work(lock) <= wanted_) {
    const std::shared_ptr<Source> source = take_ready(lock);
    if (!source) {
      --awake_;
      work_.wait(lock);
      ++awake_;
    } else {
      ++source->writers_;
      self.busy_since = Clock::now();
      lock.unlock();
      serve(source);
      lock.lock();
      self.busy_since.reset();
      awake_ += self.caught ? 1 : 0;
      self.caught = false;
      // Where it has as many writers as it may have it was left to them to go on.
      if (source->writers_-- == wanted_ && !ready_.empty())
        work_.notify_one();
    }
  }
  --awake_;
  self.ended = true;
}

void Writeback::serve(const std::shared_ptr<Source>& source) {
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
}

void Writeback::tick_until_stopped() {
  std::unique_lock lock(mutex_);
  while (!stop_.wait_for(lock, tick_interval, [this] { return stopping_; })) {
    lock.unlock();
    try {
      replace_caught();
      tick_all();
    } catch (const std::system_error&) {
      // No thread more for now: the next tick tries again.
    } catch (const std::bad_alloc&) {
      // The next tick does what this one did not.
    }
    lock.lock();
  }
}

void Writeback::replace_caught() {
  std::list<Writer> ended;
  {
    const Lock lock(mutex_);
    const Clock::time_point now = Clock::now();
    for (auto writer = writers_.begin(); writer != writers_.end();) {
      const auto next = std::next(writer);
      if (writer->ended) {
        ended.splice(ended.end(), writers_, writer);
      } else if (!writer->caught && writer->busy_since && now - *writer->busy_since >= slow) {
        writer->caught = true;
        --awake_;
      }
      writer = next;
    }
    if (!stopping_)
      hire(lock);
  }
  for (Writer& writer : ended)
    writer.thread.join();
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
