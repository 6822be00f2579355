# shellcheck shell=bash
# nbdkit-qcowcache-filter: an object store of the tests' own, which takes 20 ms for
# each request and counts them: see s3_server.py.
#
# A test sources functions.sh first.

: "${work:?functions.sh comes first}"

nbdkit S3 --version >/dev/null 2>&1 || fail "nbdkit's S3 plugin is missing: ./bootstrap check installs it"
"$PYTHON" -c 'import boto3' 2>/dev/null || fail "Python's boto3 is missing: ./bootstrap check installs it"

# Nobody asks for a password, a proxy, or a machine in the cloud.
export AWS_EC2_METADATA_DISABLED=true AWS_MAX_ATTEMPTS=1 AWS_DEFAULT_REGION=us-east-1
export no_proxy=127.0.0.1 NO_PROXY=127.0.0.1

# start_store: an empty one, at $port
start_store ()
{
    rm -f "$work/port"
    "$PYTHON" "$(dirname "$0")/s3_server.py" "$work/port" 20 2>"$work/store.err" &
    store_pid=$!
    wait_until 30 test -s "$work/port" || fail "the store does not start: $(cat "$work/store.err")"
    port=$(cat "$work/port")
}

stop_store ()
{
    if [ -n "${store_pid:-}" ]; then
        kill "$store_pid"
        wait "$store_pid" || :
        store_pid=
    fi
}
cleanup_fn stop_store

# asked WHAT: one of the counts of the store, see s3_server.py
asked ()
{
    python "$port" "$1" <<'END'
import json, sys, urllib.request
port, what = sys.argv[1:]
with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/counts") as counts:
    print(json.load(counts)[what])
END
}
