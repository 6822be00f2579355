#!/usr/bin/env bash
# A parameter that makes no sense stops nbdkit before it serves, with one line
# that names the parameter, the value and what is allowed.

# shellcheck source-path=SCRIPTDIR source=functions.sh
source "$(dirname "$0")/functions.sh"
set -e

fresh_file "$work/disk" 1M

# refused PARAMETER VALUE ALLOWED...: the line names all of these
refused ()
{
    local parameter=$1 value=$2 allowed
    shift 2
    nbdkit_refuses --filter="$FILTER" file "$work/disk" "$parameter=$value"
    echo "$refusal"
    for allowed in "$parameter" "$value" "$@"; do
        [[ $refusal == *"$allowed"* ]] || fail "does not name '$allowed': $refusal"
    done
}

for value in junk -1 -64M 64Q 1.2.3 99999999999999999999 "64M junk" ""; do
    refused qcowcache-size "$value" size
done

for value in 256 0 1 511 513 3000 65535 4M 4194304 -512 -64K junk "64k,512" automatic ""; do
    refused qcowcache-cluster-size "$value" auto 512 2M
done

# The same through the configuration's other door, several at once: the first
# bad one is reported, and good ones before it do no harm.
nbdkit_refuses --filter="$FILTER" file "$work/disk" qcowcache-size=32M qcowcache-cluster-size=100
[[ $refusal == *qcowcache-cluster-size*100* ]] || fail "unclear: $refusal"

# Parameters that come with later features, where this build has them.
nbdkit --filter="$FILTER" null --help >"$work/help" 2>&1 </dev/null || :
has_parameter () { grep -q -- "$1" "$work/help"; }
has_parameter qcowcache-size || fail "--help does not name qcowcache-size"
has_parameter qcowcache-cluster-size || fail "--help does not name qcowcache-cluster-size"

if has_parameter qcowcache-writers; then
    for value in -1 junk 1000000 1.5 ""; do refused qcowcache-writers "$value"; done
fi
if has_parameter qcowcache-max-write; then
    for value in junk -1 0 99999999999999999999 ""; do refused qcowcache-max-write "$value"; done
fi
if has_parameter qcowcache-expire; then
    for value in junk -1 99999999999999999999 ""; do refused qcowcache-expire "$value"; done
fi
if has_parameter qcowcache-verify; then
    for value in junk on 1 ""; do refused qcowcache-verify "$value" off warn error; done
    nbdkit_refuses --filter="$FILTER" file "$work/disk" qcowcache-cluster-size=64k qcowcache-verify=error
    echo "$refusal"
    [[ $refusal == *qcowcache-cluster-size* && $refusal == *qcowcache-verify* ]] || fail "unclear: $refusal"
fi
if has_parameter qcowcache-readback; then
    for value in junk 2 ""; do refused qcowcache-readback "$value"; done
fi
if has_parameter qcowcache-stats-interval; then
    for value in junk -1 ""; do refused qcowcache-stats-interval "$value"; done
fi

# What is allowed is accepted, in the ways that nbdkit writes sizes.
for good in qcowcache-size=0 qcowcache-size=1 qcowcache-size=1G qcowcache-size=65536k \
    qcowcache-cluster-size=auto qcowcache-cluster-size=512 qcowcache-cluster-size=1M \
    qcowcache-cluster-size=2097152; do
    start_nbdkit good --filter="$FILTER" file "$work/disk" "$good"
    nbdinfo --size "$(uri good)" >/dev/null
    stop_nbdkit good
done
