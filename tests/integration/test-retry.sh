#!/usr/bin/env bash
# Storage that refuses a write now and then, by chance, and the filters that try
# again, on either side of this one: the image is right.  One of these stacks
# cannot keep what storage refuses, and nbdkit says so.

source "$(dirname "$0")/functions.sh"

make_tar_image "$work/source" 2M
export work

# What is counted of NAME's last run: requests that failed, and how often they were tried again.
failures () { grep -c 'error: injecting EIO error into' "$work/$1.said" || :; }
retries () { grep -c 'debug: retry [0-9]*: waiting' "$work/$1.said" || :; }
from_stats () { jq ".total.$2" "$work/$1.json"; }

# converts NAME FILTER... PARAMETER...: a conversion through that stack, again and
# again until something has failed in it; each time it leaves a right image.
converts ()
{
    local name=$1 stack=() parameters=() word run
    shift
    for word; do
        case $word in
            --filter=*) stack+=("$word") ;;
            *) parameters+=("$word") ;;
        esac
    done
    read -r -a word <<<"${FILTER_PARAMETERS:-}"
    parameters+=("${word[@]}")

    for ((run = 0; run < 100; run++)); do
        fresh_file "$work/$name" 8M
        # The shell that nbdkit starts has $uri and $work.
        # shellcheck disable=SC2016
        timeout -k 5 120 nbdkit -v -U - "${stack[@]}" file "$work/$name" "${parameters[@]}" \
            qcowcache-max-write=64K qcowcache-stats="$work/$name.json" \
            --run 'qemu-img convert -c -t none -W -m 16 -f raw -O qcow2 "$work/source" "$uri" &&
                   nbdsh -u "$uri" -c "h.flush()"' >"$work/$name.said" 2>&1 ||
            fail "$name: $(grep -a -E 'error: |qemu-img: ' "$work/$name.said")"
        image_holds "$work/$name" "$work/source"
        [ "$(from_stats "$name" lost_bytes)" -eq 0 ] || fail "$name: bytes are lost"
        [ "$(retries "$name")" -eq 0 ] || break
    done
    [ "$(failures "$name")" -gt 0 ] || fail "$name: nothing has failed"
    [ "$(retries "$name")" -gt 0 ] || fail "$name: nothing was tried again"
    echo "$name: $(failures "$name") failures, $(retries "$name") retries"
}

# hidden NAME ...: the same, and this filter sees no failure.
hidden ()
{
    converts "$@"
    [ "$(from_stats "$1" refused_writes)" -eq 0 ] || fail "$1: the filter has seen failures"
}

# seen NAME ...: the same, and this filter keeps what storage refuses, so that the flush that is
# tried again finds it.
seen ()
{
    converts "$@"
    [ "$(from_stats "$1" refused_writes)" -gt 0 ] || fail "$1: the filter has seen no failure"
}

# Each waits for a second before it tries again, and most of them do nothing else: so all at once.
retry=(retries=20 retry-delay=1 retry-exponential=no)
request=(retry-request-retries=20 retry-request-delay=1)
waiting=()

hidden retry-below --filter="$FILTER" --filter=retry --filter=error "${retry[@]}" error-pwrite-rate=8% &
waiting+=($!)
hidden request-below --filter="$FILTER" --filter=retry-request --filter=error "${request[@]}" error-pwrite-rate=8% &
waiting+=($!)

# What fails between them does not reach this filter; but retry closes it and opens it again.
hidden retry-above --filter=retry --filter=error --filter="$FILTER" "${retry[@]}" error-pwrite-rate=3% &
waiting+=($!)
hidden request-above --filter=retry-request --filter=error --filter="$FILTER" "${request[@]}" error-pwrite-rate=3% &
waiting+=($!)

# A write that fails behind the client's back is the flush's to report.
seen retry-around --filter=retry --filter="$FILTER" --filter=error "${retry[@]}" error-pwrite-rate=50% &
waiting+=($!)
seen request-around --filter=retry-request --filter="$FILTER" --filter=error "${request[@]}" error-pwrite-rate=50% &
waiting+=($!)

failed=
for stack in "${waiting[@]}"; do
    wait "$stack" || failed=1
done
[ -z "$failed" ] || fail "see above"

# Where each connection has a cache of its own, what storage refuses is lost when retry closes the
# connection.  The flush then succeeds, so nbdkit has to say it.
fresh_file "$work/target" 8M
touch "$work/refuses"
start_nbdkit alone --filter=retry --filter="$FILTER" --filter=multi-conn --filter=error \
    file "$work/target" multi-conn-mode=disable "${retry[@]}" qcowcache-cluster-size=64k \
    error-pwrite-rate=100% error-pwrite-file="$work/refuses"
nbdsh -u "$(uri alone)" -c 'h.pwrite(b"x" * 1000, 1000)' -c 'h.flush()' &
client=$!
wait_until 60 grep -q 'lost 1000 bytes that were acknowledged' "$work/alone.err" ||
    fail "nbdkit does not report the loss: $(cat "$work/alone.err")"
rm "$work/refuses"
wait "$client" || fail "the flush is not tried again"
stop_nbdkit alone
