#!/usr/bin/env bash
# The man page's check of an image that is there already, as it stands there.

# shellcheck source-path=SCRIPTDIR source=functions.sh
source "$(dirname "$0")/functions.sh"
# shellcheck source-path=SCRIPTDIR source=examples.sh
source "$(dirname "$0")/examples.sh"
set -e

title="An image that is there already"
at_example
convert "$here/disk.raw" "$here/disk.qcow2" 64k zlib
run_example "$title"
holds disk.qcow2

echo "the same with one cluster that cannot be read"
python "$here/disk.qcow2" <<'END'
import struct, sys
with open(sys.argv[1], "r+b") as file:
    image = file.read()
    l1 = struct.unpack(">Q", image[40:48])[0]
    l2 = struct.unpack(">Q", image[l1:l1 + 8])[0] & 0x00fffffffffffe00
    entry = next(e for e in struct.unpack(">8192Q", image[l2:l2 + 65536]) if e >> 62 & 1)
    file.seek(entry & (1 << 54) - 1)
    file.write(b"\xff" * 100)
END
qemu-img check -q "$here/disk.qcow2" || fail "qemu-img check looks at data: the page says that it does not"
! (run_example "$title") || fail "the damage is not found"
