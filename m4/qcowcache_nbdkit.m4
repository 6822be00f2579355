# QCOWCACHE_NBDKIT_SERVER
# nbdkit compares the version string that a filter was compiled with to its own and refuses to run
# the filter if they differ in anything. Better to say so here than after the installation.
AC_DEFUN([QCOWCACHE_NBDKIT_SERVER],
[NBDKIT_VERSION=`$PKG_CONFIG --modversion nbdkit`
AC_SUBST([NBDKIT_VERSION])
AC_PATH_PROG([NBDKIT], [nbdkit], [], [$PATH$PATH_SEPARATOR/usr/sbin$PATH_SEPARATOR/sbin])
AS_IF([test "x$NBDKIT" = x],
  [AC_MSG_WARN([no nbdkit program: the tests need one of version $NBDKIT_VERSION; apt-get install nbdkit (Debian), dnf install nbdkit (Fedora)])],
  [AC_MSG_CHECKING([whether $NBDKIT is the version of the headers, $NBDKIT_VERSION])
  qcowcache_server_version=`"$NBDKIT" --version 2>/dev/null | sed -n '1s/^nbdkit \([[^ ]]*\).*/\1/p'`
  AC_MSG_RESULT([${qcowcache_server_version:-unknown}])
  AS_IF([test "x$qcowcache_server_version" != "x$NBDKIT_VERSION"],
    [AC_MSG_ERROR([$NBDKIT is version ${qcowcache_server_version:-unknown} but the headers are of $NBDKIT_VERSION, and a filter only runs with the version it was compiled against; install both from one source: apt-get install nbdkit nbdkit-plugin-dev (Debian), dnf install nbdkit nbdkit-devel (Fedora)])])])])

# QCOWCACHE_FILTERDIR
# Where `nbdkit --filter=NAME` looks. That is nbdkit's directory, whatever our own prefix is.
AC_DEFUN([QCOWCACHE_FILTERDIR],
[AC_ARG_WITH([filterdir],
  [AS_HELP_STRING([--with-filterdir=DIR], [install the filter here (default: where nbdkit looks)])],
  [filterdir=$withval],
  [filterdir=`$PKG_CONFIG --variable=filterdir nbdkit`])
AS_CASE([$filterdir],
  [/*], [],
  [AC_MSG_ERROR([--with-filterdir=$filterdir: an absolute directory is needed, as in: --with-filterdir=/usr/lib/nbdkit/filters])])
AC_SUBST([filterdir])])
