"""The raw disks that are converted, made once of this machine's own files and kept."""

import os
import pathlib
import shutil
import subprocess

from processes import Failed

MIB = 1 << 20

# Name: (what it is, MiB of a full benchmark, MiB of a quick one).
SIZES = {
    "ones": ("bytes of 0x01", 1000, 128),
    "tar": ("a tar of files from /usr", 512, 64),
    "filesystem": ("an ext4 filesystem of files from /usr", 512, 64),
    "random": ("incompressible bytes", 256, 32),
    "tar-piece": ("a piece of the tar", 64, 8),
    "ones-piece": ("bytes of 0x01", 64, 8),
    "tar-memory": ("a piece of the tar", 128, 64),
}


class Sources:
    """Makes each source when it is first asked for. Sizes are in bytes."""

    def __init__(self, directory, quick):
        self._directory = pathlib.Path(directory)
        self.quick = quick

    def size(self, name):
        _, full, quick = SIZES[name]
        return (quick if self.quick else full) * MIB

    def path(self, name):
        size = self.size(name)
        path = self._directory / f"{name}-{size // MIB}M.raw"
        if not path.exists():
            # Under another name until it is whole, for the next benchmark may find it.
            unfinished = path.with_suffix(".unfinished")
            _MAKERS[name.split("-")[0]](unfinished, size)
            unfinished.rename(path)
        _read_whole(path)
        return path


def _read_whole(path):
    """Reading the source must cost every contender the same."""
    with open(path, "rb") as file:
        while file.read(16 * MIB):
            pass


def _ones(path, size):
    with open(path, "wb") as file:
        for _ in range(size // MIB):
            file.write(b"\1" * MIB)


def _random(path, size):
    with open(path, "wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))


def _tar(path, size):
    """As much of a tar as fits, over again where there is not enough."""
    written = 0
    with open(path, "wb") as file:
        while written < size:
            command = ["tar", "-C", "/usr", "--sort=name", "-cf", "-", "bin", "lib", "share"]
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            ) as tar:
                before = written
                while written < size and (piece := tar.stdout.read(min(MIB, size - written))):
                    written += file.write(piece)
                tar.stdout.close()
                tar.kill()
            if written == before:
                raise Failed("tar finds nothing in /usr")


def _filesystem(path, size):
    """A filesystem of that size, four fifths full."""
    stage = path.with_suffix(".stage")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    room = size * 4 // 5
    largest = size // 64
    files = 0
    for file in _files("/usr"):
        needed = (file.stat().st_size + 4096) // 4096 * 4096
        if needed <= largest:
            copy = stage / file.relative_to("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
            room -= needed
            files += 1
        if room < largest:
            break
    with open(path, "wb") as image:
        image.truncate(size)
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-N", str(2 * files + 1000)]
    try:
        subprocess.run([*command, "-d", str(stage), str(path)], check=True)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _files(directory):
    """The plain files below a directory, always in the same order."""
    for parent, directories, names in os.walk(directory):
        directories.sort()
        for name in sorted(names):
            file = pathlib.Path(parent) / name
            if file.is_file() and not file.is_symlink() and os.access(file, os.R_OK):
                yield file


_MAKERS = {"ones": _ones, "random": _random, "tar": _tar, "filesystem": _filesystem}
