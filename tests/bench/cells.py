"""What is compared with what: the cells of the benchmark."""

import itertools
from typing import NamedTuple

# Name: (filters below the contender's own, plugin and parameters). "DISK" is the file, "SOCKET"
# the one of the qemu-nbd that has it open.
_TEN_MS = ("delay-write=10ms", "delay-read=8ms")
STORAGES = {
    "odirect": ((), ("nbd", "socket=SOCKET")),
    "file-cache-none": ((), ("file", "DISK", "cache=none")),
    "file": ((), ("file", "DISK")),
    "delay": (("delay",), ("file", "DISK", *_TEN_MS)),
    "delay-serial": (
        ("noparallel", "delay"),
        ("file", "DISK", "serialize=requests", *_TEN_MS),
    ),
}

# Name: (filters, parameters). "FILTER" is the one that all this is about.
FILTERS = {
    "filter": (("FILTER",), ()),
    "none": ((), ()),
    "blocksize": (("blocksize",), ("minblock=4096",)),
    "cache": (("cache",), ()),
}
# The filter with more to do: what that costs is asked where storage itself takes least.
CHECKS = {
    "verify": (("FILTER",), ("qcowcache-verify=error",)),
    "readback": (("FILTER",), ("qcowcache-readback=true",)),
}
FILTERS |= CHECKS
# qemu-img straight to the file, with this -t.
STRAIGHT = {"straight -t none": "none", "straight -t writeback": "writeback"}
# A target in memory, twice: what two runs of one and the same thing differ by is noise.
LIMITS = ("limit", "limit again")

ORDERS = {"in-order": (), "w16": ("-W", "-m", "16")}
COMPRESSIONS = ("zstd", "zlib")
CLIENTS = ("qemu-img", "nbdcopy")


class Cell(NamedTuple):
    storage: str
    source: str
    order: str = "in-order"
    compression: str = "zstd"
    client: str = "qemu-img"

    @property
    def name(self):
        return "/".join(self)

    @property
    def contenders(self):
        # The parameter "cache" of this storage's plugin would be taken for the cache filter's.
        filters = [
            name
            for name in FILTERS
            if (self.storage, name) != ("file-cache-none", "cache")
            and (name not in CHECKS or self[:2] + self[4:] == ("file", "tar", "qemu-img"))
        ]
        straight = ()
        if self.client == "qemu-img" and not self.storage.startswith("delay"):
            straight = tuple(STRAIGHT)
        return (*filters, *straight, *LIMITS)


def quick_cells():
    """A few minutes."""
    slow = [Cell(storage, "tar-piece") for storage in ("delay", "delay-serial")]
    return [
        Cell("odirect", "ones"),
        Cell("odirect", "tar"),
        Cell("odirect", "tar", "w16"),
        Cell("file-cache-none", "ones"),
        Cell("file", "tar"),
        *slow,
    ]


def chosen_cells():
    """Those that say something of their own."""
    return [
        *(Cell("odirect", source) for source in ("ones", "tar", "filesystem", "random")),
        *(Cell("odirect", source, "w16") for source in ("ones", "tar", "filesystem")),
        Cell("odirect", "tar", "in-order", "zlib"),
        Cell("odirect", "tar", "w16", "zlib"),
        Cell("odirect", "tar", "in-order", "zstd", "nbdcopy"),
        *(Cell("file-cache-none", source) for source in ("ones", "tar")),
        *(Cell("file", source) for source in ("ones", "tar", "filesystem", "random")),
        Cell("file", "tar", "w16"),
        Cell("file", "tar", "in-order", "zlib"),
        Cell("file", "tar", "in-order", "zstd", "nbdcopy"),
        *(Cell("delay", source) for source in ("tar-piece", "ones-piece")),
        Cell("delay", "tar-piece", "w16"),
        Cell("delay", "tar-piece", "in-order", "zstd", "nbdcopy"),
        *(Cell("delay-serial", source) for source in ("tar-piece", "ones-piece")),
    ]


def every_cell():
    """The whole matrix: a day of work. nbdcopy has an order of its own."""
    cells = []
    for storage, source, compression in itertools.product(
        STORAGES, ("ones", "tar", "filesystem", "random"), COMPRESSIONS
    ):
        if storage.startswith("delay"):
            source = {"ones": "ones-piece", "tar": "tar-piece"}.get(source)
        if source:
            cells += [Cell(storage, source, order, compression) for order in ORDERS]
            cells.append(Cell(storage, source, "in-order", compression, "nbdcopy"))
    return cells
