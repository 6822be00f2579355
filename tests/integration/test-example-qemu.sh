#!/usr/bin/env bash
# The man page's backup jobs: its commands as they stand there, and its lines of
# QMP typed into QEMU's storage daemon one after the other, each when the one
# before has been answered.  Where there is no room, one of them fails.

# shellcheck disable=SC2034  # for functions.sh
own_mounts=1
source "$(dirname "$0")/functions.sh"
source "$(dirname "$0")/examples.sh"

requires_program qemu-storage-daemon

# type_into COMMAND-FILE QMP-FILE...: runs COMMAND-FILE in $here and types the
# lines of the first QMP-FILE, waits for the end of the job, and so on.
type_into ()
{
    (cd "$here" && timeout -k 5 120 "$PYTHON" - "$@") <<'END'
import atexit, json, signal, subprocess, sys

with open(sys.argv[1]) as file:
    daemon = subprocess.Popen(["bash", "-c", "exec " + file.read().lstrip()], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
atexit.register(daemon.kill) # does nothing once it has ended
signal.signal(signal.SIGTERM, lambda *ignored: sys.exit("the storage daemon does not answer"))
job_ended = False

def message():
    global job_ended
    line = daemon.stdout.readline()
    assert line, "the storage daemon ended"
    print("<", line, end="")
    found = json.loads(line)
    if found.get("event") == "BLOCK_JOB_COMPLETED":
        assert "error" not in found["data"], found
        job_ended = True
    assert "error" not in found, found
    return found

def commands(text):
    decoder = json.JSONDecoder()
    while text.strip():
        text = text.lstrip()
        _, end = decoder.raw_decode(text)
        yield text[:end]
        text = text[end:]

for name in sys.argv[2:]:
    with open(name) as file:
        for command in commands(file.read()):
            print(">", command)
            daemon.stdin.write(command + "\n")
            daemon.stdin.flush()
            while "return" not in message():
                pass
    while not job_ended:
        message()
assert daemon.wait() == 0
END
}

# job_fails TITLE: for fails. A job that says that it has failed is a failure that is seen.
job_fails ()
{
    if [ "$situation" = 'no server' ]; then
        example "$before" | paragraph 1 | fails_here
        return
    fi
    example "$before" | paragraph 1 | run_here >"$work/said" 2>&1 || fail "no server: $(cat "$work/said")"
    if (type_into "$work/daemon" "$work/begin.qmp" "$work/end.qmp") >"$work/said" 2>&1; then
        example "$before" | paragraph 5 | fails_here
    else
        grep -q "'error': '.*\(No space left on device\|Input/output error\)" "$work/said" ||
            fail "failed otherwise: $(cat "$work/said")"
    fi
}

title="A backup job of QEMU"
before=$title
at_example
example "$title" | paragraph 1 | run_here
example "$title" | paragraph 2 >"$work/daemon"
example "$title" | paragraph 3 >"$work/begin.qmp"
example "$title" | paragraph 4 >"$work/end.qmp"
type_into "$work/daemon" "$work/begin.qmp" "$work/end.qmp"
example "$title" | paragraph 5 | run_here
holds disk.qcow2
fails "$title" zlib job_fails

at_example
example "$title" | paragraph 1 | run_here
title="An old-style backup job of QEMU"
example "$title" | paragraph 1 >"$work/begin.qmp"
example "$title" | paragraph 2 >"$work/end.qmp"
type_into "$work/daemon" "$work/begin.qmp" "$work/end.qmp"
title="A backup job of QEMU"
example "$title" | paragraph 5 | run_here
holds disk.qcow2
fails "An old-style backup job of QEMU" zlib job_fails
