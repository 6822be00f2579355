#!/usr/bin/env bash
# The man page's example with an object store, run as it stands there, except that
# the store is one of the tests' own.  Where nobody answers it fails.

source "$(dirname "$0")/functions.sh"
source "$(dirname "$0")/object_store.sh"
source "$(dirname "$0")/examples.sh"

# What ~/.aws would say.
export AWS_ACCESS_KEY_ID=key AWS_SECRET_ACCESS_KEY=secret

start_store
places+=(-e "s|https://storage.example.com|http://127.0.0.1:$port|")
at_example
run_example "Objects in S3"
puts=$(asked puts)
echo "$puts PUT for an image of 22 MiB at most"
[ "$puts" -le $((6 + 12)) ] || fail "more than 12 objects were sent again"

stop_store
at_example
in_vain "Objects in S3"
