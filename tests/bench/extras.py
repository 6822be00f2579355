"""Questions that are not about one conversion's time: latency, memory, several at once, guests."""

import contextlib

import guests
import requestlog
from cells import Cell
from conversions import client_of, fresh_disk, serving, target_size, transfer
from processes import nbdkit

AT_ONCE = 8
LATENCY = {order: Cell("delay", "tar-piece", order) for order in ("in-order", "w16")}
MEMORY = {order: Cell("delay", "tar-memory", order) for order in ("in-order", "w16")}
MEMORY_SIZES = (16, 64)


def names():
    """Each question's name: one that --only can select."""
    return [
        *(f"latency/{order}" for order in LATENCY),
        *(f"memory/{order}" for order in MEMORY),
        "at-once/file-dir",
        *guests.names(),
    ]


def contenders(name):
    if name.startswith("latency"):
        return ("filter", "none")
    if name.startswith("memory"):
        return (*(f"filter {size}M" for size in MEMORY_SIZES), "none")
    if name.startswith("guest"):
        return guests.contenders()
    return ("one server", "eight servers", "one server, none", "eight servers, none")


def unit(name):
    """Of what `ask` returns, for people."""
    if name.startswith("latency"):
        return "s (99th percentile of client writes)"
    if name.startswith("memory"):
        return "KiB (peak resident)"
    if name.startswith("guest"):
        return "requests/s (by memory/writers)"
    return f"s ({AT_ONCE} conversions)"


def ask(settings, sources, name, contender):
    """One answer, a number."""
    kind, _, order = name.partition("/")
    if kind == "guest":
        return guests.ask(settings, name, contender)
    if kind == "latency":
        return _latency(settings, sources, LATENCY[order], contender)
    if kind == "memory":
        return _memory(settings, sources, MEMORY[order], contender)
    servers, _, no_filter = contender.partition(", ")
    return _at_once(settings, sources, servers == "one server", no_filter or "filter")


def _latency(settings, sources, cell, contender):
    source = sources.path(cell.source)
    disk = settings.directory / "disk.img"
    log = settings.directory / "requests.log"
    log.unlink(missing_ok=True)
    fresh_disk(disk, target_size(source))
    with serving(settings, cell.storage, contender, disk, log_above=log) as (server, _):
        transfer(settings, cell, source)
        server.stop()
    return requestlog.percentile(requestlog.write_latencies(log), 0.99)


def _memory(settings, sources, cell, contender):
    source = sources.path(cell.source)
    disk = settings.directory / "disk.img"
    fresh_disk(disk, target_size(source))
    contender, _, size = contender.partition(" ")
    if size:
        settings = settings._replace(parameters=(*settings.parameters, f"qcowcache-size={size}"))
    with serving(settings, cell.storage, contender, disk) as (server, _):
        transfer(settings, cell, source)
        peak = server.usage().peak_kib
        server.stop()
    return peak


def _at_once(settings, sources, one_server, contender):
    cell = Cell("file", "tar-piece")
    source = sources.path(cell.source)
    disks = settings.directory / "disks"
    disks.mkdir(exist_ok=True)
    for number in range(AT_ONCE):
        fresh_disk(disks / str(number), target_size(source))
    filters = [f"--filter={settings.filter}"] if contender == "filter" else []
    parameters = settings.parameters if filters else ()
    with contextlib.ExitStack() as servers:
        if one_server:
            arguments = [*filters, "file", f"dir={disks}", *parameters]
            started = [servers.enter_context(nbdkit(arguments, settings.directory))]
            targets = [("nbdkit", str(number)) for number in range(AT_ONCE)]
        else:
            started = []
            for number in range(AT_ONCE):
                arguments = [*filters, "file", disks / str(number), *parameters]
                server = nbdkit(arguments, settings.directory, f"nbdkit{number}")
                started.append(servers.enter_context(server))
            targets = [(f"nbdkit{number}", "") for number in range(AT_ONCE)]
        clients = [client_of(settings, cell, source, *target) for target in targets]
        began = min(client.started for client in clients)
        ended = max(client.wait().seconds + client.started for client in clients)
        for server in started:
            server.stop()
    return ended - began
