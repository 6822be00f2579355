# QCOWCACHE_CXX20
# Adds -std=c++20 to CXX and tries what older compilers lack, with their standard library.
AC_DEFUN([QCOWCACHE_CXX20],
[CXX="$CXX -std=c++20"
AC_MSG_CHECKING([whether $CXX is recent enough])
AC_LINK_IFELSE([AC_LANG_PROGRAM([[
#if defined __clang__
#if __clang_major__ < 14
#error "clang is too old"
#endif
#elif defined __GNUC__ && __GNUC__ < 12
#error "g++ is too old"
#endif
#include <bit>
#include <compare>
#include <concepts>
#include <cstddef>
#include <span>
#include <thread>
struct Range {
  unsigned long offset;
  unsigned long count;
  auto operator<=>(const Range &) const = default;
};
template <std::unsigned_integral T> constexpr T ceiling(T x) { return std::bit_ceil(x); }
static_assert(ceiling(5U) == 8U);
]], [[
  constexpr Range a{.offset = 1, .count = 2};
  static_assert(a == Range{1, 2});
  std::byte bytes[4]{};
  std::jthread thread{[&] { bytes[0] = std::span{bytes}.back(); }};
]])],
  [AC_MSG_RESULT([yes])],
  [AC_MSG_RESULT([no])
  QCOWCACHE_MISSING([a compiler for C++20 (g++ 12, clang++ 14, or later)], [g++], [gcc-c++])])])

# QCOWCACHE_OPTIMISATION
# Comes before the compiler. The tests take half as long to compile with -O1 and no debugging
# information. CXXFLAGS, where a user has set them, say it for all.
AC_DEFUN([QCOWCACHE_OPTIMISATION],
[AS_IF([test "${CXXFLAGS+set}"],
  [FILTER_OPTIMISATION=
  TEST_OPTIMISATION=],
  [: "${FILTER_OPTIMISATION=-g -O2}"
  TEST_OPTIMISATION=-O1
  CXXFLAGS=])
AC_ARG_VAR([FILTER_OPTIMISATION], [how the filter is compiled where CXXFLAGS do not say (-g -O2)])
AC_SUBST([TEST_OPTIMISATION])])

# QCOWCACHE_PRECOMPILED
# How the file has to be named that the compiler finds in the place of a header. g++ takes what was
# precompiled for our own code, so that its warnings about the library must not be errors there:
# clang++ sees to the tests' own.
AC_DEFUN([QCOWCACHE_PRECOMPILED],
[AC_COMPILE_IFELSE([AC_LANG_PROGRAM([[
#ifndef __clang__
#error "not clang"
#endif
]])], [PRECOMPILED_SUFFIX=pch
  PRECOMPILED_CXXFLAGS=], [PRECOMPILED_SUFFIX=gch
  PRECOMPILED_CXXFLAGS=-Wno-error])
AC_SUBST([PRECOMPILED_SUFFIX])
AC_SUBST([PRECOMPILED_CXXFLAGS])])

# QCOWCACHE_WARNINGS
# In AM_CXXFLAGS and not in CXXFLAGS, which is the user's.
AC_DEFUN([QCOWCACHE_WARNINGS],
[WARNING_CXXFLAGS="-Wall -Wextra -Wpedantic -Wconversion -Wshadow"
AC_ARG_ENABLE([werror],
  [AS_HELP_STRING([--enable-werror], [treat warnings as errors])])
AS_VAR_IF([enable_werror], [yes], [WARNING_CXXFLAGS="$WARNING_CXXFLAGS -Werror"])
AC_SUBST([WARNING_CXXFLAGS])])

# QCOWCACHE_FUZZING
# Adds to the sanitizers what libFuzzer steers by, so it comes before QCOWCACHE_SANITIZERS.
AC_DEFUN([QCOWCACHE_FUZZING],
[AC_ARG_ENABLE([fuzzing],
  [AS_HELP_STRING([--enable-fuzzing],
    [build for libFuzzer, with the sanitizers address,undefined unless others are named (clang++ only)])],
  [], [enable_fuzzing=no])
FUZZER_LDFLAGS=
AS_CASE([$enable_fuzzing],
  [no], [],
  [yes], [FUZZER_LDFLAGS=-fsanitize=fuzzer
  AC_MSG_CHECKING([whether $CXX has libFuzzer])
  qcowcache_saved_CXXFLAGS=$CXXFLAGS
  CXXFLAGS="$CXXFLAGS $FUZZER_LDFLAGS"
  AC_LINK_IFELSE([AC_LANG_SOURCE([[
#include <cstddef>
#include <cstdint>
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *, std::size_t) { return 0; }
]])],
    [AC_MSG_RESULT([yes])],
    [AC_MSG_RESULT([no])
    AC_MSG_ERROR([--enable-fuzzing needs libFuzzer, which $CXX lacks: configure with CC=clang CXX=clang++; apt-get install clang (Debian), dnf install clang compiler-rt (Fedora)])])
  CXXFLAGS=$qcowcache_saved_CXXFLAGS
  AS_CASE([${enable_sanitizers:-yes}],
    [yes], [enable_sanitizers=fuzzer-no-link,address,undefined],
    [no], [enable_sanitizers=fuzzer-no-link],
    [enable_sanitizers=fuzzer-no-link,$enable_sanitizers])],
  [AC_MSG_ERROR([--enable-fuzzing=$enable_fuzzing: takes no value])])
AC_SUBST([FUZZER_LDFLAGS])
AM_CONDITIONAL([FUZZING], [test "x$enable_fuzzing" = xyes])])

# QCOWCACHE_SANITIZER_RUNTIME
# nbdkit is built without sanitizers, so its tests preload what it takes. clang's runtime is not a
# library of its own by default.
AC_DEFUN([QCOWCACHE_SANITIZER_RUNTIME],
[AC_MSG_CHECKING([for a runtime of the sanitizers that nbdkit can preload])
SANITIZER_RUNTIME=
AC_COMPILE_IFELSE([AC_LANG_PROGRAM([[
#ifdef __clang__
#error "it has another runtime"
#endif
]])],
  [for qcowcache_sanitizer in `AS_ECHO([$enable_sanitizers]) | tr , ' '`; do
    AS_CASE([$qcowcache_sanitizer],
      [address], [qcowcache_runtime=libasan.so],
      [leak], [qcowcache_runtime=liblsan.so],
      [thread], [qcowcache_runtime=libtsan.so],
      [qcowcache_runtime=libubsan.so])
    qcowcache_file=`$CXX -print-file-name=$qcowcache_runtime`
    AS_CASE([$qcowcache_runtime],
      [libubsan.so], [SANITIZER_RUNTIME=${SANITIZER_RUNTIME:+$SANITIZER_RUNTIME:}$qcowcache_file],
      [SANITIZER_RUNTIME=$qcowcache_file${SANITIZER_RUNTIME:+:$SANITIZER_RUNTIME}]) # must come first
  done])
AS_CASE([:$SANITIZER_RUNTIME],
  [: | *:lib*],
  [SANITIZER_RUNTIME=
  AC_MSG_RESULT([no])
  AC_MSG_WARN([nbdkit will not be tested with sanitizers: they need a runtime of g++'s])],
  [AC_MSG_RESULT([$SANITIZER_RUNTIME])])
AC_SUBST([SANITIZER_RUNTIME])])

# QCOWCACHE_SANITIZERS
AC_DEFUN([QCOWCACHE_SANITIZERS],
[AC_ARG_ENABLE([sanitizers],
  [AS_HELP_STRING([--enable-sanitizers=LIST],
    [build with -fsanitize=LIST: address,undefined or thread])],
  [], [enable_sanitizers=no])
AS_CASE([$enable_sanitizers],
  [no], [SANITIZER_FLAGS=
  SANITIZER_RUNTIME=],
  [yes], [AC_MSG_ERROR([--enable-sanitizers needs a list, as in: --enable-sanitizers=address,undefined])],
  [SANITIZER_FLAGS="-fsanitize=$enable_sanitizers -fno-sanitize-recover=all -fno-omit-frame-pointer"
  AC_MSG_CHECKING([whether $CXX takes -fsanitize=$enable_sanitizers])
  qcowcache_saved_CXXFLAGS=$CXXFLAGS
  CXXFLAGS="$CXXFLAGS $SANITIZER_FLAGS"
  AC_LINK_IFELSE([AC_LANG_PROGRAM()],
    [AC_MSG_RESULT([yes])],
    [AC_MSG_RESULT([no])
    AC_MSG_ERROR([$CXX cannot build with -fsanitize=$enable_sanitizers])])
  CXXFLAGS=$qcowcache_saved_CXXFLAGS
  QCOWCACHE_SANITIZER_RUNTIME
  QCOWCACHE_SUMMARY="
  sanitizers        $enable_sanitizers"])
AC_SUBST([SANITIZER_FLAGS])
AM_CONDITIONAL([SANITIZERS], [test "x$enable_sanitizers" != xno])
AM_CONDITIONAL([PRELOADED_SANITIZERS], [test "x$SANITIZER_RUNTIME" != x])])

# QCOWCACHE_LINKER
AC_DEFUN([QCOWCACHE_LINKER],
[AC_MSG_CHECKING([whether the linker takes -Wl,--as-needed])
qcowcache_saved_LDFLAGS=$LDFLAGS
LDFLAGS="$LDFLAGS -Wl,--as-needed"
AC_LINK_IFELSE([AC_LANG_PROGRAM()],
  [AC_MSG_RESULT([yes]); AS_NEEDED_LDFLAGS=-Wl,--as-needed],
  [AC_MSG_RESULT([no]); AS_NEEDED_LDFLAGS=])
LDFLAGS=$qcowcache_saved_LDFLAGS
AC_SUBST([AS_NEEDED_LDFLAGS])])
