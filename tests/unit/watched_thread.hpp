#pragma once

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <fstream>
#include <future>
#include <string>
#include <thread>
#include <utility>

/// A thread of which a test can tell that it waits, or that it has ended, without guessing how long
/// that takes. Joined on destruction.
class WatchedThread {
public:
  template <typename Function>
  explicit WatchedThread(Function work)
      : thread_([this, work = std::move(work)]() mutable {
          id_ = gettid();
          work();
          finished_.set_value();
        }) {}

  /// Waits until the thread sleeps, and returns whether it ever does. REQUIRES: what it does before
  /// it is to wait never sleeps.
  [[nodiscard]] bool waits() {
    // Once may be a moment in a mutex that another thread is just leaving.
    constexpr int often = 20;
    int times_asleep = 0;
    const auto give_up = std::chrono::steady_clock::now() + patience;
    while (times_asleep < often && std::chrono::steady_clock::now() < give_up) {
      if (ended_.wait_for(std::chrono::seconds(0)) == std::future_status::ready)
        return false;
      times_asleep = asleep() ? times_asleep + 1 : 0;
      std::this_thread::yield();
    }
    return times_asleep == often;
  }

  /// Waits until the work is done.
  [[nodiscard]] bool ends() { return ended_.wait_for(patience) == std::future_status::ready; }

private:
  /// Only a failing test waits as long as this.
  static constexpr std::chrono::seconds patience{20};

  /// As the kernel says: the letter behind the name, which stands in parentheses.
  [[nodiscard]] bool asleep() const {
    std::ifstream file("/proc/self/task/" + std::to_string(id_.load()) + "/stat");
    std::string line;
    std::getline(file, line);
    const std::size_t name_end = line.rfind(") ");
    return name_end != std::string::npos && line.substr(name_end + 2, 1) == "S";
  }

  std::atomic<pid_t> id_ = 0;
  std::promise<void> finished_;
  std::future<void> ended_ = finished_.get_future();
  std::jthread thread_;
};
