#include "memory/writeback.hpp"

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
void Writeback::hire_one(const Lock& /*lock*/) {
  Writer& writer = writers_.emplace_back();
  try {
    writer.thread = std::thread([this, &writer] { work(writer); });
  } catch (...) {
    writers_.pop_back();
    throw;
  }
}

void Writeback::hire(const Lock& lock) {
  for (std::size_t there = at_work(lock); there < wanted_; ++there)
    hire_one(lock);
}

/// Those who are caught from now on are replaced.
void Writeback::replace_caught(const Lock& lock, Clock::time_point now) {
  for (Writer& writer : writers_) {
    if (!writer.caught && writer.busy_since && now - *writer.busy_since >= slow) {
      writer.caught = true;
      --awake_;
    }
  }
  hire(lock);
}

/// Whether it waits for its first writer while all are busy with others, none of whom has only just
/// begun.
bool Writeback::lacks_writers(const Lock& /*lock*/, const Source& source,
                              Clock::time_point now) const {
  return source.ready_ && source.writers_ == 0 &&
         std::ranges::all_of(writers_, [&](const Writer& writer) {
           return writer.ended || (writer.busy_since && now - *writer.busy_since >= patience);
         });
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
    if (!stopping_ && wanted_ > 0 && awake_ >= wanted_) {
      const Clock::time_point now = Clock::now();
      if (lacks_writers(lock, *source, now)) {
        replace_caught(lock, now);
        if (lacks_writers(lock, *source, now))
          hire_one(lock);
      }
    }
    lock.unlock(); // the one who is called would only run into it
    if (call)
      work_.notify_one();
  } catch (const std::bad_alloc&) {
    return;
  } catch (const std::system_error&) {
    return; // no thread more for now
  }
}

/// The source whose turn it is among those that may have another writer; nullptr: none.
std::shared_ptr<Writeback::Source> Writeback::take_ready(const Lock& /*lock*/) {
  // Of those that have fewest the one that waits longest.
  const auto found =
      std::ranges::min_element(ready_, {}, [](const auto& source) { return source->writers_; });
  if (found == ready_.end() || (*found)->writers_ >= wanted_)
    return nullptr;
  std::shared_ptr<Source> source = std::move(*found);
  ready_.erase(found);
  source->ready_ = false;
  return source;
}

void Writeback::work(Writer& self) {
  Lock lock(mutex_);
  ++awake_;
  // Who is one more than wanted was hired for a source that had nobody: it goes when that is done.
  bool goes = false;
  while (!stopping_ && !goes) {
    const std::shared_ptr<Source> source = take_ready(lock);
    if (!source && at_work(lock) > wanted_) {
      goes = true;
    } else if (!source) {
      --awake_;
      work_.wait(lock);
      ++awake_;
    } else {
      ++source->writers_;
      bool stays = true;
      while (stays) {
        self.busy_since = Clock::now();
        lock.unlock();
        const bool waits = serve(source);
        lock.lock();
        stays = waits && self.caught && !stopping_;
      }
      self.busy_since.reset();
      awake_ += self.caught ? 1 : 0;
      self.caught = false;
      // Where it has as many writers as it may have it was left to them to go on.
      if (source->writers_-- == wanted_ && !ready_.empty())
        work_.notify_one();
      goes = at_work(lock) > wanted_;
    }
  }
  --awake_;
  self.ended = true;
}

/// Returns whether more waits there.
bool Writeback::serve(const std::shared_ptr<Source>& source) {
  // One unit is this writer's; where more wait, others may begin with them meanwhile.
  try {
    if (const std::size_t waiting = source->waiting(); waiting > 1)
      wake(source, waiting);
    source->write_one();
    const std::size_t waiting = source->waiting();
    if (waiting > 0)
      wake(source, waiting);
    return waiting > 0;
  } catch (const std::bad_alloc&) {
    return false; // what waits still waits, and is found at the next tick
  }
}

void Writeback::tick_until_stopped() {
  std::unique_lock lock(mutex_);
  while (!stop_.wait_for(lock, tick_interval, [this] { return stopping_; })) {
    lock.unlock();
    try {
      bury_ended();
      tick_all();
    } catch (const std::system_error&) {
      // No thread more for now: the next tick tries again.
    } catch (const std::bad_alloc&) {
      // The next tick does what this one did not.
    }
    lock.lock();
  }
}

void Writeback::bury_ended() {
  std::list<Writer> ended;
  {
    const Lock lock(mutex_);
    for (auto writer = writers_.begin(); writer != writers_.end();) {
      const auto next = std::next(writer);
      if (writer->ended)
        ended.splice(ended.end(), writers_, writer);
      writer = next;
    }
    if (!stopping_)
      replace_caught(lock, Clock::now());
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
