#pragma once

#include <functional>
#include <system_error>

/// The errno that `work` fails with, as std::system_error; 0 where it succeeds.
inline int error_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const std::system_error& error) {
    return error.code().value();
  }
  return 0;
}
