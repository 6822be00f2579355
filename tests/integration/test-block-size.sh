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

# Storage whose answer nbdkit does not allow is storage that says nothing, and the operator hears
# of it once; nbdkit itself says why to each client.
cat >"$work/objects.sh" <<'END'
case "$1" in
    thread_model) echo parallel ;;
    get_size) echo 8388608 ;;
    block_size) echo 4194304 4194304 4194304 ;;
    can_write | can_flush | can_multi_conn) exit 0 ;;
    flush) ;;
    pread) dd if="$DISK" skip="$4" count="$3" iflag=skip_bytes,count_bytes status=none ;;
    pwrite) dd of="$DISK" seek="$4" oflag=seek_bytes conv=notrunc status=none bs=1M ;;
    *) exit 2 ;;
esac
END
chmod +x "$work/objects.sh"
export DISK=$work/disk
start_nbdkit server --filter="$FILTER" sh "$work/objects.sh"
for message in first second; do
    nbdinfo --no-content --json "$(uri server)" | jq -e '.exports[0] |
        ."block_size_minimum" == 1 and ."block_size_preferred" == 65536' >/dev/null ||
        fail "wrong block sizes where storage's are not allowed"
    run_client server "$message" "$work/disk" <<'END'
message, disk = arguments
client.pwrite(message.encode(), 1 << 20)
client.flush()
assert stored(disk, 1 << 20, len(message)) == message.encode()
END
done
stop_nbdkit server
[ "$(grep -c 'blocksize-policy.*blocksize-maximum=SIZE' "$work/server.err")" -eq 1 ] ||
    fail "not one message about block sizes: $(cat "$work/server.err")"

# Without a header the answer still has to let single bytes pass.
fresh_file "$work/disk" 8M
start_nbdkit server --filter="$FILTER" file "$work/disk"
nbdinfo --json "$(uri server)" | jq -e '.exports[0] |
    ."block_size_minimum" == 1 and ."block_size_preferred" >= 4096' >/dev/null ||
    fail "wrong block sizes without a header"
stop_nbdkit server
