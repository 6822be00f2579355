# shellcheck shell=bash
# nbdkit-qcowcache-filter: runs the examples of the man page as they stand there.
#
# A test sources functions.sh first.  Every example has a directory of its own,
# $here, with what the page takes for granted in it: disk.raw.
#
# Only places are replaced, in one list: see as_here.

: "${work:?functions.sh comes first}"

manual=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/filter/nbdkit-qcowcache-filter.pod

here=$work/here
make_tar_image "$work/source" 22M
truncate -s 24M "$work/source"

# How many bytes an image of it takes on disk, for each compression type.
declare -A room=()
for type in zlib zstd; do
    qemu-img convert -c -f raw -O qcow2 -o compression_type=$type "$work/source" "$work/measured"
    room[$type]=$(($(stat -c '%b * %B' "$work/measured")))
done
rm "$work/measured"

# Added to by the tests, as arguments for sed.
places=(-e "s|--filter=qcowcache|--filter=$FILTER|g")
# What fails changes more than places, and the size of the file that it makes; see fails.
changes=()
image_size=$((1 << 30))

# What an example has sent to the background ends with the test.
end_background ()
{
    local file pid
    for file in "$here"/*.pid; do
        [ -e "$file" ] || continue
        pid=$(cat "$file")
        # Only what named this file: the number may be another's by now.
        if grep -q -s -a -F "$(basename "$file")" "/proc/$pid/cmdline"; then
            kill -KILL "$pid" 2>/dev/null || :
        fi
    done
}
cleanup_fn end_background

# at_example: a new directory for the next one
at_example ()
{
    leave_example
    mkdir "$here"
    ln "$work/source" "$here/disk.raw"
}

leave_example ()
{
    end_background
    unmount "$here"
    rm -rf "$here"
}

# at_full_disk SIZE: the same on a filesystem of that size, or false where there is none
at_full_disk ()
{
    leave_example
    small_filesystem "$here" "$1" || return 1
    touch "$here/disk.raw"
    mount --bind "$work/source" "$here/disk.raw"
}

# example TITLE: the verbatim paragraphs of the section with that head, in their
# order; each begins with a line "#: N", its number.
example ()
{
    awk -v title="$1" '
        /^=head/ { inside = ($0 ~ /^=head[12] / && substr($0, 8) == title); next }
        inside && /^ / { if (!block) print "#: " ++number; block = 1; print substr($0, 2); next }
        inside && /^$/ { if (block) print ""; next }
        { block = 0 }' "$manual" >"$work/example"
    [ -s "$work/example" ] || fail "the man page has no example \"$1\""
    sed "${places[@]}" "${changes[@]}" "$work/example"
}

# paragraph N: that paragraph alone, of an example on standard input
paragraph ()
{
    awk -v wanted="#: $1" '/^#: / { inside = ($0 == wanted); next } inside'
}

# run_here: the shell commands on standard input, in $here
run_here ()
{
    cat >"$work/commands"
    echo "--- $(cat "$work/commands")"
    (cd "$here" && bash -eu -o pipefail "$work/commands" </dev/null) ||
        fail "the example fails"
}

# run_example TITLE: all of its paragraphs, as shell commands
run_example ()
{
    echo "=== $1"
    example "$1" | run_here
}

# fails_here: the shell commands on standard input have to end with another status than 0, as
# they would where they are typed: in a shell that goes on after a failure.  A file that they make
# stays as large as it is, and no server stays.
fails_here ()
{
    local status=0 file
    cat >"$work/commands"
    (cd "$here" && bash "$work/commands" </dev/null) >"$work/said" 2>&1 || status=$?
    [ "$status" -ne 0 ] ||
        fail "a failure ends with status 0: $(cat "$work/commands"; tail -n 30 "$work/said")"
    if grep -q '^truncate ' "$work/commands"; then
        find "$here" -name '*.qcow2' -size "-$((image_size / 1024 - 1))k" >"$work/cut"
        [ ! -s "$work/cut" ] || fail "a bad image is cut: $(cat "$work/cut" "$work/commands")"
    fi
    if grep -q '^kill ' "$work/commands"; then
        for file in "$here"/*.pid; do
            [ ! -e "$file" ] || ! kill -0 "$(cat "$file")" 2>/dev/null || fail "$file still runs"
        done
    fi
}

in_vain () { example "$1" | fails_here; }

# fails TITLE [TYPE [COMMAND]]: COMMAND TITLE (in_vain: all paragraphs, in one shell) where no server
# starts, where the target is too small, and on disks that are full soon, and near the end of an image
# of that compression type (zlib).
fails ()
{
    local situation
    echo "=== $1, in vain"
    for situation in 'no server' 'too small' 'full soon' 'full late'; do
        changes=()
        image_size=$((1 << 30))
        case $situation in
            'no server')
                at_example
                changes=(-e "s|--filter=[^ ]*|--filter=$work/no-filter.so|g")
                ;;
            'too small')
                at_example
                image_size=$((4 << 20))
                changes=(-e 's/truncate -s 1G /truncate -s 4M /' -e 's/create-size=1G/create-size=4M/')
                ;;
            'full soon') at_full_disk 4M || return 0 ;;
            'full late') at_full_disk $((room[${2:-zlib}] - 131072)) ;;
        esac
        "${3:-in_vain}" "$1"
        echo "$situation: refused: $(tail -n 1 "$work/said")"
    done
    changes=()
}

# holds FILE...: images in $here that are sound and hold disk.raw
holds ()
{
    local file
    for file; do
        image_holds "$here/$file" "$work/source"
    done
}
