#!/usr/bin/env bash
# A parameter that makes no sense stops nbdkit before it serves, with one line
# that names the parameter, the value and what is allowed.  (Which values make sense
# is parameters_test.cpp's.)

source "$(dirname "$0")/functions.sh"

fresh_file "$work/disk" 1M

# refused PARAMETER VALUE ALLOWED...: the line names all of these
refused ()
{
    local parameter=$1 value=$2 allowed
    shift 2
    nbdkit_refuses --filter="$FILTER" file "$work/disk" "$parameter=$value"
    echo "$refusal"
    for allowed in "$parameter" "$value" "$@"; do
        [[ $refusal == *"$allowed"* ]] || fail "does not name '$allowed': $refusal"
    done
}

refused qcowcache-size "64M " size 64M
refused qcowcache-cluster-size 4M auto 512 2M
refused qcowcache-writers 65 "from 0 to 64"
refused qcowcache-max-write 33M "from 64K to 32M"
refused qcowcache-reserve 1 "from 2M to 1G, or 0"
refused qcowcache-expire -1 "from 0 to 86400"
refused qcowcache-max-delay never "from 0 to 86400"
refused qcowcache-verify on off warn error all
refused qcowcache-readback ""
refused qcowcache-size-file .. "the name of a file"
# What looks like one of this filter's parameters, and is none, is not passed on.
refused qcowcache-sizes 64M allowed cluster-size expire max-write size-file writers

# refuses_all PATTERN PARAMETER...: the line is like that
refuses_all ()
{
    nbdkit_refuses --filter="$FILTER" file "$work/disk" "${@:2}"
    # shellcheck disable=SC2053  # a pattern
    [[ $refusal == $1 ]] || fail "unclear: $refusal"
}
# The first bad one is reported, good ones before it do no harm, and none beside it makes it good.
refuses_all '*qcowcache-cluster-size*100*' qcowcache-size=32M qcowcache-cluster-size=100
refuses_all '*qcowcache-size=33Q:*' qcowcache-size=33Q qcowcache-size=32M
refuses_all '*qcowcache-verify*qcowcache-cluster-size*' qcowcache-cluster-size=64k qcowcache-verify=error
refuses_all '*qcowcache-writers=1\\x0aqcowcache-writers=2: must be*' $'qcowcache-writers=1\nqcowcache-writers=2'

# Where statistics are to be reported.
mkdir "$work/directory"
refused qcowcache-stats "" "absolute path"
refused qcowcache-stats stats.json "absolute path"
refused qcowcache-stats ./stats.json "absolute path"
refused qcowcache-stats "$work/directory/" "absolute path"
refused qcowcache-unclean unclean "absolute path"
refused qcowcache-unclean "$work/no-such/unclean" "in a directory that can be written to" "No such file"
refused qcowcache-unclean /dev/null "regular file"
refused qcowcache-stats "$work/no-such/stats.json" "in a directory that can be written to" "No such file"
refused qcowcache-stats "$work/disk/stats.json" "in a directory that can be written to" "Not a directory"
refused qcowcache-stats "$work/directory" "regular file"
refused qcowcache-stats /dev/null "regular file"
refused qcowcache-stats-interval 10s "from 0 to 86400"
refused qcowcache-stats-interval 10 qcowcache-stats
[ -z "$(ls "$work/directory")" ] || fail "made a file although nothing was served"

# What is allowed is accepted, the last of two counts, and 0 passes a write on as it is.
write_header "$work/disk" 16
for good in "qcowcache-size=64K qcowcache-size=0" "qcowcache-cluster-size=2097152 qcowcache-size=0" \
    "qcowcache-writers=64 qcowcache-max-write=32M qcowcache-expire=0 qcowcache-max-delay=86400 qcowcache-size=0" \
    "qcowcache-reserve=1G qcowcache-stats=$work/stats.json qcowcache-unclean=$work/unclean qcowcache-size=0"; do
    read -r -a words <<<"$good"
    start_nbdkit good --filter="$FILTER" --filter=log file "$work/disk" logfile="$work/log" "${words[@]}"
    nbdsh -u "$(uri good)" -c 'h.pwrite(b"somebody", 70000)'
    stop_nbdkit good
    [ "$(count_log "$work/log" odd)" -eq 1 ] || fail "not passed through: $good"
    rm "$work/log"
done

# A file that follows the size: named relative to where nbdkit was started, which it leaves when it
# becomes a daemon; and not there yet, which is said once, in one line.
cd "$work"
start_nbdkit follows --filter="$FILTER" file "$work/disk" qcowcache-size-file=size
[ "$(grep -c "qcowcache-size-file=$work/size: must be a file that holds a size" follows.err)" -eq 1 ] ||
    fail "a file that is not there: $(cat follows.err)"
nbdsh -u "$(uri follows)" -c 'h.pwrite(b"works", 70000)' -c 'assert h.pread(5, 70000) == b"works"'
stop_nbdkit follows
[ "$(wc -l <follows.err)" -eq 1 ] || fail "more than one line: $(cat follows.err)"

echo 0 >size
nbdkit -P "$work/daemon.pid" -U "$work/daemon.sock" --filter="$FILTER" --filter=log file "$work/disk" \
    logfile="$work/daemon.log" qcowcache-size-file=size
wait_until 30 test -s daemon.pid || fail "no daemon"
daemon=$(cat daemon.pid)
daemon_has_ended () { ! kill -0 "$daemon" 2>/dev/null; }
end_daemon () { daemon_has_ended || kill -KILL "$daemon"; }
cleanup_fn end_daemon
nbdsh -u "$(uri daemon)" -c 'h.pwrite(b"passed", 70001)'
kill -TERM "$daemon"
wait_until 30 daemon_has_ended || fail "the daemon does not end"
[ "$(count_log daemon.log odd)" -eq 1 ] || fail "a relative name was not followed after nbdkit became a daemon"
