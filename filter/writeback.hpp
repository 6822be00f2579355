#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace qcowcache {

/// The background writers: threads that write units of all caches, in turn, so that clients need
/// not wait for storage.
///
/// Thread safe. Calls sources with no mutex held; `wake` may be called under a cache's mutex.
class Writeback {
public:
  /// A cache, and the way to its storage.
  class Source {
  public:
    Source(const Source&) = delete;
    Source& operator=(const Source&) = delete;
    virtual ~Source() = default;

    /// Writes, or gives up on, the unit that waits longest. Called by several writers at once.
    /// Does not throw for what storage refuses.
    virtual void write_one() = 0;
    /// How many units wait.
    [[nodiscard]] virtual std::size_t waiting() const = 0;
    /// Called every `tick_interval`: queues what has been left behind.
    virtual void tick() = 0;

  protected:
    Source() = default;

  private:
    friend class Writeback;
    bool ready_ = false; // in `ready_` of the Writeback, whose mutex guards this
  };

  static constexpr std::chrono::milliseconds tick_interval{250};

  /// `on_tick`, if any, is called before the sources' ticks.
  explicit Writeback(std::function<void()> on_tick = {}) : on_tick_(std::move(on_tick)) {}
  Writeback(const Writeback&) = delete;
  Writeback& operator=(const Writeback&) = delete;
  /// As `stop`.
  ~Writeback();

  /// Starts this many writers. Throws std::system_error; those already started then run.
  void start(unsigned writers);
  /// Ends the writers after the unit that each is writing. What waits stays where it is.
  void stop() noexcept;

  void add(const std::shared_ptr<Source>& source);
  void remove(const std::shared_ptr<Source>& source) noexcept;
  /// `waiting` units wait at `source`. Ignored when the source was not added, or is removed.
  /// Without memory to note it the next tick finds it.
  ///
  /// A sleeping writer is only called when more waits than writers are awake, for those look for
  /// more before they sleep: being called costs more processor time than a quick write. Should one
  /// of them be caught in storage that hangs, the next tick calls another.
  void wake(const std::shared_ptr<Source>& source, std::size_t waiting) noexcept;

private:
  void work();
  void tick_until_stopped();
  void tick_all();

  const std::function<void()> on_tick_;
  std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable stop_;
  bool stopping_ = false;
  std::size_t awake_ = 0;
  std::vector<std::shared_ptr<Source>> sources_;
  /// Sources with something to do, each once, so that all get their turn.
  std::deque<std::shared_ptr<Source>> ready_;
  std::vector<std::thread> writers_;
  /// Writes nothing itself, so that no storage can stop the clock.
  std::thread ticker_;
};

} // namespace qcowcache
