#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

/// Ends the process when what it watches does not come to an end, and says what that was: a hang
/// has to be as easy to repeat as a failure. Only a failing test waits as long.
class Watchdog {
public:
  explicit Watchdog(std::string name)
      : name_(std::move(name)), thread_([this](const std::stop_token& stop) { wait(stop); }) {}

  /// Watches the next piece of work, of which `describe` tells.
  void watch(const std::function<std::string()>& describe) {
    const std::lock_guard lock(mutex_);
    description_ = describe();
    ++pieces_;
    next_.notify_all();
  }

private:
  static constexpr std::chrono::minutes patience{5};

  void wait(const std::stop_token& stop) {
    std::unique_lock lock(mutex_);
    while (!stop.stop_requested()) {
      const std::uint64_t seen = pieces_;
      if (!next_.wait_for(lock, stop, patience, [&] { return pieces_ != seen; }) &&
          !stop.stop_requested()) {
        std::fprintf(stderr, "%s: %s\n", name_.c_str(), description_.c_str());
        std::abort();
      }
    }
  }

  const std::string name_;
  std::mutex mutex_;
  std::condition_variable_any next_;
  std::string description_;
  std::uint64_t pieces_ = 0;
  std::jthread thread_;
};
