#!/usr/bin/env bash
# Clients that write large pieces anyway, as an uncompressed conversion and nbdcopy
# do: storage gets no more requests than without the filter, whatever the memory,
# and the same bytes.

source "$(dirname "$0")/functions.sh"

# requests CHAIN...: what `fill` costs storage below CHAIN, as $writes
requests ()
{
    rm -f "$work/below.log"
    fresh_file "$work/disk" 48M
    start_nbdkit server "$@" --filter=log file "$work/disk" logfile="$work/below.log" \
        "${parameters[@]}"
    fill "nbd+unix:///?socket=$work/server.sock"
    stop_nbdkit server
    writes=$(count_log "$work/below.log" writes)
}

# no_more NAME: through the filter in its sizes of memory, against without
no_more ()
{
    local size writers
    parameters=()
    requests
    local alone=$writes
    cp "$work/disk" "$work/expected"
    for size in 1M 64M; do
        for writers in 0 4; do
            parameters=("qcowcache-size=$size" "qcowcache-writers=$writers")
            requests --filter="$FILTER"
            echo "$1, $size, $writers writers: $writes writes, $alone without the filter"
            # What background writers find complete when they look is a matter of moments.
            [ "$writes" -le $((alone + (writers > 0 ? alone / 20 : 0))) ] || fail "$1: $writes writes, $alone without the filter"
            cmp "$work/disk" "$work/expected"
        done
    done
}

$PYTHON -c "
import random, sys
random.seed(3)
with open(sys.argv[1], 'wb') as file:
    for mebibyte in range(32):
        file.seek((mebibyte << 20) + (mebibyte % 4 << 16))
        file.write(random.randbytes(1 << 20 if mebibyte % 3 else 300 << 10))
    file.truncate(32 << 20)
" "$work/guest"
qemu-img convert -f raw -O qcow2 "$work/guest" "$work/image"

fill ()
{
    qemu-img convert -f raw -O qcow2 "$work/guest" "$1"
}
no_more "an uncompressed conversion"

fill ()
{
    nbdcopy --request-size=8388608 --connections=1 --requests=1 "$work/image" "$1"
}
truncate -s 48M "$work/image"
no_more "nbdcopy with requests of 8M"
