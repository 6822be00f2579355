#!/usr/bin/env bash
# Storage that refuses requests which do not fit its blocks: clients may send
# what they like, with and without a qcow2 image.

source "$(dirname "$0")/functions.sh"

for minimum in 512 4096 64K; do
    echo "blocks of $minimum"
    policy=(blocksize-minimum="$minimum" blocksize-preferred=64K blocksize-error-policy=error)
    # No image: nothing is cached, but every request is made to fit.  The file
    # is no whole number of blocks, and what does not fit cannot be used.
    for header in none 64K; do
        parameters=()
        if [ "$header" = 64K ]; then parameters=(qcowcache-cluster-size=64K); fi
        fresh_file "$work/disk" $(((3 << 20) + 300))
        start_nbdkit server --filter="$FILTER" --filter=blocksize-policy --filter=log file "$work/disk" \
            "${policy[@]}" logfile="$work/below.log" "${parameters[@]}"
        run_client server "$work/disk" <<'END'
size = client.get_size()
assert size == 3 << 20, f"size {size}"
random_requests(Client(client, Model(bytearray(size)), random.Random(3), disk=arguments[0]), 400, first=0)
END
        stop_nbdkit server
    done
done

echo "requests of at most 128K"
for parameters in "" "qcowcache-cluster-size=64K" "qcowcache-cluster-size=2M"; do
    read -r -a more <<<"$parameters"
    fresh_file "$work/disk" 16M
    start_nbdkit server --filter="$FILTER" --filter=blocksize-policy file "$work/disk" \
        blocksize-minimum=512 blocksize-maximum=128K blocksize-error-policy=error "${more[@]}"
    python "$work/server.sock" "$work/disk" <<'END'
import nbd, random, sys
from nbd_clients import Model, connect, stored
random.seed(4)
model = Model(bytearray(16 << 20))
client = connect(sys.argv[1], strict=False)
data = random.randbytes(5 << 20)
client.pwrite(data, 1001)
client.pwrite(data, 6 << 20, nbd.CMD_FLAG_FUA)
model.is_(1001, data)
model.is_(6 << 20, data)
model.same(client.pread(5 << 20, 1001), 1001, "read")
client.zero(3 << 20, 100003)
model.is_(100003, bytes(3 << 20))
client.flush()
model.same(client.pread(16 << 20, 0), 0, "read after a flush")
model.same(stored(sys.argv[2], 0, 16 << 20), 0, "stored after a flush")
END
    stop_nbdkit server
done
