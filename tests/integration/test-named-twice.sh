#!/usr/bin/env bash
# Two of this filter in one chain would share one state: nbdkit refuses to serve.

source "$(dirname "$0")/functions.sh"

nbdkit_refuses --filter="$FILTER" --filter="$FILTER" memory 1M
echo "$refusal"
[[ $refusal == *qcowcache*twice* || $refusal == *qcowcache*once* ]] || fail "unclear: $refusal"

nbdkit_refuses --filter="$FILTER" --filter=nofilter --filter="$FILTER" memory 1M qcowcache-size=1M
[[ $refusal == *qcowcache*twice* || $refusal == *qcowcache*once* ]] || fail "unclear: $refusal"
