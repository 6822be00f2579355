#!/usr/bin/env bash
# Storage that can read and write, and little else: no flush, no FUA, no trim,
# no zero, no extents.

# shellcheck source-path=SCRIPTDIR source=functions.sh
source "$(dirname "$0")/functions.sh"
set -e

# lean_requests SERVER: what a client may do there all the same, compared with
# the file behind the server.
lean_requests ()
{
    python "$work/$1.sock" "$work/disk" <<'END'
import nbd, random, struct, sys
random.seed(5)
client = nbd.NBD()
client.add_meta_context("base:allocation")
client.connect_unix(sys.argv[1])
assert client.can_flush(), "flush is the filter's own"
assert client.can_fua(), "FUA is the filter's own"
assert client.can_zero(), "zero is a write of zeros, if need be"
size = client.get_size()
model = bytearray(size)
header = bytearray(512)
header[0:8] = b"QFI\xfb" + struct.pack(">I", 3)
header[20:32] = struct.pack(">IQ", 16, 1 << 20)
header[96:104] = struct.pack(">II", 4, 112)
client.pwrite(bytes(header), 0)
model[:512] = header
for step in range(120):
    length = random.choice([1, 512, 5000, 65536])
    offset = random.choice([random.randrange(512, size - length), size - length])
    kind = random.choice("wwwwwwFzzrf")
    if kind in "wF":
        data = random.randbytes(length)
        client.pwrite(data, offset, nbd.CMD_FLAG_FUA if kind == "F" else 0)
        model[offset:offset + length] = data
    elif kind == "z":
        client.zero(length, offset)
        model[offset:offset + length] = bytes(length)
    elif kind == "f":
        client.flush()
    else:
        assert client.pread(length, offset) == model[offset:offset + length], f"step {step}"
    if kind in "Ff":
        with open(sys.argv[2], "rb") as stored:
            held = stored.read()
        if kind == "f":
            assert held == model, f"step {step}: not stored after a flush"
        else:
            assert held[offset:offset + length] == model[offset:offset + length], f"step {step}: not stored"
client.flush()
with open(sys.argv[2], "rb") as stored:
    assert stored.read() == model
END
}

cat >"$work/plugin.sh" <<END
#!/bin/sh
case "\$1" in
    thread_model) echo parallel ;;
    get_size) echo 600123 ;;
    pread) dd if="$work/disk" iflag=skip_bytes,count_bytes skip="\$4" count="\$3" status=none ;;
    can_write) exit 0 ;;
    pwrite) dd of="$work/disk" oflag=seek_bytes seek="\$4" conv=notrunc status=none ;;
    *) exit 2 ;;
esac
END
chmod +x "$work/plugin.sh"

fresh_file "$work/disk" 600123
start_nbdkit server --filter="$FILTER" sh "$work/plugin.sh"
lean_requests server
stop_nbdkit server

echo "the same from a plugin that tells its reason when it fails"
fresh_file "$work/disk" 600123
start_nbdkit server --filter="$FILTER" eval get_size="echo 600123" \
    pread="dd if=$work/disk iflag=skip_bytes,count_bytes skip=\$4 count=\$3 status=none" \
    pwrite="if [ -e $work/full ]; then echo ENOSPC no room >&2; exit 1; fi
            dd of=$work/disk oflag=seek_bytes seek=\$4 conv=notrunc status=none"
lean_requests server
touch "$work/full"
python "$work/server.sock" "$work/full" <<'END'
import errno, nbd, os, sys
client = nbd.NBD()
client.connect_unix(sys.argv[1])
client.pwrite(b"late" * 100, 400001)
try:
    client.flush()
except nbd.Error as error:
    assert error.errnum == errno.ENOSPC, error.errno
else:
    raise SystemExit("a flush succeeded that stored nothing")
os.unlink(sys.argv[2])
client.flush()
END
stop_nbdkit server
[ "$(tail -c +400002 "$work/disk" | head -c 8)" = latelate ] || fail "refused bytes were not stored later"

# The file plugin, made lean in one respect at a time.
for lean in noextents nozero nocache fua "fua fuamode=emulate" "nozero zeromode=emulate" \
    "nozero fastzeromode=none" "multi-conn multi-conn-mode=disable"; do
    read -r filter parameter <<<"$lean"
    fresh_file "$work/disk" 600123
    start_nbdkit server --filter="$FILTER" --filter="$filter" file "$work/disk" ${parameter:+"$parameter"}
    lean_requests server
    stop_nbdkit server
done

# A conversion, on storage that knows no zeros and no flush.
make_tar_image "$work/source" 1M
fresh_file "$work/disk" 4M
sed -i 's/600123/4194304/' "$work/plugin.sh"
start_nbdkit server --filter="$FILTER" sh "$work/plugin.sh"
convert "$work/source" "$(uri server)" 64k zlib
stop_nbdkit server
image_holds "$work/disk" "$work/source"
