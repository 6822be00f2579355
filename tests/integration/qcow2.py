"""As much of qcow2 as the tests need: headers, and where compressed clusters are."""

import struct

COMPRESSED = 1 << 62
L2_OFFSET = 0x00FFFFFFFFFFFE00


def image_header(cluster_bits=16, version=3, length=112, size=1 << 20, l1=(0, 0)):
    """The first bytes of an image; `l1` is how many entries the L1 table has, and where it is."""
    header = bytearray(length)
    header[0:8] = struct.pack(">4sI", b"QFI\xfb", version)
    header[20:32] = struct.pack(">IQ", cluster_bits, size)
    header[36:48] = struct.pack(">IQ", *l1)
    if version >= 3:
        header[96:104] = struct.pack(">II", 4, 112)
    return bytes(header)


class CompressedClusters:
    """Those of an image, which is given as its first bytes at least, with all tables.

    `l2` is where the first L2 table is, and `width` how long its entries are. `entries` are the
    compressed clusters': by their number in the guest's disk.
    """

    def __init__(self, image):
        bits, = struct.unpack(">I", image[20:24])
        l1_size, l1 = struct.unpack(">IQ", image[36:48])
        extended = struct.unpack(">I", image[4:8])[0] > 2 and struct.unpack(">Q", image[72:80])[0] & 16
        self.cluster = 1 << bits
        self.width = 16 if extended else 8
        self._size_shift = 62 - (bits - 8)
        self._size_mask = (1 << bits - 8) - 1
        self.l1 = l1
        tables = [table & L2_OFFSET for table, in struct.iter_unpack(">Q", image[l1:l1 + l1_size * 8])]
        self.l2 = tables[0]
        self.entries = {}
        each = self.cluster // self.width
        for number, table in enumerate(tables):
            if table:
                found = struct.iter_unpack(">Q", image[table:table + self.cluster].ljust(self.cluster, b"\0"))
                for i, (entry,) in enumerate(list(found)[::self.width // 8]):
                    if entry & COMPRESSED:
                        self.entries[number * each + i] = entry

    def offset(self, entry):
        return entry & (1 << self._size_shift) - 1

    def more_sectors(self, entry):
        """How many sectors of 512 bytes the data has beside the first."""
        return entry >> self._size_shift & self._size_mask

    def place(self, entry):
        """Where the data begins, and how long it may be."""
        offset = self.offset(entry)
        return offset, (self.more_sectors(entry) + 1) * 512 - offset % 512

    def streams(self):
        """Where the data of each is, in the guest's order."""
        return [self.offset(entry) for entry in self.entries.values()]

    def at(self, entry, offset):
        return entry >> self._size_shift << self._size_shift | offset

    def with_a_sector_less(self, entry):
        return entry - (1 << self._size_shift)
