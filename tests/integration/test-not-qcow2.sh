#!/usr/bin/env bash
# Whatever does not begin with a qcow2 header passes through untouched: storage
# receives exactly the client's requests, each before it is acknowledged.

source "$(dirname "$0")/functions.sh"

fresh_file "$work/empty" 5M
passes_unchanged "$work/empty"

make_tar_image "$work/tar" 5M
passes_unchanged "$work/tar"

fresh_file "$work/almost" 5M
printf 'QFI\xfa\0\0\0\3' | dd of="$work/almost" conv=notrunc status=none
passes_unchanged "$work/almost"

# The magic number elsewhere means nothing.
fresh_image "$work/elsewhere" 5M 16
dd if="$work/elsewhere" of="$work/shifted" bs=512 seek=1 count=1 conv=notrunc status=none
truncate -s 5M "$work/shifted"
passes_unchanged "$work/shifted"

# The same comparison must tell the difference where there is one.
cached=$(passes_unchanged "$work/elsewhere" 2>&1) || :
[[ $cached == *"other requests"* ]] ||
    fail "requests are not cached behind a header, or the comparison sees nothing: $cached"
