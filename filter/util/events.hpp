#pragma once

#include <functional>
#include <new>
#include <string>
#include <utility>

namespace qcowcache {

/// Who follows what goes on inside. Each listener gets one line at a time; an empty one costs
/// nothing but a look at it. They are called from any thread, with mutexes held: a listener must
/// not call back, nor throw.
struct Events {
  using Listener = std::function<void(const std::string& line)>;

  /// What was decided and why: few lines for each connection, flush or change.
  Listener decision;
  /// Every write absorbed, written out or through, and every fill-up read.
  Listener trace;

  /// The same listeners, whose lines begin with `subject`.
  [[nodiscard]] Events about(const std::string& subject) const {
    Events prefixed;
    if (decision) {
      prefixed.decision = [listener = decision, subject](const std::string& line) {
        listener(subject + line);
      };
    }
    if (trace) {
      prefixed.trace = [listener = trace, subject](const std::string& line) {
        listener(subject + line);
      };
    }
    return prefixed;
  }
};

/// Gives the line that `make_line` returns to the listener, if there is one. What goes on does not
/// depend on whether there is memory to tell of it.
template <typename MakeLine>
void tell(const Events::Listener& listener, MakeLine make_line) noexcept {
  if (!listener)
    return;
  try {
    listener(make_line());
  } catch (const std::bad_alloc&) {
    return;
  }
}

} // namespace qcowcache
