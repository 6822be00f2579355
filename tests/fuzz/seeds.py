#!/usr/bin/env python3
"""The seeds that fuzzing starts from: the same ones each time.

seeds.py --write CORPUS   write them to CORPUS/TARGET/seed-*
seeds.py --check CORPUS   see that they are there, as they would be written

Other files in the corpus are inputs that once broke something, or that reach what no seed does.
"""

import argparse
import pathlib
import random
import struct
import sys


def header_bytes(version=3, bits=16, features=0, length=112, compression=0, order=4, crypt=0):
    header = bytearray(112 if version >= 3 else 72)
    struct.pack_into(">4sI", header, 0, b"QFI\xfb", version)
    struct.pack_into(">IQIIQQI", header, 20, bits, 8 << 30, crypt, 16, 3 << 16, 1 << 16, 1)
    if version >= 3:
        struct.pack_into(">Q", header, 72, features)
        struct.pack_into(">II", header, 96, order, length)
        header[104] = compression
    return bytes(header)


def header_seeds():
    yield "version-2", header_bytes(version=2, bits=12)
    yield "deflate", header_bytes()
    yield "zstd", header_bytes(features=8, compression=1)
    yield "extended-l2", header_bytes(bits=14, features=16)
    yield "no-type", header_bytes(length=104)[:104]
    yield "external-data", header_bytes(features=4)
    yield "luks", header_bytes(crypt=2)
    yield "large-clusters", header_bytes(bits=21, order=6, length=1024) + bytes(400)


def decompressor_seeds():
    # Which codec, which cluster size (0: 512 bytes), extended entries; then a stream.  Made by
    # hand: what compressors write differs from version to version.
    deflate = bytes([0, 0, 0])
    zstd = bytes([1, 0, 0])
    content = bytes(range(256)) * 2
    stored = bytes([1]) + struct.pack("<HH", 512, 512 ^ 0xffff) + content
    yield "deflate-stored", deflate + stored
    yield "deflate-followed", deflate + stored + content
    yield "deflate-short", deflate + stored[:300]
    magic = struct.pack("<I", 0xfd2fb528)
    single = magic + bytes([0x60]) + struct.pack("<H", 512 - 256)
    raw = struct.pack("<I", 512 << 3 | 1)[:3] + content
    run = struct.pack("<I", 512 << 3 | 2 | 1)[:3] + b"z"
    half = magic + bytes([0x60]) + struct.pack("<H", 0) + struct.pack("<I", 256 << 3 | 1)[:3] + bytes(256)
    yield "zstd-raw", zstd + single + raw
    yield "zstd-run", zstd + single + run
    yield "zstd-two-frames", zstd + half + half
    yield "zstd-skippable", zstd + struct.pack("<II", 0x184d2a53, 4) + b"skip" + single + run
    yield "zstd-window", zstd + magic + bytes([0, 0xff]) + run
    entries = [1 << 62 | 3 << 54 | 70000, 1 << 63 | 5 << 16, 1 << 62 | 255 << 54 | (1 << 54) - 1, 1]
    yield "entries", bytes([0, 7, 0]) + struct.pack(">4Q", *entries)
    yield "extended-entries", bytes([0, 7, 1]) + struct.pack(">4Q", *entries)


def request_seeds():
    # What the connections share, how many more than one, stripes, no background writers; then
    # whatever comes.
    setups = {
        "one": bytes([0, 0, 0, 99]),
        "one-queue": bytes([0, 0, 0, 0]),
        "cache": bytes([0, 2, 0, 99]),
        "cache-queue": bytes([0, 1, 0, 0]),
        "disk": bytes([2, 3, 3, 99]),
        "disk-queue": bytes([2, 1, 4, 0]),
        "nothing": bytes([3, 1, 0, 99]),
    }
    for name, setup in setups.items():
        yield name, setup + random.Random(name).randbytes(800)


def verifier_seeds():
    # cluster size, background, memory, header
    images = {
        "deflate": bytes([0, 0, 0, 0]),
        "zstd": bytes([1, 0, 0, 1]),
        "background": bytes([0, 1, 5, 0]),
        "extended": bytes([3, 0, 3, 2]),
        "no-memory": bytes([0, 0, 1, 4]),
        "little": bytes([0, 1, 2, 0]),
    }
    for name, image in images.items():
        dice = random.Random(name)
        # A table, and what QEMU does: streams, their entries, and now and then a check.
        script = bytes([1, 0, 0])
        for _ in range(30):
            kind = dice.choice([2, 3, 2, 3, 2, 3, 1, 5, 6, 10, 10, dice.randrange(16)])
            script += bytes([kind]) + dice.randbytes({3: 3, 2: 5, 1: 2, 6: 2, 10: 0}.get(kind, 4))
        yield name, image + script


SEEDS = {"decompressor": decompressor_seeds, "header": header_seeds, "requests": request_seeds,
         "verifier": verifier_seeds}


def main():
    parser = argparse.ArgumentParser()
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true")
    what.add_argument("--check", action="store_true")
    parser.add_argument("corpus", type=pathlib.Path)
    arguments = parser.parse_args()

    wrong = []
    for target, seeds in SEEDS.items():
        wanted = {f"seed-{name}": data for name, data in seeds()}
        directory = arguments.corpus / target
        if arguments.write:
            directory.mkdir(parents=True, exist_ok=True)
            for old in directory.glob("seed-*"):
                old.unlink()
            for name, data in wanted.items():
                (directory / name).write_bytes(data)
        present = {path.name: path.read_bytes() for path in directory.glob("seed-*")}
        wrong += [directory / name for name in sorted(wanted.keys() | present.keys())
                  if wanted.get(name) != present.get(name)]
    if wrong:
        sys.exit("not what seeds.py writes: " + ", ".join(map(str, wrong)))


if __name__ == "__main__":
    main()
