#!/usr/bin/env bash
# What clients are told about sizes: single bytes are welcome (qemu reads and
# rewrites sectors otherwise), whole units preferred, and no limit given.

source "$(dirname "$0")/functions.sh"

# answers PREFERRED NBDKIT-ARGUMENT...
answers ()
{
    local preferred=$1
    shift
    start_nbdkit server --filter="$FILTER" "$@"
    nbdinfo --json "$(uri server)" >"$work/answers"
    stop_nbdkit server
    jq -e --argjson preferred "$preferred" '.exports[0] |
        ."block_size_minimum" == 1 and
        ."block_size_preferred" == $preferred and
        ."block_size_maximum" == 4294967295' "$work/answers" >/dev/null ||
        fail "$*: $(jq -c '.exports[0] | with_entries(select(.key | startswith("block_size")))' "$work/answers")"
}

fresh_file "$work/disk" 8M
answers 65536 file "$work/disk" qcowcache-cluster-size=512
answers 65536 file "$work/disk" qcowcache-cluster-size=64K
answers 2097152 file "$work/disk" qcowcache-cluster-size=2M
# Nothing is read as long as nobody asks for data, so no header is known here.
for bits in 9 12 16 21; do
    write_header "$work/disk" "$bits"
    answers 65536 file "$work/disk"
done

write_header "$work/disk" 16
answers 65536 --filter=blocksize-policy file "$work/disk" \
    blocksize-minimum=4096 blocksize-preferred=4096 blocksize-error-policy=error
answers 262144 --filter=blocksize-policy file "$work/disk" \
    blocksize-minimum=4096 blocksize-preferred=256K blocksize-error-policy=error

# Without a header the answer still has to let single bytes pass.
fresh_file "$work/disk" 8M
start_nbdkit server --filter="$FILTER" file "$work/disk"
nbdinfo --json "$(uri server)" | jq -e '.exports[0] |
    ."block_size_minimum" == 1 and ."block_size_preferred" >= 4096' >/dev/null ||
    fail "wrong block sizes without a header"
stop_nbdkit server
