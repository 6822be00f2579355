#!/usr/bin/env bash
# An object store, through nbdkit's S3 plugin: every object of an image is sent
# once and whole, but for the few that a client's flushes want stored earlier.
# The store is one of the tests' own, which takes 20 ms for each request.

source "$(dirname "$0")/functions.sh"
source "$(dirname "$0")/object_store.sh"

# disk OBJECT-SIZE: the plugin's arguments for a disk in objects of that size, in $storage
disk ()
{
    storage=(S3 access-key=key secret-key=secret "endpoint-url=http://127.0.0.1:$port"
        bucket=images key=disk size=256M object-size="$1")
}

# disk_with_policy OBJECT-SIZE: the same, and what nbdkit before 1.42 does not let the plugin say
disk_with_policy ()
{
    disk "$1"
    storage=(--filter=blocksize-policy "${storage[@]}" blocksize-minimum=1
        blocksize-preferred="$1" blocksize-maximum="$1")
}

# store_holds OBJECT-SIZE SOURCE: there is an image, now in $work/image, that holds what SOURCE does
store_holds ()
{
    disk_with_policy "$1"
    nbdkit -r -U - "${storage[@]}" --run "nbdcopy --request-size=1048576 \"\$uri\" '$work/image'"
    image_holds "$work/image" "$2"
}

# upload OBJECT-SIZE SOURCE VERIFY OPTION...: converts SOURCE to the store
upload ()
{
    local object_size=$1 source=$2 verify=$3 size end objects puts gets bytes
    shift 3
    start_store
    disk_with_policy "$object_size"
    start_nbdkit server --filter="$FILTER" "${storage[@]}" qcowcache-verify="$verify"
    convert "$source" "$(uri server)" 64k zlib "$@"
    stop_nbdkit server
    [ ! -s "$work/server.err" ] || fail "nbdkit says: $(cat "$work/server.err")"
    puts=$(asked puts) gets=$(asked gets) bytes=$(asked put_bytes)
    store_holds "$object_size" "$source"
    stop_store

    size=$(numfmt --from=iec "$object_size")
    end=$(qemu-img check --output=json "$work/image" | jq '."image-end-offset"')
    objects=$(((end + size - 1) / size))
    echo "$objects objects of $object_size, verify $verify, $*: $puts PUT, $gets GET," \
        "$((bytes * 100 / (objects * size))) % of the image sent"
    [ "$puts" -le $((objects + 12)) ] || fail "more than 12 objects were sent again"
    # The few that are sent again weigh more in a small image.
    [ "$objects" -lt 40 ] || [ $((bytes * 10)) -le $((objects * size * 13)) ] ||
        fail "more was sent than 1.3 times the image"
}

# Their clusters hardly compress: the image is nearly as large as its source.
make_half_random "$work/large" 2750 60000
upload 4M "$work/large" off -W -m 16
if [ "${LONG:-}" = 1 ]; then upload 4M "$work/large" error; fi
head -c 44M "$work/large" >"$work/medium"
rm "$work/large"
upload 1M "$work/medium" off
upload 1M "$work/medium" error -W -m 16
head -c 16M "$work/medium" >"$work/small"
upload 4M "$work/small" error

# Without blocksize-policy nbdkit before 1.42 lets nobody know how large objects are.
head -c 2M "$work/small" >"$work/source"
start_store
disk 1M
start_nbdkit server --filter="$FILTER" "${storage[@]}"
convert "$work/source" "$(uri server)" 64k zlib
stop_nbdkit server
told=$(grep -c 'blocksize-policy.*object-size' "$work/server.err") || :
echo "without blocksize-policy: $(asked puts) PUT, told $told times"
if grep -q 'minimum block size' "$work/server.err"; then
    [ "$told" -eq 1 ] || fail "not one message about block sizes: $(cat "$work/server.err")"
else
    [ "$told" -eq 0 ] || fail "a message about block sizes that are known: $(cat "$work/server.err")"
fi
store_holds 1M "$work/source"
