"""A backup job with compression, as QEMU runs it; ends with 0 when the job ended well.

    backup_job.py SOURCE SOCKET [PARAMETER]

From the raw file SOURCE to the qcow2 image that is there already behind the NBD server at SOCKET.
PARAMETER is JSON, an object of more arguments for blockdev-backup.
"""

import json
import subprocess
import sys

source, socket = sys.argv[1:3]
more = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
daemon = subprocess.Popen(
    ["qemu-storage-daemon", "--chardev", "stdio,id=monitor", "--monitor", "chardev=monitor",
     "--blockdev", f"driver=file,node-name=source,filename={source},read-only=on",
     "--blockdev", f"driver=nbd,node-name=nbd,server.type=unix,server.path={socket}",
     "--blockdev", "driver=qcow2,node-name=target,file=nbd"],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def send(command, **arguments):
    daemon.stdin.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
    daemon.stdin.flush()


def until(wanted):
    for line in daemon.stdout:
        message = json.loads(line)
        if "error" in message:
            raise SystemExit(f"qemu-storage-daemon: {message}")
        if wanted(message):
            return message
    raise SystemExit("qemu-storage-daemon has ended")


try:
    until(lambda message: "QMP" in message)
    send("qmp_capabilities")
    until(lambda message: "return" in message)
    send("blockdev-backup", **{"job-id": "backup", "device": "source", "target": "target",
                               "sync": "full", "compress": True, "auto-dismiss": False, **more})
    until(lambda message: message.get("event") == "JOB_STATUS_CHANGE"
          and message["data"]["status"] == "concluded")
    send("query-jobs")
    job = until(lambda message: "return" in message and message["return"])["return"][0]
    send("quit")
finally:
    daemon.stdin.close()
    daemon.stdout.read()
    status = daemon.wait()
if status != 0 or "error" in job:
    raise SystemExit(f"qemu-storage-daemon ended with {status}: {job}")
