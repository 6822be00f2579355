// Version 2 of Catch2 compiles its own code into the file that asks for it; version 3 is a library.
#define CATCH_CONFIG_RUNNER
#include "catch.hpp"

int main(int argc, char* argv[]) {
  return Catch::Session().run(argc, argv);
}
