# shellcheck shell=bash
# nbdkit-qcowcache-filter: common parts of the integration tests.
#
# A test is a bash script that says at its top
#
#     source "${srcdir:-.}/functions.sh"
#
# and then tells its story.  It gets:
#
#   $FILTER   the filter under test, as --filter takes it (from the environment)
#   $work     a directory of its own, gone when the test ends
#
# A test that mounts something (see small_filesystem) sets own_mounts=1 before it
# sources this: what it mounts nobody else sees, and it is gone with the test.
#
# and everything that it starts with start_nbdkit is stopped when it ends,
# however it ends.  Two tests can run at the same time.
#
# From the environment:
#
#   FILTER_PARAMETERS  parameters added to every server that has the filter in
#                      its chain, to run a test with other settings
#   CI=true            what a test "requires" must be there
#   LONG=1             full-sized inputs
#   KEEP=1             leave $work behind, and print where it is
#   TEST_TIMEOUT=SECS  a test that takes longer has failed (900)
#   SLOWNESS           how many times as long as it should this machine takes (1)
#   NBDKIT_PRELOAD     libraries for nbdkit alone: the runtime of the sanitizers
#                      that the filter was built with, whose reports fail a test

set -e -u -o pipefail

# A filter that hangs makes its clients hang, and a shell does not run its traps
# while it waits for a client; so the whole process group is ended from outside.
if [ "${QCOWCACHE_TEST_RUNS:-}" != "$0" ]; then
    export QCOWCACHE_TEST_RUNS=$0
    namespace=()
    if [ -n "${own_mounts:-}" ] && unshare --mount true 2>/dev/null; then
        namespace=(unshare --mount --)
    fi
    exec timeout -k 30 "${TEST_TIMEOUT:-900}" "${namespace[@]}" bash "$0" "$@"
fi

# The libraries' own locale would translate messages that tests look for.
export LC_ALL=C

# For nbd_clients.py and qcow2.py.
PYTHONPATH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH PYTHONDONTWRITEBYTECODE=1

fail ()
{
    echo "$(basename "$0"): FAILED: $*" >&2
    exit 1
}

# Programs that ./bootstrap installs: without one of them the test cannot say
# anything, and saying nothing must not look like success.
requires_program ()
{
    local program
    for program in "$@"; do
        command -v "$program" >/dev/null ||
            fail "$program is missing: ./bootstrap installs it"
    done
}

# A condition of the machine (not of what is installed), as a command.  The
# test is skipped where it does not hold, except in CI, where nothing skips.
requires ()
{
    if ! "$@" </dev/null >/dev/null 2>&1; then
        if [ "${CI:-}" = true ]; then
            fail "this machine does not satisfy: $*"
        fi
        echo "$(basename "$0"): skipped: this machine does not satisfy: $*"
        exit 77
    fi
}

cleanup_hooks=()

# cleanup_fn COMMAND...: runs when the test ends; the last one named runs first.
cleanup_fn ()
{
    local quoted
    printf -v quoted '%q ' "$@"
    cleanup_hooks+=("$quoted")
}

run_cleanup_hooks ()
{
    local status=$? i
    trap '' INT QUIT TERM HUP
    set +e
    for ((i = ${#cleanup_hooks[@]} - 1; i >= 0; i--)); do
        eval "${cleanup_hooks[i]}"
    done
    exit "$status"
}
trap run_cleanup_hooks EXIT
trap 'exit 143' INT QUIT TERM HUP

remove_work ()
{
    if [ "${KEEP:-}" = 1 ]; then
        echo "left in $work"
    else
        rm -rf "$work"
    fi
}

[ -n "${FILTER:-}" ] ||
    fail "FILTER must name the filter under test, e.g. FILTER=\$PWD/filter/.libs/nbdkit-qcowcache-filter.so"

requires_program awk cmp jq nbdcopy nbdinfo nbdkit nbdsh qemu-img qemu-io qemu-nbd tar truncate
: "${PYTHON:=python3}"
"$PYTHON" -c 'import nbd' 2>/dev/null ||
    fail "libnbd's Python module is missing for $PYTHON: ./bootstrap installs it"

# Names of unix sockets are limited to 107 bytes, so this is not below the
# build directory.
work=$(mktemp -d "${TMPDIR:-/tmp}/qcowcache.XXXXXX")
cleanup_fn remove_work

# small_filesystem DIRECTORY SIZE: a new, empty filesystem of that size there, in
# memory; false, and a line that says so, where nobody may mount one: in a
# container, or without being root.  Needs own_mounts.
small_filesystem ()
{
    mkdir -p "$1"
    if ! mount -t tmpfs -o "size=$2" tmpfs "$1" 2>/dev/null; then
        echo "nothing can be mounted here: no test with a full disk"
        return 1
    fi
    cleanup_fn unmount "$1"
}

# unmount DIRECTORY: what is mounted there and below, if anything, as soon as the
# servers that have been told to end have done so
unmount ()
{
    ! mountpoint -q "$1" || wait_until 20 umount --recursive "$1"
}

# timeout, but for a machine that takes longer: the driver of the tests sets SLOWNESS.
timeout ()
{
    local options=()
    while [[ $1 == -* ]]; do
        options+=("$1" "$2")
        shift 2
    done
    command timeout "${options[@]}" "$(($1 * ${SLOWNESS:-1}))" "${@:2}"
}

# wait_until SECONDS COMMAND...: true as soon as COMMAND is, false if it is not
# within that time.
wait_until ()
{
    local deadline=$((SECONDS + $1 * ${SLOWNESS:-1} + 1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        sleep 0.02
    done
}

# Cleans up after run_nbdkit_under: what nbdkit was found guilty of fails the test.
fail_on_reports ()
{
    local report
    for report in "$work/report."*; do
        if [ -s "$report" ]; then
            cat "$report" >&2
            echo "$(basename "$0"): FAILED: see the report above" >&2
            # That of run_cleanup_hooks.
            # shellcheck disable=SC2034
            status=1
        fi
    done
}

# run_nbdkit_under COMMAND...: from here on the program nbdkit is run by COMMAND,
# and no other program is.  The test fails if it writes to $work/report.SOMETHING.
run_nbdkit_under ()
{
    local quoted nbdkit
    nbdkit=$(command -v nbdkit)
    printf -v quoted '%q ' "$@" "$nbdkit"
    mkdir "$work/bin"
    printf '#!/bin/bash\nexec %s "$@"\n' "$quoted" >"$work/bin/nbdkit"
    chmod +x "$work/bin/nbdkit"
    PATH=$work/bin:$PATH
    cleanup_fn fail_on_reports
}

suppressions=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../suppressions")
if [ -n "${NBDKIT_PRELOAD:-}" ]; then
    # gnutls brings p11-kit.  Initialised behind a sanitizer's runtime, but not first
    # of all others, it leaves a lock of the C library such that nbdkit never ends.
    preloaded=$NBDKIT_PRELOAD
    plugins=$(nbdkit --dump-config | sed -n 's/^plugindir=//p')
    for module in $(ldd "$(command -v nbdkit)" | awk '$1 ~ /^libp11-kit/ { print $3 }') "$FILTER" \
        "$(nbdkit --dump-config | sed -n 's/^filterdir=//p')"/*.so \
        "$plugins/nbdkit-"{file,memory}-plugin.so; do
        # What nbdkit unloads before leaks are looked for stays, with its name.
        preloaded+=:$module
    done
    # Whose a leak is decides who allocated it, not who called that: so the stack
    # of an allocation ends there (malloc_context_size).
    run_nbdkit_under env LD_PRELOAD="$preloaded" \
        ASAN_OPTIONS="log_path=$work/report:malloc_context_size=2:quarantine_size_mb=32" \
        LSAN_OPTIONS="suppressions=$suppressions/leak.supp:print_suppressions=0" \
        UBSAN_OPTIONS="log_path=$work/report:print_stacktrace=1" \
        TSAN_OPTIONS="log_path=$work/report:suppressions=$suppressions/thread.supp:history_size=4"
fi

declare -A server_pid=()

server_has_ended () { ! kill -0 "${server_pid[$1]}" 2>/dev/null; }
server_is_up_or_gone () { [ -s "$work/$1.pid" ] || server_has_ended "$1"; }

kill_server ()
{
    if [ -n "${server_pid[$1]:-}" ]; then
        # What the server said helps to understand a failure and is gone with
        # the rest of $work afterwards.
        [ ! -s "$work/$1.err" ] || tail -n 20 "$work/$1.err" | sed "s/^/$1 said: /" >&2
        kill -KILL "${server_pid[$1]}" 2>/dev/null
        wait "${server_pid[$1]}" 2>/dev/null
        unset "server_pid[$1]"
    fi
}

# start_nbdkit NAME ARGUMENT...: nbdkit in the background on $work/NAME.sock;
# returns when it serves.  What it prints goes to $work/NAME.err.
start_nbdkit ()
{
    local name=$1 argument parameters=()
    shift
    for argument in "$@"; do
        if [ "$argument" = "--filter=$FILTER" ]; then
            read -r -a parameters <<<"${FILTER_PARAMETERS:-}"
        fi
    done

    rm -f "$work/$name.pid" "$work/$name.sock"
    nbdkit -f -P "$work/$name.pid" -U "$work/$name.sock" "$@" "${parameters[@]}" \
        >"$work/$name.err" 2>&1 </dev/null &
    server_pid[$name]=$!
    cleanup_fn kill_server "$name"
    wait_until 30 server_is_up_or_gone "$name" ||
        fail "nbdkit $name did not start to serve"
    if server_has_ended "$name"; then
        fail "nbdkit $name ended instead of serving"
    fi
}

# The address of an export of a server: uri NAME [EXPORT]
uri ()
{
    echo "nbd+unix:///${2:-}?socket=$work/$1.sock"
}

# end_of_nbdkit NAME: wait for a server that has been told to end, or that ends
# by itself; it must end well.
end_of_nbdkit ()
{
    local status=0
    if ! wait_until 60 server_has_ended "$1"; then
        bash "$(dirname "${BASH_SOURCE[0]}")/print-stacks.sh" "${server_pid[$1]}" >&2
        fail "nbdkit $1 does not end"
    fi
    wait "${server_pid[$1]}" || status=$?
    if [ "$status" -ne 0 ]; then
        tail -n 20 "$work/$1.err" >&2
        fail "nbdkit $1 ended with status $status"
    fi
    unset "server_pid[$1]"
}

# start_o_direct DISK: serves the file as a disk that nothing caches, at
# $work/direct.sock; stop_nbdkit direct ends it.
start_o_direct ()
{
    rm -f "$work/direct.pid"
    qemu-nbd --cache=none --aio=native --persistent --shared=0 -f raw -k "$work/direct.sock" \
        --pid-file="$work/direct.pid" "$1" >"$work/direct.err" 2>&1 &
    server_pid[direct]=$!
    cleanup_fn kill_server direct
    wait_until 30 server_is_up_or_gone direct || fail "qemu-nbd does not start to serve"
    if server_has_ended direct; then fail "qemu-nbd does not serve: $(cat "$work/direct.err")"; fi
}

stop_nbdkit ()
{
    if server_has_ended "$1"; then
        tail -n 20 "$work/$1.err" >&2
        fail "nbdkit $1 ended before it was told to"
    fi
    kill -TERM "${server_pid[$1]}"
    end_of_nbdkit "$1"
}

# nbdkit_refuses ARGUMENT... : nbdkit must end with an error before it serves,
# and say why in a single line, which is left in $refusal.
nbdkit_refuses ()
{
    local status=0
    rm -f "$work/refused.pid"
    timeout -k 5 20 nbdkit -f -P "$work/refused.pid" -U "$work/refused.sock" "$@" \
        >"$work/refused.out" 2>&1 </dev/null || status=$?
    refusal=$(cat "$work/refused.out")
    [ ! -e "$work/refused.pid" ] || fail "nbdkit serves with: $*"
    [ "$status" -ne 0 ] || fail "nbdkit exits with 0 for: $*"
    [ "$status" -lt 124 ] || fail "nbdkit hangs or crashes (status $status) with: $*: $refusal"
    [ "$(wc -l <"$work/refused.out")" -eq 1 ] ||
        fail "not one line for: $*: $refusal"
}

# count_log LOGFILE WHAT [GRID]: a count from what nbdkit's log filter wrote.  WHAT is
#   writes, reads, zeros, trims, flushes   requests
#   bytes                                  bytes in the write requests
#   read-bytes                             bytes in the read requests
#   odd                                    writes that do not begin and end on a multiple of GRID (4096)
count_log ()
{
    awk -v what="$2" -v grid="${3:-4096}" '
        function number(field,    digits, i, value) {
            sub(/^[a-z]*=0x/, "", field)
            for (i = 1; i <= length(field); i++)
                value = value * 16 + index("0123456789abcdef", substr(field, i, 1)) - 1
            return value
        }
        function off_grid() {
            return number($6) % grid != 0 || (number($6) + number($7)) % grid != 0
        }
        BEGIN { total = 0 }
        what == "writes"     && $4 == "Write" { total++ }
        what == "reads"      && $4 == "Read"  { total++ }
        what == "zeros"      && $4 == "Zero"  { total++ }
        what == "trims"      && $4 == "Trim"  { total++ }
        what == "flushes"    && $4 == "Flush" { total++ }
        what == "bytes"      && $4 == "Write" { total += number($7) }
        what == "read-bytes" && $4 == "Read"  { total += number($7) }
        what == "odd"        && $4 == "Write" && off_grid() { total++ }
        END { printf "%.0f\n", total }' "$1"
}

# client_requests LOGFILE: the requests of a log in their order, without what
# differs from run to run, and without questions about the first sector: the
# filter looks for a header there, and no client here does.
client_requests ()
{
    sed -n -E 's/^[^ ]+ [^ ]+ connection=[0-9]+ ((Read|Write|Zero|Trim|Flush|Extents|Cache) .*) \.\.\.$/\1/p' "$1" |
        sed -E -e 's/ id=[0-9]+//' |
        awk '!(($1 == "Read" || $1 == "Extents") && $2 == "offset=0x0")'
}

# make_half_random FILE CLUSTERS BYTES: clusters of 64 KiB that begin with so many
# random bytes, and so compress to a little more than these.
make_half_random ()
{
    "$PYTHON" - "$@" <<'END'
import random, sys
name, clusters, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
random.seed(9)
with open(name, "wb") as file:
    for cluster in range(clusters):
        file.write(random.randbytes(length) + bytes((1 << 16) - length))
END
}

# make_tar_image FILE SIZE: SIZE (as truncate takes it) of a tar of this
# machine's own files.
make_tar_image ()
{
    local bytes have
    truncate -s "$2" "$1"
    bytes=$(stat -c %s "$1")
    # tar ends by SIGPIPE, and may meet files that change: neither matters.
    { tar -C /usr -cf - lib bin share 2>/dev/null || :; } | head -c "$bytes" >"$1"
    have=$(stat -c %s "$1")
    while [ "$have" -gt 0 ] && [ "$have" -lt "$bytes" ]; do
        head -c $((bytes - have)) "$1" >"$1.more"
        cat "$1.more" >>"$1"
        have=$(stat -c %s "$1")
    done
    rm -f "$1.more"
    [ "$have" -eq "$bytes" ] || fail "could not make $2 of tar"
}

# fresh_file FILE SIZE: an empty sparse file in place of whatever was there.
fresh_file ()
{
    rm -f "$1"
    truncate -s "$2" "$1"
}

# convert SOURCE URI CLUSTER TYPE [OPTION...]: compress a raw image into qcow2.
convert ()
{
    local source=$1 target=$2 cluster=$3 type=$4
    shift 4
    qemu-img convert -c -t none "$@" -f raw -O qcow2 \
        -o "cluster_size=$cluster,compression_type=$type" "$source" "$target"
}

# peak_memory SERVER: the most memory that a running server has had resident, in KiB
peak_memory ()
{
    awk '$1 == "VmHWM:" { print $2 }' "/proc/${server_pid[$1]}/status"
}

# image_holds IMAGE SOURCE: the stored image is sound, and holds what SOURCE does.
image_holds ()
{
    qemu-img check -q -f qcow2 "$1" || fail "qemu-img check finds fault with $1"
    qemu-img compare -q -f qcow2 -F raw "$1" "$2" || fail "$1 does not hold what $2 does"
}

# python ARGUMENT...: run the program on standard input, which may use nbd_clients.py and qcow2.py.
python ()
{
    "$PYTHON" - "$@"
}

# run_client SERVER ARGUMENT...: run the program on standard input, in which "client" is
# connected to the server at the socket "address", "arguments" is a list, and everything
# of nbd_clients.py is there.
run_client ()
{
    "$PYTHON" -c 'import nbd_clients; nbd_clients.run()' "$work/$1.sock" "${@:2}"
}

# mixed_requests SERVER: one client that sends requests of every kind, of sizes
# that fit nothing, one after the other; the same ones each time, to an export
# of at least 4 MiB.
mixed_requests ()
{
    run_client "$1" <<'END'
mixed_requests(client, random.Random(20), 400, 512, 4 << 20)
client.flush()
client.shutdown()
END
}

# passes_unchanged FILE PARAMETER...: with these parameters, on a copy of FILE,
# storage receives mixed_requests exactly as it does without the filter, and
# ends with the same bytes.
passes_unchanged ()
{
    local file=$1
    shift
    cp --sparse=always "$file" "$work/without"
    start_nbdkit plain --filter=log file "$work/without" logfile="$work/plain.log"
    mixed_requests plain
    stop_nbdkit plain

    cp --sparse=always "$file" "$work/with"
    start_nbdkit filtered --filter="$FILTER" --filter=log file "$work/with" logfile="$work/below.log" "$@"
    mixed_requests filtered
    stop_nbdkit filtered

    client_requests "$work/plain.log" >"$work/expected-requests"
    client_requests "$work/below.log" >"$work/found-requests"
    diff -u "$work/expected-requests" "$work/found-requests" | head -n 30 >&2 ||
        fail "storage received other requests than the client sent ($(basename "$file") $*)"
    cmp "$work/with" "$work/without"
}

# write_header FILE CLUSTER_BITS [VERSION]: the first bytes of a qcow2 image, as
# far as they say how large its clusters are, at the start of FILE.
write_header ()
{
    python "$@" <<'END'
import sys
from qcow2 import image_header
with open(sys.argv[1], "r+b") as file:
    file.write(image_header(*map(int, sys.argv[2:])))
END
}

# fresh_image FILE SIZE CLUSTER_BITS: an empty sparse file with such a header
fresh_image ()
{
    fresh_file "$1" "$2"
    write_header "$1" "$3"
}

# make_uneven_plugin: compiles uneven_plugin.c, which says what it is, to $uneven_plugin
make_uneven_plugin ()
{
    local flags
    requires_program pkg-config "${CC:-cc}"
    read -r -a flags <<<"$(pkg-config --cflags nbdkit)"
    uneven_plugin=$work/nbdkit-uneven-plugin.so
    "${CC:-cc}" -shared -fPIC -O1 "${flags[@]}" -o "$uneven_plugin" \
        "$(dirname "${BASH_SOURCE[0]}")/uneven_plugin.c"
}
