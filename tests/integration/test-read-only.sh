#!/usr/bin/env bash
# nbdkit -r, and storage that can only be read.

source "$(dirname "$0")/functions.sh"

make_tar_image "$work/source" 8M
convert "$work/source" "$work/image.qcow2" 64k zstd
cp "$work/image.qcow2" "$work/before"

# refuses_writes SERVER
refuses_writes ()
{
    nbdinfo --json "$(uri "$1")" | jq -e '.exports[0]."is_read_only"' >/dev/null ||
        fail "not shown as read-only"
    qemu-img compare -q -f raw -F qcow2 "$work/source" "$(uri "$1")"
    python "$work/$1.sock" <<'END'
import sys
from nbd_clients import connect, error_of
client = connect(sys.argv[1], strict=False)
for request in (lambda: client.pwrite(b"x" * 100, 5000),
                lambda: client.zero(65536, 65536),
                lambda: client.trim(65536, 65536)):
    assert error_of(request) in ("EPERM", "EROFS"), "a write to a read-only export succeeded"
assert client.pread(512, 0)[:4] == b"QFI\xfb"
END
}

start_nbdkit server -r --filter="$FILTER" file "$work/image.qcow2"
refuses_writes server
stop_nbdkit server

start_nbdkit server --filter="$FILTER" eval open="echo 1" get_size="stat -Lc %s $work/image.qcow2" \
    pread="dd if=$work/image.qcow2 iflag=skip_bytes,count_bytes skip=\$4 count=\$3 status=none"
refuses_writes server
stop_nbdkit server

cmp "$work/image.qcow2" "$work/before"
