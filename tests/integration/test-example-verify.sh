#!/usr/bin/env bash
# The man page's check of an image that is there already, as it stands there.

source "$(dirname "$0")/functions.sh"
source "$(dirname "$0")/examples.sh"

title="An image that is there already"
at_example
convert "$here/disk.raw" "$here/disk.qcow2" 64k zlib
run_example "$title"
holds disk.qcow2

echo "the same with one cluster that cannot be read"
python "$here/disk.qcow2" <<'END'
import sys
from qcow2 import CompressedClusters
with open(sys.argv[1], "r+b") as file:
    file.seek(CompressedClusters(file.read()).streams()[0])
    file.write(b"\xff" * 100)
END
qemu-img check -q "$here/disk.qcow2" || fail "qemu-img check looks at data: the page says that it does not"
! (run_example "$title") || fail "the damage is not found"
