"""Clients that write small pieces all over a large disk, as a guest does: holding them spares
storage little or nothing, and must not make them slower than they are without the filter."""

import json
import os
import subprocess

from conversions import MIB, fresh_disk
from processes import Failed, nbdkit, run, uri

SIZES = ("1M", "16M", "64M", "1G")
WRITERS = (1, 4, 16)
IN_FLIGHT = 16
DISK = 1024 * MIB
SECONDS = 1.5

# Name: what each of fio's jobs does, which all work at once and share what is in flight.
_PATTERNS = {
    "random-4k": ("--rw=randwrite --bs=4k",),
    "random-64k": ("--rw=randwrite --bs=64k",),
    "mixed-4k": ("--rw=randrw --bs=4k",),
    "trims-4k": ("--rw=randwrite --bs=4k", "--rw=randtrim --bs=4k"),
    "four-exports-4k": ("--rw=randwrite --bs=4k",) * 4,
}
_SLOW = ("delay-write=5ms", "delay-trim=5ms", "delay-read=5ms")


def names():
    return [f"guest/{pattern}" for pattern in _PATTERNS]


def contenders():
    return ("none", *(f"{size}/{writers}" for size in SIZES for writers in WRITERS))


def ask(settings, name, contender):
    """Requests a second, what a flush in the end takes included."""
    pattern = name.partition("/")[2]
    jobs = _PATTERNS[pattern]
    exports = [str(number if pattern.startswith("four-exports") else 0) for number in range(len(jobs))]
    disks = settings.directory / "guests"
    disks.mkdir(exist_ok=True)
    for path in {disks / export for export in exports}:
        fresh_disk(path, DISK)
        image = ["qemu-img", "create", "-q", "-f", "qcow2", path, str(DISK // 2)]
        run(image, settings.directory / "create.err")
        os.truncate(path, DISK)
    above = []
    parameters = ()
    if contender != "none":
        size, writers = contender.split("/")
        above = [f"--filter={settings.filter}"]
        parameters = (*settings.parameters, f"qcowcache-size={size}", f"qcowcache-writers={writers}")
    arguments = ["-t", "64", *above, "--filter=delay", "file", f"dir={disks}", *_SLOW, *parameters]
    with nbdkit(arguments, settings.directory) as server:
        rate = _fio(settings, jobs, exports)
        server.stop()
    return rate


def _fio(settings, jobs, exports):
    command = [
        *"fio --ioengine=nbd --time_based --norandommap --end_fsync=1 --output-format=json".split(),
        f"--runtime={SECONDS}",
        f"--offset={MIB}",
        f"--size={DISK - MIB}",
        f"--iodepth={IN_FLIGHT // len(jobs)}",
    ]
    for number, (job, export) in enumerate(zip(jobs, exports)):
        command += [f"--name={number}", f"--uri={uri(settings.directory, export=export)}"]
        command += [f"--randseed={7 + number}", *job.split()]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise Failed(f"fio: {ended.stderr.strip() or ended.stdout.strip()}")
    # Some lines about the server may come first.
    results = json.loads(ended.stdout[ended.stdout.index("{") :])["jobs"]
    requests = sum(job[kind]["total_ios"] for job in results for kind in ("read", "write", "trim"))
    return requests / max(job["job_runtime"] / 1000 for job in results)
