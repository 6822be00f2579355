#!/usr/bin/env bash
# A parameter that makes no sense stops nbdkit before it serves, with one line
# that names the parameter, the value and what is allowed.

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

for value in junk -1 -64M 64Q 64MB 64KiB M64 1.2.3 1.5M 0x10 9223372036854775808 \
    18446744073709551616 99999999999999999999 "64M junk" " 64M" "64M " auto ""; do
    refused qcowcache-size "$value" size 64M
done

for value in 256 0 1 511 513 3000 65535 2097151 2097153 4M 4194304 64KB 64Q -512 -64K junk "64k,512" \
    automatic AUTO 99999999999999999999 ""; do
    refused qcowcache-cluster-size "$value" auto 512 2M
done

# The same through the configuration's other door, several at once: the first
# bad one is reported, and good ones before it do no harm.
nbdkit_refuses --filter="$FILTER" file "$work/disk" qcowcache-size=32M qcowcache-cluster-size=100
[[ $refusal == *qcowcache-cluster-size*100* ]] || fail "unclear: $refusal"

# Given twice: a wrong value is not made good by the right one beside it.
nbdkit_refuses --filter="$FILTER" file "$work/disk" qcowcache-size=32M qcowcache-size=33Q
[[ $refusal == *qcowcache-size=33Q:* ]] || fail "unclear: $refusal"
nbdkit_refuses --filter="$FILTER" file "$work/disk" qcowcache-size=33Q qcowcache-size=32M
[[ $refusal == *qcowcache-size=33Q:* ]] || fail "unclear: $refusal"

# One line, whatever the value is.
nbdkit_refuses --filter="$FILTER" file "$work/disk" "qcowcache-writers=1
qcowcache-writers=2"
[[ $refusal == *'qcowcache-writers=1\x0aqcowcache-writers=2: must be'* ]] || fail "unclear: $refusal"

# What looks like one of this filter's parameters, and is none, is not passed on.
for parameter in qcowcache-sise qcowcache-sizes qcowcache-Size qcowcache- qcowcache-xyz qcowcache-size-; do
    refused "$parameter" 64M allowed cluster-size expire max-write size-file writers
done

# nbdkit names them all.
nbdkit --filter="$FILTER" null --help >"$work/help" 2>&1 </dev/null || :
has_parameter () { grep -q -- "$1" "$work/help"; }
for name in size cluster-size size-file writers max-write max-delay reserve expire verify readback; do
    has_parameter "qcowcache-$name=" || fail "--help does not name qcowcache-$name"
done

for value in -1 +1 65 junk 4k 0x4 1000000 1.5 " 4" 4294967296 18446744073709551616 ""; do
    refused qcowcache-writers "$value" "from 0 to 64"
done
for value in junk -1 0 65535 63K 33554433 33M 1MB 1Q 9223372036854775808 99999999999999999999 ""; do
    refused qcowcache-max-write "$value" "from 64K to 32M"
done
for value in junk -1 1 64K 2097151 1025M 64MB 99999999999999999999 ""; do
    refused qcowcache-reserve "$value" "from 2M to 1G, or 0"
done
for value in junk never -1 86401 5s 1.5 0x5 18446744073709551616 99999999999999999999 ""; do
    refused qcowcache-expire "$value" "from 0 to 86400"
    refused qcowcache-max-delay "$value" "from 0 to 86400"
done
for value in "" / "$work" "$work/" . ..; do
    refused qcowcache-size-file "$value" "the name of a file"
done

for value in junk on 1 ""; do refused qcowcache-verify "$value" off warn error all; done
nbdkit_refuses --filter="$FILTER" file "$work/disk" qcowcache-cluster-size=64k qcowcache-verify=error
echo "$refusal"
[[ $refusal == *qcowcache-cluster-size* && $refusal == *qcowcache-verify* ]] || fail "unclear: $refusal"
for value in junk 2 ""; do refused qcowcache-readback "$value"; done

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
for value in junk -1 86401 1.5 99999999999999999999 10s ""; do
    refused qcowcache-stats-interval "$value" "from 0 to 86400"
done
refused qcowcache-stats-interval 10 qcowcache-stats
[ -z "$(ls "$work/directory")" ] || fail "made a file although nothing was served"

# What is allowed is accepted, in the ways that nbdkit writes sizes.
for good in qcowcache-size=0 qcowcache-size=1 qcowcache-size=1G qcowcache-size=65536k \
    qcowcache-cluster-size=auto qcowcache-cluster-size=512 qcowcache-cluster-size=1M \
    qcowcache-cluster-size=2097152 qcowcache-size=9223372036854775807 qcowcache-size=7E \
    qcowcache-writers=0 qcowcache-writers=64 qcowcache-max-write=65536 qcowcache-max-write=32M \
    qcowcache-expire=0 qcowcache-expire=86400 \
    qcowcache-max-delay=0 qcowcache-max-delay=86400 \
    qcowcache-reserve=0 qcowcache-reserve=2M qcowcache-reserve=1G \
    "qcowcache-stats=$work/stats.json" qcowcache-stats-interval=0 \
    "qcowcache-unclean=$work/unclean"; do
    start_nbdkit good --filter="$FILTER" file "$work/disk" "$good"
    nbdinfo --size "$(uri good)" >/dev/null
    stop_nbdkit good
done

# Of two right ones the last counts: 0 would pass the write on as it is.

# odd_writes PARAMETER...: how many reach storage, in $odd
odd_writes ()
{
    start_nbdkit twice --filter="$FILTER" --filter=log file "$work/disk" logfile="$work/log" "$@"
    nbdsh -u "$(uri twice)" -c 'h.pwrite(b"somebody", 70000)'
    stop_nbdkit twice
    odd=$(count_log "$work/log" odd)
}
write_header "$work/disk" 16
odd_writes qcowcache-size=0 qcowcache-size=1M
[ "$odd" -eq 0 ] || fail "the first qcowcache-size counts"
odd_writes qcowcache-size=1M qcowcache-size=0
[ "$odd" -eq 1 ] || fail "the first qcowcache-size counts"

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
