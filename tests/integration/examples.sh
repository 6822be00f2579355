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

# Added to by the tests, as arguments for sed.
places=(-e "s|--filter=qcowcache|--filter=$FILTER|g")

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
    end_background
    rm -rf "$here"
    mkdir "$here"
    ln "$work/source" "$here/disk.raw"
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
    sed "${places[@]}" "$work/example"
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

# holds FILE...: images in $here that are sound and hold disk.raw
holds ()
{
    local file
    for file; do
        image_holds "$here/$file" "$work/source"
    done
}
