#!/usr/bin/env bash
# Storage that can read and write, and little else: no flush, no FUA, no trim,
# no zero, no extents.

source "$(dirname "$0")/functions.sh"

# lean_requests SERVER: what a client may do there all the same, compared with
# the file behind the server.
lean_requests ()
{
    run_client "$1" "$work/disk" <<'END'
assert client.can_flush(), "flush is the filter's own"
assert client.can_fua(), "FUA is the filter's own"
assert client.can_zero(), "zero is a write of zeros, if need be"
client.pwrite(image_header(length=512), 0)
model = Model(bytearray(image_header(length=client.get_size())))
random_requests(Client(client, model, random.Random(5), disk=arguments[0]), 120)
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
run_client server "$work/full" <<'END'
client.pwrite(b"late" * 100, 400001)
assert error_of(client.flush) == "ENOSPC", "a flush succeeded that stored nothing"
os.unlink(arguments[0])
client.flush()
END
stop_nbdkit server
[ "$(tail -c +400002 "$work/disk" | head -c 8)" = latelate ] || fail "refused bytes were not stored later"

# A conversion, on storage that knows no zeros and no flush.
make_tar_image "$work/source" 1M
fresh_file "$work/disk" 4M
sed -i 's/600123/4194304/' "$work/plugin.sh"
start_nbdkit server --filter="$FILTER" sh "$work/plugin.sh"
convert "$work/source" "$(uri server)" 64k zlib
stop_nbdkit server
image_holds "$work/disk" "$work/source"
