#!/usr/bin/env bash
# Block status shows what is cached as data, before it is stored, and what is a
# hole on storage as a hole.

source "$(dirname "$0")/functions.sh"

fresh_image "$work/disk" 16M 16
start_nbdkit server --filter="$FILTER" file "$work/disk"
run_client server <<'END'
def data_bytes(client):
    """Offsets of all extents that may hold something, as (begin, end)."""
    found = []
    position = 0
    size = client.get_size()
    while position < size:
        entries = []
        client.block_status(size - position, position,
                            lambda context, offset, pairs, error: entries.extend(pairs))
        assert entries
        for length, flags in zip(entries[0::2], entries[1::2]):
            if not flags & nbd.STATE_ZERO:
                found.append((position, position + length))
            position += length
    return found

def shows(client, offset, length):
    remaining = set(range(offset, offset + length))
    for begin, end in data_bytes(client):
        remaining -= set(range(max(begin, offset), min(end, offset + length)))
    return not remaining

other = connect(address)

client.pwrite(b"x" * 1000, (1 << 20) + 77)
client.pwrite(b"y" * 70000, 5 << 20)
client.pwrite(b"z", (16 << 20) - 1)
for asking in client, other:
    assert shows(asking, (1 << 20) + 77, 1000), "cached bytes are shown as zeros"
    assert shows(asking, 5 << 20, 70000), "cached bytes are shown as zeros"
    assert shows(asking, (16 << 20) - 1, 1), "the last byte is shown as zero"
    # Half of the export at least is a hole and must stay usable as one.
    total = sum(end - begin for begin, end in data_bytes(asking))
    assert total < 1 << 20, f"{total} bytes are shown as data"

client.flush()
assert shows(other, (1 << 20) + 77, 1000)
assert shows(other, (16 << 20) - 1, 1)

# Zeros over cached bytes: either answer is true, but the bytes must be zeros.
client.pwrite(b"w" * 5000, 9 << 20)
client.zero(65536, 9 << 20)
assert other.pread(5000, 9 << 20) == bytes(5000)
client.pwrite(b"v", (9 << 20) + 4000)
assert shows(other, (9 << 20) + 4000, 1)
END
# Tools that copy by block status find the same bytes.
nbdcopy "$(uri server)" "$work/copy"
stop_nbdkit server
cmp "$work/copy" "$work/disk"

# Storage that cannot tell, or does not: everything is data.
start_nbdkit server --filter="$FILTER" --filter=noextents file "$work/disk"
nbdinfo --map --json "$(uri server)" | jq -e 'all(.type == 0)' >/dev/null ||
    fail "zeros are shown that storage did not report"
nbdcopy "$(uri server)" "$work/copy"
stop_nbdkit server
cmp "$work/copy" "$work/disk"
