#!/usr/bin/env bash
# A compressed cluster that was good is looked at again when its bytes change,
# and whoever uploads the same damage again is told again.  With
# qcowcache-verify=all the whole image is checked, also where nobody can write.

source "$(dirname "$0")/functions.sh"

make_tar_image "$work/source" 4M
convert "$work/source" "$work/zlib.qcow2" 64k zlib
convert "$work/source" "$work/zstd.qcow2" 64k zstd

# changes SOCKET IMAGE KIND: of the clusters of an image that has had a good flush
cat >"$work/changes.py" <<'END'
import sys
from nbd_clients import connect, error_of
from qcow2 import CompressedClusters

socket, image, kind = sys.argv[1:]
good = open(image, "rb").read()
good += bytes(-len(good) % 65536 + 65536)
streams = CompressedClusters(good).streams()
client = connect(socket)

def flush_succeeds():
    error = error_of(client.flush)
    assert error in (None, "EIO"), error
    return not error

def upload(bytes):
    for begin in range(0, len(bytes), 65536):
        client.pwrite(bytes[begin:begin + 65536], begin)

if kind == "upload damage":
    damaged = bytearray(good)
    damaged[streams[7]:streams[7] + 400] = b"\xff" * 400
    upload(bytes(damaged))
    assert not flush_succeeds(), "the damage is not noticed"
    sys.exit()
if kind == "upload":
    upload(good)
    assert flush_succeeds(), "the good image is refused"
# The others find it where an earlier connection has left it.
offset = streams[5] & ~4095
if kind == "write":
    client.pwrite(b"\xff" * 8192, offset)
elif kind == "zero":
    client.zero(8192, offset)
elif kind == "trim":
    client.trim(8192, offset)
if kind != "upload":
    assert not flush_succeeds(), f"{kind}: the damage is not noticed"
    client.pwrite(good[offset:offset + 8192], offset)
    assert flush_succeeds(), f"{kind}: repaired, and refused"
client.shutdown()
END
changes () { "$PYTHON" "$work/changes.py" "$work/server.sock" "$work/$type.qcow2" "$1"; }

# Where requests come one at a time no check waits for data that may be late.
serve () { start_nbdkit server --filter="$FILTER" --filter=noparallel file "$work/disk" qcowcache-verify=error; }

for type in zlib zstd; do
    echo "$type: changes after a good flush"
    fresh_file "$work/disk" 16M
    serve
    for kind in upload write zero trim; do changes "$kind"; done
    stop_nbdkit server
    echo "$type: changes of an image that was there before"
    serve
    for kind in write zero trim; do changes "$kind"; done
    stop_nbdkit server
    image_holds "$work/disk" "$work/source"

    echo "$type: the same damage once more, over itself, by the same server and by another"
    for _ in 1 2; do
        serve
        changes "upload damage"
        changes "upload damage"
        stop_nbdkit server
    done

    echo "$type: the whole image, read only"
    flush_all ()
    {
        # nbdkit sets $uri.
        # shellcheck disable=SC2016
        nbdkit -U - -r --filter="$FILTER" file "$1" qcowcache-verify="$2" --run 'nbdsh -u "$uri" -c "h.flush()"' \
            >"$work/flush.out" 2>&1
    }
    cp "$work/disk" "$work/before"
    ! flush_all "$work/disk" all || fail "the damage is not found"
    grep -q "qcowcache: export \"\": the compressed cluster at host offset" "$work/flush.out" ||
        fail "not said where: $(cat "$work/flush.out")"
    cmp "$work/disk" "$work/before"
    flush_all "$work/$type.qcow2" all || fail "a good image is refused: $(cat "$work/flush.out")"
    ! grep qcowcache "$work/flush.out" || fail "something is said about a good image"
    # Whoever only looks, and does not flush, asks for nothing.
    # shellcheck disable=SC2016
    nbdkit -U - --filter="$FILTER" file "$work/disk" qcowcache-verify=all --run 'nbdinfo --size "$uri"' \
        >"$work/info.out" 2>&1
    ! grep "cannot be read" "$work/info.out" || fail "checked for an onlooker"
done
