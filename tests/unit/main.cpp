// Version 2 of Catch2 compiles its own code into the file that asks for it; version 3 is a library.
#define CATCH_CONFIG_RUNNER
#include "catch.hpp"

// The thread sanitizer does not learn of the end of a mutex on the stack, for std::mutex has
// nothing to do then: where one test has a cache's and the next a budget's it finds that they are
// locked in either order. What the filter itself locks is watched in check-sanitized. Called by its
// runtime.
extern "C" const char* __tsan_default_suppressions(); // NOLINT: its name
extern "C" const char* __tsan_default_suppressions() {
  return "deadlock:C_A_T_C_H_T_E_S_T";
}

int main(int argc, char* argv[]) {
  return Catch::Session().run(argc, argv);
}
