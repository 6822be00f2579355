#!/usr/bin/env bash
# With every filter of nbdkit, above this one and below it, a conversion ends as
# stacking.txt says: in the right image, or in an error.
#
#   STACK_ONLY=FILTER   only the lines of that filter

source "$(dirname "$0")/functions.sh"

requires_program mke2fs qemu-img
table=$(dirname "$0")/stacking.txt
filterdir=$(nbdkit --dump-config | sed -n 's/^filterdir=//p')
target=$work/target
source_bytes=$((2 << 20))
image_bytes=$((8 << 20))

make_tar_image "$work/source" "$source_bytes"
# To have holes and zeros to tell of, too.
truncate -s $((source_bytes + (1 << 20))) "$work/source"
touch "$work/present"
qemu-img convert -c -f raw -O qcow2 "$work/source" "$work/image"
truncate -s "$image_bytes" "$work/image"

# room_at FILE OFFSET: room for an image behind whatever stands first.
room_at () { truncate -s $(($2 + image_bytes + 65536)) "$1"; }

# prepare FILTER: in $target, what the filter needs to find to have a disk of 8 MiB.
prepare ()
{
    fresh_file "$target" "$image_bytes"
    case $1 in
        offset) room_at "$target" $((1 << 20)) ;;
        partition)
            room_at "$target" $((1 << 20))
            "$PYTHON" - "$target" "$image_bytes" <<'END'
import struct, sys
entry = struct.pack("<B3sB3sII", 0, b"\0\2\0", 0x83, b"\0\2\0", 2048, int(sys.argv[2]) // 512)
with open(sys.argv[1], "r+b") as disk:
    disk.seek(446)
    disk.write(entry)
    disk.seek(510)
    disk.write(b"\x55\xaa")
END
            ;;
        tar)
            fresh_file "$work/disk" "$image_bytes"
            tar -C "$work" -cf "$target" disk
            ;;
        luks)
            # qemu-img measures how fast it is first, and gives up when it got no processor.
            wait_until 60 make_luks "$target"
            ;;
        ext2)
            mkdir -p "$work/tree"
            fresh_file "$work/tree/disk" "$image_bytes"
            # Without holes, for the filter cannot make blocks of a file longer.
            dd if=/dev/zero of="$work/tree/disk" bs=1M count=8 conv=notrunc status=none
            fresh_file "$target" 16M
            mke2fs -q -F -t ext2 -d "$work/tree" "$target"
            ;;
        ddrescue) printf '0x0 + 1\n0x0 0x%x +\n' "$image_bytes" >"$work/mapfile" ;;
        extentlist) echo "0 $image_bytes" >"$work/extents" ;;
        bzip2) "$PYTHON" -c 'import bz2, sys; sys.stdout.buffer.write(bz2.compress(sys.stdin.buffer.read()))' \
            <"$work/source" >"$target" ;;
        lzip) make_lzip <"$work/source" >"$target" ;;
        gzip | xz) "$1" -c "$work/source" >"$target" ;;
        qcow2dec) cp --sparse=always "$work/image" "$target" ;;
    esac
    rm -f "$work/stats.json" "$work/pause.sock"
}

# serve POSITION FILTER COMMAND: one nbdkit with that stack; POSITION "alone"
# leaves the filter under test out.  Says in $work/said what all said.
serve ()
{
    local stack=() own=() argument word
    case $1 in
        above) stack=("--filter=$2" "--filter=$FILTER") ;;
        below) stack=("--filter=$FILTER" "--filter=$2") ;;
        alone) stack=("--filter=$2") ;;
    esac
    if [ "$1" != alone ]; then
        own=(qcowcache-stats="$work/stats.json")
        read -r -a argument <<<"${FILTER_PARAMETERS:-}"
        own+=("${argument[@]}")
    fi
    for word in "${parameters[@]}"; do
        # Ours nobody knows where the filter under test is left out.
        [[ $1 == alone && $word == qcowcache-* ]] || own+=("$word")
    done
    [ "$2" != exportname ] || stack+=(-e disk)
    timeout -k 5 60 nbdkit -U - "${stack[@]}" file "$target" "${own[@]}" \
        --run "$3" >"$work/said" 2>&1
}

export work
# For the shell that nbdkit starts.
# shellcheck disable=SC2016
convert_command='qemu-img convert -c -t none -W -m 16 -f raw -O qcow2 -o cluster_size=64k,compression_type=zlib "$work/source" "$uri"'
# shellcheck disable=SC2016
compare_command='qemu-img check -q -f qcow2 "$uri" && qemu-img compare -q -f raw -F qcow2 "$work/source" "$uri"'
# shellcheck disable=SC2016
copy_command='nbdcopy "$work/image" "$uri"'
# shellcheck disable=SC2016
read_command='nbdcopy "$uri" "$work/read" && cmp "$work/read" "$work/source"'

bad ()
{
    sed 's/^/  said: /' "$work/said" >&2
    failures+=("$cell: $*")
}

# has_error: somebody said that something has failed, or cannot be.
has_error () { grep -E -i -q 'error|failed|not permitted|read-only|denied|cannot' "$work/said"; }

from_stats () { jq ".total.$1" "$work/stats.json"; }

# right_image POSITION FILTER COMMAND: what COMMAND leaves when it writes through both,
# read through the other filter alone.
right_image ()
{
    if ! serve "$1" "$2" "$3"; then
        bad "the conversion fails"
    elif has_error; then
        bad "there was an error"
    elif [ "$(from_stats lost_bytes)" -ne 0 ]; then
        bad "bytes are lost"
    elif ! serve alone "$2" "$compare_command"; then
        bad "the image is not right"
    else
        return 0
    fi
    return 1
}

# One cell of the table: POSITION FILTER OUTCOME
check_cell ()
{
    local position=$1 filter=$2 outcome=$3 through all
    cell="$position $filter ${parameters[*]}"
    prepare "$filter"
    case $outcome in
        cached | through)
            right_image "$position" "$filter" "$convert_command" || return 0
            all=$(from_stats client_writes)
            through=$(from_stats writes_through)
            if [ "$outcome" = cached ] && [ $((through * 2)) -gt "$all" ]; then
                bad "$through of $all writes were not cached"
            elif [ "$outcome" = through ] && [ "$through" -lt "$all" ]; then
                bad "$((all - through)) of $all writes were cached"
            fi
            ;;
        copied)
            serve "$position" "$filter" "$copy_command" || bad "copying an image fails"
            cmp "$target" "$work/image" || bad "the image is not right"
            ;;
        too-late)
            serve alone "$filter" "$convert_command && $compare_command" ||
                bad "fails without the filter under test, too"
            prepare "$filter"
            if serve "$position" "$filter" "$convert_command"; then
                bad "a conversion succeeds"
            elif ! grep -q 'the connection has ended' "$work/said"; then
                bad "the reason is not reported"
            fi
            ;;
        discarded)
            cp --sparse=always "$target" "$work/before"
            serve "$position" "$filter" "$convert_command && $compare_command" ||
                bad "the image is not right while nbdkit runs"
            [ "$filter" = cache ] || cmp -s "$target" "$work/before" || bad "something was stored"
            ;;
        refused)
            if serve alone "$filter" "$convert_command"; then
                bad "not refused without the filter under test"
            fi
            prepare "$filter"
            if serve "$position" "$filter" "$convert_command"; then
                bad "not refused"
            elif ! has_error; then
                bad "no error is reported"
            fi
            ;;
        reads)
            serve "$position" "$filter" "$read_command" || bad "what is stored is not read right"
            if serve "$position" "$filter" "$convert_command"; then
                bad "a conversion succeeds"
            elif ! has_error; then
                bad "no error is reported"
            fi
            ;;
        elsewhere | untried) ;;
        *) bad "unknown outcome $outcome" ;;
    esac
}

# make_luks FILE: an empty disk behind the passphrase that the table names
make_luks ()
{
    rm -f "$1"
    qemu-img create -q -f luks --object secret,id=key,data=secret \
        -o key-secret=key,iter-time=10 "$1" "$image_bytes" 2>/dev/null
}

# make_lzip: standard input as a file of lzip's: one stream of LZMA between a head and a tail
make_lzip ()
{
    "$PYTHON" -c '
import lzma, struct, sys, zlib
data = sys.stdin.buffer.read()
lzma1 = {"id": lzma.FILTER_LZMA1, "dict_size": 1 << 20}
# The older format has a head of 13 bytes, and ends with a mark as lzip does.
stream = lzma.compress(data, format=lzma.FORMAT_ALONE, filters=[lzma1])[13:]
head = b"LZIP" + bytes([1, 20])
tail = struct.pack("<IQQ", zlib.crc32(data), len(data), len(head) + len(stream) + 20)
sys.stdout.buffer.write(head + stream + tail)'
}

# every_other_line PART: the cells of half of the table, in a directory of their own.
every_other_line ()
{
    local filter above below words line=0
    mkdir "$work/$1"
    cp --sparse=always "$work/source" "$work/image" "$work/present" "$work/$1"
    work=$work/$1
    target=$work/target
    cells=0
    failures=()
    while read -r filter above below words; do
        case $filter in
            '' | '#'*) continue ;;
        esac
        line=$((line + 1))
        [ $((line % 2)) -eq "$1" ] || continue
        [ "${STACK_ONLY:-$filter}" = "$filter" ] || continue
        [ -e "$filterdir/nbdkit-$filter-filter.so" ] || continue
        read -r -a parameters <<<"${words//@/$work}"
        check_cell above "$filter" "$above"
        check_cell below "$filter" "$below"
        cells=$((cells + 2))
    done <"$table"
    echo "$cells" >"$work/cells"
    [ ${#failures[@]} -eq 0 ] || printf '%s\n' "${failures[@]}" >"$work/failures"
}

every_other_line 0 &
every_other_line 1 &
wait

cells=$(awk '{ total += $1; parts++ } END { print parts == 2 ? total : 0 }' "$work"/[01]/cells)
[ "$cells" -gt 0 ] || fail "not all of the table was tried"
echo "$cells combinations"

# No filter of this nbdkit goes without a line.
for module in "$filterdir"/nbdkit-*-filter.so; do
    filter=${module##*/nbdkit-}
    filter=${filter%-filter.so}
    [ "$filter" = qcowcache ] || grep -q "^$filter " "$table" ||
        echo "$filter: no line in $(basename "$table")" >>"$work/failures"
done

failed=$(cat "$work"/failures "$work"/[01]/failures 2>/dev/null || :)
[ -z "$failed" ] || fail "not as the table says:
$failed"
