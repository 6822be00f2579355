"""One conversion of one contender, from fresh storage to what it used."""

import contextlib
import json
import os
import pathlib
import subprocess
from typing import NamedTuple

import requestlog
from cells import FILTERS, LIMITS, ORDERS, STORAGES, STRAIGHT
from processes import Client, Failed, direct_qemu_nbd, nbdkit, run, uri

MIB = 1 << 20
CLUSTER = "64k"


class Settings(NamedTuple):
    """What is the same for all conversions of a benchmark."""

    filter: str
    """The filter as --filter takes it."""
    parameters: tuple
    """Parameters for it, beside its defaults."""
    directory: pathlib.Path
    """Where the disks are that are written to."""
    target_cache: str
    """qemu-img's -t for NBD."""


class Measured(NamedTuple):
    """A conversion. The client's end is the end: it has flushed by then."""

    seconds: float
    stop_seconds: float
    processor_ns: int
    """Of nbdkit; of qemu-img where it writes to the file itself."""
    peak_kib: int
    """Of the same process."""
    read_bytes: int
    """What the process that has the file open read from and wrote to the device."""
    write_bytes: int


class Counted(NamedTuple):
    """A conversion with nbdkit's log filter above storage, too slow to be timed."""

    requests: dict
    """As requestlog.counts."""
    image_bytes: int
    """Where the image ends that it has written."""


def target_size(source):
    """NBD cannot grow a target: a little more than the largest image that can come of it."""
    size = pathlib.Path(source).stat().st_size
    return (size * 11 // 10 // MIB + 64) * MIB


def fresh_disk(path, size):
    """A sparse file. What earlier conversions have left to be written is waited for."""
    path.unlink(missing_ok=True)
    os.sync()
    with open(path, "wb") as disk:
        disk.truncate(size)


def chain(settings, storage, contender, disk, log_below=None, log_above=None):
    """nbdkit's arguments for a contender over storage."""
    above, parameters = FILTERS[contender]
    below, plugin = STORAGES[storage]
    if "FILTER" in above:
        parameters = (*parameters, *settings.parameters)
    filters = [settings.filter if name == "FILTER" else name for name in above]
    if log_below:
        filters.append("log")
        parameters = (*parameters, f"logfile={log_below}")
    if log_above:
        filters.insert(0, "log")
        parameters = (*parameters, f"logfile={log_above}")
    places = {"DISK": str(disk), "SOCKET": str(settings.directory / "direct.sock")}
    for word, place in places.items():
        plugin = [argument.replace(word, place) for argument in plugin]
    return [*(f"--filter={name}" for name in (*filters, *below)), *plugin, *parameters]


@contextlib.contextmanager
def serving(settings, storage, contender, disk, **logs):
    """Storage with a contender above it; yields nbdkit and the process that writes to the file."""
    with contextlib.ExitStack() as servers:
        writer = None
        if storage == "odirect":
            writer = servers.enter_context(direct_qemu_nbd(disk, settings.directory))
        arguments = chain(settings, storage, contender, disk, **logs)
        server = servers.enter_context(nbdkit(arguments, settings.directory))
        yield server, writer or server


def qemu_img_convert(source, target, cell, cache):
    return [
        *("qemu-img", "convert", "-c", "-t", cache, "-f", "raw", "-O", "qcow2"),
        *("-o", f"cluster_size={CLUSTER},compression_type={cell.compression}"),
        *(*ORDERS[cell.order], str(source), str(target)),
    ]


def nbdcopy_into_compressor(source, socket):
    """nbdcopy, which is far more out of order than qemu-img, into a qemu-nbd that compresses."""
    image = (
        "driver=compress,file.driver=qcow2,file.file.driver=nbd,"
        f"file.file.server.type=unix,file.file.server.path={socket}"
    )
    return ["nbdcopy", "--flush", str(source), "--", "[", "qemu-nbd", "--image-opts", image, "]"]


def transfer(settings, cell, source):
    """Runs the cell's client against the server; returns its seconds."""
    log = settings.directory / "client.err"
    if cell.client == "qemu-img":
        command = qemu_img_convert(source, uri(settings.directory), cell, settings.target_cache)
        return run(command, log).seconds
    create = [
        *("qemu-img", "create", "-q", "-f", "qcow2"),
        *("-o", f"cluster_size={CLUSTER},compression_type={cell.compression}"),
        *(uri(settings.directory), str(source.stat().st_size)),
    ]
    copy = nbdcopy_into_compressor(source, settings.directory / "nbdkit.sock")
    return run(create, log).seconds + run(copy, log).seconds


def measure(settings, cell, contender, source):
    """Returns Measured."""
    disk = settings.directory / "disk.img"
    fresh_disk(disk, target_size(source))
    if contender in STRAIGHT:
        command = qemu_img_convert(source, disk, cell, STRAIGHT[contender])
        ended = run(command, settings.directory / "client.err")
        return Measured(ended.seconds, 0.0, *ended[1:])
    if contender in LIMITS:
        with nbdkit(["memory", str(target_size(source))], settings.directory) as server:
            seconds = transfer(settings, cell, source)
            used = server.usage()
            return Measured(seconds, server.stop(), used.processor_ns, used.peak_kib, 0, 0)
    with serving(settings, cell.storage, contender, disk) as (server, writer):
        seconds = transfer(settings, cell, source)
        used, device = server.usage(), writer.usage()
        return Measured(
            seconds,
            server.stop(),
            used.processor_ns,
            used.peak_kib,
            device.read_bytes,
            device.write_bytes,
        )


def count(settings, cell, contender, source):
    """Returns Counted. The image that results must be sound and hold what the source does."""
    disk = settings.directory / "disk.img"
    log = settings.directory / "requests.log"
    log.unlink(missing_ok=True)
    fresh_disk(disk, target_size(source))
    with serving(settings, cell.storage, contender, disk, log_below=log) as (server, _):
        transfer(settings, cell, source)
        server.stop()
    return Counted(requestlog.counts(log), image_end(disk, source))


def image_end(disk, source):
    """Where the image on the disk ends; Failed where it is not a sound copy of the source."""
    check = subprocess.run(
        ["qemu-img", "check", "--output=json", "-f", "qcow2", str(disk)],
        capture_output=True,
        check=False,
    )
    if check.returncode != 0:
        raise Failed(f"qemu-img check finds fault with {disk}: {check.stdout.decode()}")
    run(
        ["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", str(disk), str(source)],
        disk.with_suffix(".compare"),
    )
    return json.loads(check.stdout)["image-end-offset"]


def client_of(settings, cell, source, name="nbdkit", export=""):
    """qemu-img, started: returns its Client."""
    target = uri(settings.directory, name, export)
    command = qemu_img_convert(source, target, cell, settings.target_cache)
    return Client(command, settings.directory / f"client-{name}-{export}.err")
