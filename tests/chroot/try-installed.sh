#!/usr/bin/env bash
# Installs the filter on this machine in both ways, uses it as somebody who has
# only that, and removes it again: nothing may be left.  It installs and removes
# packages, so it is for a machine that may be thrown away, such as a root:
#
#   tests/chroot/check-in.sh bookworm tests/chroot/try-installed.sh
#
# make install: then every example of the man page, and make uninstall.
# make deb: then a conversion with the package installed, and a purge.

set -e -u -o pipefail

cd "$(dirname "$0")/../.."
source_dir=$PWD
filter=nbdkit-qcowcache-filter
export DEBIAN_FRONTEND=noninteractive
scratch=$(mktemp -d -p /dev/shm)

say () { printf '=== %s\n' "$*"; }

fail ()
{
    echo "try-installed.sh: FAILED: $*" >&2
    exit 1
}

# A failure must not leave behind what would make the next run fail.
clean_up ()
{
    local status=$?
    trap - EXIT
    [ ! -e build/Makefile ] || make -C build uninstall >/dev/null 2>&1 || :
    dpkg --purge "$filter" >/dev/null 2>&1 || :
    rm -rf "$scratch"
    exit "$status"
}

# files NAME [TEST...]: lists in $scratch/NAME what this machine has outside the source.
files ()
{
    local name=$1
    shift
    find / -xdev -path "$source_dir" -prune -o "$@" -print | LC_ALL=C sort >"$scratch/$name"
}

# modules: where the filter can be found by anybody, the build tree included
modules () { find / -xdev -name "$filter.so" -print; }

filter_is_unknown ()
{
    ! nbdkit --filter=qcowcache null --help >"$scratch/said" 2>&1 || fail "nbdkit finds a filter: $(modules)"
    grep -q "cannot open filter 'qcowcache'" "$scratch/said" || fail "nbdkit says: $(cat "$scratch/said")"
}

filter_is_known ()
{
    nbdkit --filter=qcowcache null --help >"$scratch/said" || fail "nbdkit does not find the filter"
    grep '^qcowcache-size=' "$scratch/said" || fail "nbdkit says: $(cat "$scratch/said")"
}

# run_test NAME: an integration test, with the filter as nbdkit finds it by its name
run_test ()
{
    say "$1"
    FILTER=qcowcache CI=true bash "tests/integration/$1" || fail "$1"
}

filterdir=$(nbdkit --dump-config 2>/dev/null | sed -n 's/^filterdir=//p') || :
[ ! -e "${filterdir:-/nonexistent}/$filter.so" ] || fail "the filter is installed already"
trap clean_up EXIT

say 'build'
./bootstrap install bash-completion build-essential debhelper gnutls-bin openssh-client openssh-server qemu-system-common
filterdir=$(nbdkit --dump-config | sed -n 's/^filterdir=//p')
BUILD_DIR=$source_dir/build ./bootstrap
filter_is_unknown

say 'make install'
files before '!' -type d
make -C build install
# From here on there is one in the whole root.
rm build/filter/.libs/"$filter".so
[ "$(modules)" = "$filterdir/$filter.so" ] || fail "where the filter is: $(modules)"
filter_is_known
for script in tests/integration/test-example-*.sh; do
    run_test "$(basename "$script")"
done
run_test test-completion.sh
make -C build uninstall
files after '!' -type d
diff "$scratch/before" "$scratch/after" || fail "make uninstall leaves another list of files"
filter_is_unknown

say 'make deb'
DEB_BUILD_OPTIONS=nocheck make -C build deb
dpkg-deb --field build/deb/"$filter"_*.deb Package Version Depends
# What apt keeps in any case: lists of what it has, and what it did.
kept=(-path /var/cache/apt -prune -o -path /var/lib/apt -prune -o -path /var/log -prune -o)
files before "${kept[@]}"
apt-get install --yes --no-install-recommends ./build/deb/"$filter"_*.deb
dpkg --listfiles "$filter"
[ -e "$filterdir/$filter.so" ] || fail "the package has no filter in $filterdir"
rm -rf build/deb
[ "$(modules)" = "$filterdir/$filter.so" ] || fail "where the filter is: $(modules)"
filter_is_known
run_test test-example-files.sh
apt-get purge --yes "$filter"
files after "${kept[@]}"
diff "$scratch/before" "$scratch/after" || fail "purging leaves another list of files"
filter_is_unknown

echo 'installed, used and removed: with make, and as a package'
