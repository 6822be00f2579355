#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

namespace qcowcache {

/// The background writers: threads that write units of all caches, in turn, so that clients need
/// not wait for storage.
///
/// Storage may be slow, or hang. A writer that has been caught in one call for `slow` stays with
/// that source as long as there is something to write, and counts no more: another takes its place,
/// so that as many as were asked for go on with the other sources. No source ever has more of them
/// than that; and none waits longer than `patience` for its first.
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
    // Both are guarded by the mutex of the Writeback.
    bool ready_ = false; // in its `ready_`
    unsigned writers_ = 0;
  };

  static constexpr std::chrono::milliseconds tick_interval{250};
  static constexpr std::chrono::milliseconds slow{100};
  static constexpr std::chrono::milliseconds patience{20};

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
  /// more before they sleep: being called costs more processor time than a quick write.
  void wake(const std::shared_ptr<Source>& source, std::size_t waiting) noexcept;

private:
  using Clock = std::chrono::steady_clock;
  using Lock = std::unique_lock<std::mutex>;
  struct Writer {
    std::thread thread;
    /// Since when it has been with a source; nothing: it is not.
    std::optional<Clock::time_point> busy_since;
    /// For longer than `slow`.
    bool caught = false;
    bool ended = false;
  };

  // Functions that take a Lock need it held.
  void hire(const Lock&);
  void hire_one(const Lock&);
  void replace_caught(const Lock& lock, Clock::time_point now);
  [[nodiscard]] bool lacks_writers(const Lock&, const Source& source, Clock::time_point now) const;
  [[nodiscard]] std::size_t at_work(const Lock&) const;
  [[nodiscard]] std::shared_ptr<Source> take_ready(const Lock&);
  void work(Writer& self);
  bool serve(const std::shared_ptr<Source>& source);
  void tick_until_stopped();
  void bury_ended();
  void tick_all();

  const std::function<void()> on_tick_;
  std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable stop_;
  bool stopping_ = false;
  unsigned wanted_ = 0;
  /// Of those who are not caught.
  std::size_t awake_ = 0;
  std::vector<std::shared_ptr<Source>> sources_;
  /// Sources with something to do, each once, so that all get their turn.
  std::deque<std::shared_ptr<Source>> ready_;
  std::list<Writer> writers_;
  /// Writes nothing itself, so that no storage can stop the clock.
  std::thread ticker_;
};

} // namespace qcowcache
