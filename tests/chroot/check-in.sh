#!/usr/bin/env bash
# Builds and tests this tree in a fresh root of another Debian, with its nbdkit,
# its compiler and its QEMU.  Needs root, debootstrap, and about 4 GB of disk.
#
#   tests/chroot/check-in.sh SUITE [COMMAND...]
#
#   SUITE       as debootstrap takes it: bookworm, trixie, ...
#   COMMAND     run in a copy of the tree (./bootstrap check), for example
#               ./bootstrap; a single word with spaces is for a shell
#
# From the environment:
#
#   ROOT=DIR    make the root there and leave it, or use the one that is there
#   MIRROR=URL  of Debian's packages (where this machine has its own from)

set -e -u -o pipefail

suite=${1:?usage: check-in.sh SUITE [COMMAND...]}
shift
[ $# -gt 0 ] || set -- ./bootstrap check
source_dir=$(cd "$(dirname "$0")/../.." && pwd)

# For apt-get, not for the shell.
# shellcheck disable=SC2016
: "${MIRROR:=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | head -n 1)}"
[ -n "$MIRROR" ] || { echo "check-in.sh: apt has no mirror of Debian: say MIRROR=URL" >&2; exit 1; }

if [ -z "${ROOT:-}" ]; then
    root=$(mktemp -d -p "${TMPDIR:-/var/tmp}")
    disposable=$root
else
    root=$ROOT
    disposable=
fi
mounted=()

clean_up ()
{
    local status=$? directory
    trap - EXIT
    for directory in "${mounted[@]}"; do
        # Nothing below a directory that is still mounted may be removed.
        umount --recursive "$directory" || disposable=
    done
    if [ -n "$disposable" ]; then
        rm -rf --one-file-system "$disposable"
    else
        rm -rf "$root/source"
        echo "left in $root"
    fi
    exit "$status"
}
trap clean_up EXIT
trap 'exit 143' INT QUIT TERM HUP

if [ ! -e "$root/etc/debian_version" ]; then
    debootstrap --variant=minbase --include=ca-certificates "$suite" "$root" "$MIRROR"
fi
# Names of hosts, and a proxy if apt needs one, are the machine's.
cp -L /etc/resolv.conf /etc/hosts "$root/etc"
apt-config dump | grep -E '^Acquire::[a-z]*::Proxy ' >"$root/etc/apt/apt.conf.d/99proxy" || :

rm -rf "$root/source"
mkdir "$root/source"
tar -C "$source_dir" --exclude=./.git --exclude=./build -cf - . | tar -C "$root/source" -xf - --no-same-owner

mount -t proc proc "$root/proc"
mounted=("$root/proc")
mount --rbind --make-rslave /dev "$root/dev"
mounted=("$root/dev" "${mounted[@]}")

# apt does not know that it is in a root without services.
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod +x "$root/usr/sbin/policy-rc.d"

if [ $# -eq 1 ] && [[ $1 == *' '* ]]; then set -- bash -e -c "$1"; fi
chroot "$root" env -i HOME=/root LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive CI="${CI:-}" \
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    bash -c 'cd /source && exec "$@"' bash "$@" </dev/null
