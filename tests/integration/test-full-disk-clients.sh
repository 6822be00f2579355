#!/usr/bin/env bash
# A disk that runs full under a backup job with compression, and under nbdcopy into
# qemu-nbd's compress driver: each ends in an error wherever it does so without the
# filter.
#
#   LONG=1   every twentieth of the room that the image needs

# shellcheck disable=SC2034  # for functions.sh
own_mounts=1
# shellcheck source-path=SCRIPTDIR source=functions.sh
source "$(dirname "$0")/functions.sh"
set -e

requires_program qemu-storage-daemon
"$PYTHON" -c "
import random, sys
random.seed(9)
with open(sys.argv[1], 'wb') as file:
    for cluster in range(320):
        file.write(random.randbytes(40000) + bytes((1 << 16) - 40000))
" "$work/source"

# Each writes $work/source to the image behind $work/server.sock.
backup ()
{
    timeout 120 "$PYTHON" - "$work" <<'END'
import json, subprocess, sys
work = sys.argv[1]
daemon = subprocess.Popen(
    ["qemu-storage-daemon", "--chardev", "stdio,id=monitor", "--monitor", "chardev=monitor",
     "--blockdev", f"driver=file,node-name=source,filename={work}/source,read-only=on",
     "--blockdev", f"driver=nbd,node-name=nbd,server.type=unix,server.path={work}/server.sock",
     "--blockdev", "driver=qcow2,node-name=target,file=nbd"],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

def send(command, **arguments):
    daemon.stdin.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
    daemon.stdin.flush()

def until(wanted):
    for line in daemon.stdout:
        message = json.loads(line)
        if "error" in message or wanted(message):
            return message
    raise SystemExit("qemu-storage-daemon has ended")

until(lambda message: "QMP" in message)
send("qmp_capabilities")
until(lambda message: "return" in message)
send("blockdev-backup", **{"job-id": "backup", "device": "source", "target": "target",
                           "sync": "full", "compress": True, "auto-dismiss": False})
until(lambda message: message.get("event") == "JOB_STATUS_CHANGE"
      and message["data"]["status"] == "concluded")
send("query-jobs")
jobs = until(lambda message: "return" in message and message["return"])
send("quit")
daemon.stdin.close()
daemon.stdout.read()
ended = daemon.wait()
sys.exit(1 if ended != 0 or "error" in jobs["return"][0] else 0)
END
}
pipeline ()
{
    timeout 120 nbdcopy --flush "$work/source" -- \
        [ qemu-nbd --image-opts "driver=compress,file.driver=qcow2,file.file.driver=nbd,file.file.server.type=unix,file.file.server.path=$work/server.sock" ]
}

# writes CLIENT DIRECTORY SERVER-ARGUMENT...: leaves its status in $status
writes ()
{
    local client=$1 disk=$2/disk
    shift 2
    status=0
    truncate -s 0 "$disk"
    truncate -s 64M "$disk"
    start_nbdkit server "$@" file "$disk"
    { qemu-img create -q -f qcow2 "$(uri server)" 20M && "$client"; } >"$work/client.err" 2>&1 || status=$?
    stop_nbdkit server
}

if ! small_filesystem "$work/small" 1M; then
    exit 0
fi
unmount "$work/small"
refused=0
for client in backup pipeline; do
    mkdir -p "$work/large"
    writes "$client" "$work/large"
    [ "$status" -eq 0 ] || fail "$client: $(cat "$work/client.err")"
    needed=$(du -k "$work/large/disk" | cut -f1)
    rooms=($((needed / 10)) $((needed / 2)) $((needed * 9 / 10)) $((needed - 256)) $((needed - 64)) $((needed - 4)))
    if [ "${LONG:-}" = 1 ]; then
        for part in 1 2 3 4 6 7 8 9 11 12 13 14 15 16 17 19; do
            rooms+=($((needed * part / 20)))
        done
    fi
    for room in "${rooms[@]}"; do
        small_filesystem "$work/small" "${room}k"
        writes "$client" "$work/small"
        without=$status
        writes "$client" "$work/small" --filter="$FILTER"
        [ "$status" -ne 0 ] || [ "$without" -eq 0 ] ||
            fail "$client, $room of $needed KiB: success, and status $without without the filter: $(cat "$work/client.err")"
        [ "$without" -eq 0 ] || refused=$((refused + 1))
        unmount "$work/small"
    done
done
echo "$refused failures"
[ "$refused" -ge 8 ] || fail "nothing was ever too small"
