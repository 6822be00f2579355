#!/usr/bin/env bash
# Sixteen connections to each of eight exports, over storage that is now quick,
# now slow, and refuses some requests.  Half of the clients die without goodbye,
# and others take their place.  Nobody waits forever, memory does not grow, and
# every byte is right whenever all pause: see load_client.py.
#
# A client that dies leaves no more than one request unanswered: nbdkit 1.32.5
# itself aborts, with or without filters, when it has several answers for a
# client that is gone.
#
#   LOAD_SECONDS=N      how long the clients work (15; with LONG=1, 120); an hour is fine, too
#   LOAD_CONNECTIONS=N  to each export (16)
#   LOAD_PATIENCE=N     seconds that an answer may take before the test fails and
#                       prints what each thread of nbdkit is waiting for (60)
#   SEED=N              repeat a run, as far as its timing allows

source "$(dirname "$0")/functions.sh"

if [ "${LONG:-}" = 1 ]; then : "${LOAD_SECONDS:=120}"; fi
: "${LOAD_SECONDS:=15}" "${LOAD_CONNECTIONS:=16}" "${LOAD_PATIENCE:=60}" "${SEED:=$RANDOM}"
size=$((4 * 1024 * 1024 + 777))
cluster_bits=(16 12 16 18 16 20 9 16)
# In KiB: the filter's, and what nbdkit without it has here (80 MiB of stacks and
# buffers for 128 connections, which come and go by some MiB from round to round).
most_memory=$((8192 + 49152 + LOAD_CONNECTIONS * 8 * 768))
slack=32768
# What is freed shall come back, and not be kept in eight arenas for each core.
export MALLOC_ARENA_MAX=2
# A sanitizer needs much more, and finds what is not freed in its own way.
if [ -n "${NBDKIT_PRELOAD:-}" ]; then most_memory=0; fi

# load WHAT SECONDS CLIENT-OPTION FILTER PARAMETER...: a FILTER of nbdkit's, or none
load ()
{
    local what=$1 seconds=$2 option=$3 filter=$4 number
    shift 4
    echo "$what: SEED=$SEED"
    rm -rf "$work/exports"
    mkdir "$work/exports"
    for number in "${!cluster_bits[@]}"; do
        fresh_image "$work/exports/$number" "$size" "${cluster_bits[number]}"
    done
    echo 4G >"$work/rate"
    start_nbdkit server --filter="$FILTER" ${filter:+"--filter=$filter"} \
        --filter=error --filter=delay --filter=rate file dir="$work/exports" "$@" qcowcache-size=8M qcowcache-expire=1 \
        rdelay=1ms wdelay=2ms rate-file="$work/rate" error-file="$work/refuse"
    "$PYTHON" "$(dirname "$0")/load_client.py" --server "${server_pid[server]}" \
        --socket "$work/server.sock" --directory "$work/exports" --rate-file "$work/rate" \
        --error-file "$work/refuse" --seed "$SEED" --size "$size" --seconds "$seconds" \
        --exports "${#cluster_bits[@]}" --connections "$LOAD_CONNECTIONS" ${option:+"$option"} \
        --patience "$LOAD_PATIENCE" --most-memory "$most_memory" --memory-slack "$slack" ||
        fail "$what: SEED=$SEED"
    stop_nbdkit server
    if grep -i 'qcowcache.*\(lost\|not stored\)' "$work/server.err"; then
        fail "$what: bytes are lost"
    fi
}

load "connections that share a cache" $((LOAD_SECONDS * 6 / 10)) --shared "" \
    error-pread=EIO error-pread-rate=1% error-pwrite=ENOSPC error-pwrite-rate=2% \
    error-zero=EIO error-zero-rate=5% error-trim=EIO error-trim-rate=5%
# What storage refuses when one of these ends is lost, and reported: so here it
# only refuses what is not cached.
load "connections that share nothing" $((LOAD_SECONDS * 4 / 10)) "" multi-conn \
    multi-conn-mode=disable \
    error-zero=EIO error-zero-rate=5% error-trim=EIO error-trim-rate=5%
