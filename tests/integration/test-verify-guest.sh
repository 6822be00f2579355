#!/usr/bin/env bash
# Guests that write compressed and other clusters, discard, zero, take
# snapshots and resize are not disturbed by qcowcache-verify=error.
#
# LONG=1: ten minutes and more of random activity instead of some seconds.

source "$(dirname "$0")/functions.sh"

target=$work/target.qcow2
steps=400
[ "${LONG:-}" != 1 ] || steps=150000

# activity SEED STEPS: qemu-io commands, and what they leave behind in $work/expected
activity ()
{
    python "$1" "$2" "$work/expected" "$work/used" <<'END'
import json, os, random, sys
random.seed(int(sys.argv[1]))
expected = open(sys.argv[3], "r+b")
unit = 65536
clusters = (256 << 20) // unit
used = set(json.load(open(sys.argv[4]))) if os.path.exists(sys.argv[4]) else set()
for step in range(int(sys.argv[2])):
    kind = random.choice("cccccwwwdzf")
    at = random.randrange(clusters - 8)
    pattern = step % 255 + 1
    if kind == "c":
        # qemu does not write a compressed cluster over another one.
        if at in used:
            kind = "w"
        else:
            print(f"write -q -c -P {pattern} {at * unit} {unit}")
            expected.seek(at * unit)
            expected.write(bytes([pattern]) * unit)
    if kind == "w":
        offset = at * unit + random.randrange(unit // 512) * 512
        length = random.randrange(1, 256) * 512
        print(f"write -q -P {pattern} {offset} {length}")
        expected.seek(offset)
        expected.write(bytes([pattern]) * length)
    elif kind == "z":
        length = random.randrange(1, 6) * unit
        print(f"write -q -z {at * unit} {length}")
        expected.seek(at * unit)
        expected.write(bytes(length))
    elif kind == "d":
        print(f"discard -q {at * unit} {unit}")
        expected.seek(at * unit)
        expected.write(bytes(unit))
    elif kind == "f":
        print("flush")
    if kind in "cwzd":
        used.update(range(at, at + 6))
json.dump(sorted(used), open(sys.argv[4], "w"))
END
}

# run_activity SEED STEPS
run_activity ()
{
    activity "$1" "$2" >"$work/commands"
    qemu-io -d unmap -f qcow2 "$(uri server)" <"$work/commands" >"$work/qemu-io.out" 2>&1 ||
        fail "qemu-io fails: $(tail -n 3 "$work/qemu-io.out")"
    ! grep -i 'error\|failed' "$work/qemu-io.out" || fail "qemu-io reports an error"
}

for type in zlib zstd; do
    echo "$type"
    fresh_file "$work/expected" 256M
    rm -f "$work/used"
    fresh_file "$target" 1G
    start_nbdkit server --filter="$FILTER" file "$target" qcowcache-verify=error
    qemu-img create -q -f qcow2 -o "compression_type=$type" "$(uri server)" 256M
    for round in 1 2 3; do
        run_activity "$round" "$((steps / 3))"
        qemu-img check -q -f qcow2 "$(uri server)" || fail "the image is corrupt"
        qemu-img snapshot -c "after-$round" "$(uri server)"
    done
    qemu-img snapshot -d after-2 "$(uri server)"
    run_activity 4 50
    qemu-img resize -q -f qcow2 "$(uri server)" 40G
    qemu-io -f qcow2 -c "write -q -c -P 77 30G 64k" -c flush -c "read -q -P 77 30G 64k" "$(uri server)"
    qemu-img resize -q -f qcow2 --shrink "$(uri server)" 256M
    run_activity 5 50
    qemu-img compare -q -f qcow2 -F raw "$(uri server)" "$work/expected" || fail "not what was written"
    qemu-img snapshot -a after-1 "$(uri server)"
    stop_nbdkit server
    ! grep qcowcache "$work/server.err" || fail "an alarm for a guest that did nothing wrong"
    qemu-img check -q -f qcow2 "$target" || fail "the image is corrupt"
done
