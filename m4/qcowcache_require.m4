# QCOWCACHE_MISSING(WHAT, DEBIAN-PACKAGE, FEDORA-PACKAGE)
# Stops with the one line that a user needs to go on.
AC_DEFUN([QCOWCACHE_MISSING],
[AC_MSG_ERROR([$1 is missing; install it with: apt-get install $2 (Debian), dnf install $3 (Fedora)])])

# QCOWCACHE_TRY_HEADERS(HEADERS, ACTION-IF-NONE)
# Looks for the first of the headers, separated by spaces, that compiles as C++.
AC_DEFUN([QCOWCACHE_TRY_HEADERS],
[AC_MSG_CHECKING([for $1])
qcowcache_header_found=no
for qcowcache_header in $1; do
  AC_COMPILE_IFELSE([AC_LANG_PROGRAM([[#include <$qcowcache_header>]])],
    [qcowcache_header_found=$qcowcache_header
    break])
done
AC_MSG_RESULT([$qcowcache_header_found])
AS_VAR_IF([qcowcache_header_found], [no], [$2])])

# QCOWCACHE_MODULE(VARIABLE, MODULE, HEADERS, DEBIAN-PACKAGE, FEDORA-PACKAGE)
# Finds a library by pkg-config and sees that one of the headers can be used.
# Sets VARIABLE_CFLAGS, as system headers so that they do not draw our warnings, and VARIABLE_LIBS.
AC_DEFUN([QCOWCACHE_MODULE],
[PKG_CHECK_MODULES([$1], [$2], [],
  [QCOWCACHE_MISSING([$2], [$4], [$5])])
$1[]_CFLAGS=`AS_ECHO([" $$1[]_CFLAGS"]) | sed 's/ -I *\//  -isystem \//g'`
qcowcache_saved_CPPFLAGS=$CPPFLAGS
CPPFLAGS="$CPPFLAGS $$1[]_CFLAGS"
QCOWCACHE_TRY_HEADERS([$3], [QCOWCACHE_MISSING([a usable header of $2], [$4], [$5])])
CPPFLAGS=$qcowcache_saved_CPPFLAGS])

# QCOWCACHE_HEADER_ONLY(WHAT, HEADER, DEBIAN-PACKAGE, FEDORA-PACKAGE)
# A library that has neither a pkg-config file nor anything to link.
AC_DEFUN([QCOWCACHE_HEADER_ONLY],
[QCOWCACHE_TRY_HEADERS([$2], [QCOWCACHE_MISSING([$1 ($2)], [$3], [$4])])])
