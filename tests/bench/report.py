"""What people read: a table, and plots."""

import os
import pathlib
import platform
import subprocess
import time

import extras
import targets
from cells import FILTERS, LIMITS
from intervals import interval_of
from processes import run
from sources import SIZES

MIB = 1 << 20


def machine():
    """Lines that say where and with what the figures were made."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = next(
        int(line.split()[1])
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal:")
    )
    versions = [_first_line(name, "--version") for name in ("nbdkit", "qemu-img", "nbdcopy")]
    return [
        time.strftime("date: %Y-%m-%d"),
        f"machine: {cpu}, {os.cpu_count()} cores, {memory / MIB:.0f} GiB, Linux {platform.release()}",
        f"programs: {', '.join(versions)}",
    ]


def _first_line(*command):
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return output.splitlines()[0] if output else f"{command[0]} ?"


def text(results, sources, command):
    """The table for people."""
    lines = [f"command: {command}", *machine(), ""]
    lines += [
        "Seconds and processor time (nbdkit's; qemu-img's own where it writes straight to the file)",
        "are medians; [ ] holds 95 %, from smallest to largest with fewer than 6 runs. The ratio to",
        "the limit, the same conversion to nbdkit's memory plugin, is taken pair by pair. Requests",
        "are what storage received, in a run of their own. W/B: bytes written per byte of image.",
        "Peak: the most memory resident in any run.",
    ]
    header = (
        f"{'':22}{'seconds':>21}{'to the limit':>21}{'writes':>8}{'reads':>8}"
        f"{'flushes':>8}{'MB written':>11}{'W/B':>7}{'CPU ms':>8}{'peak MiB':>9}"
    )
    for cell in results.cells():
        size = sources.size(cell.source) // MIB
        lines += ["", f"{cell.name} ({SIZES[cell.source][0]}, {size} MiB)", header]
        lines += [_line(results.row(cell, name)) for name in results.contenders(cell)]
    for question in results.questions():
        lines += ["", f"{question}: {extras.unit(question)}"]
        for name in extras.contenders(question):
            values = results.answers_of(question, name)
            if values:
                lines.append(f"  {name:20}{_interval(*interval_of(values), '.5g'):>30}")
    found = targets.verdicts(results)
    if found:
        lines += ["", "Targets (MISSED: the whole interval lies beyond; open: a part of it does)"]
        if sources.quick:
            lines.append("  They are meant for the full sources; with small ones, fixed costs weigh more.")
        lines += [
            f"  {verdict.word:7}{verdict.relation:>3} {verdict.bound:<8g}"
            f"{_interval(*verdict.found, '.5g'):>26}  {verdict.what}"
            for verdict in found
        ]
    return "\n".join(lines) + "\n"


def _interval(median, low, high, form=".2f"):
    return f"{median:{form}} [{low:{form}}-{high:{form}}]"


def _line(row):
    def number(name, form, scale=1):
        return "-" if row[name] is None else format(row[name] / scale, form)

    seconds = _interval(row["seconds"], row["seconds_low"], row["seconds_high"])
    limit = "-"
    if row["to_limit"] is not None:
        form = ".2f" if row["to_limit"] < 10 else ".1f"
        limit = _interval(row["to_limit"], row["to_limit_low"], row["to_limit_high"], form)
    return (
        f"  {row['contender']:20}{seconds:>21}{limit:>21}"
        f"{number('writes', '.0f'):>8}{number('reads', '.0f'):>8}{number('flushes', '.0f'):>8}"
        f"{number('device_write_bytes', '.1f', 1e6):>11}{number('written_per_byte', '.2f'):>7}"
        f"{number('processor_ns', '.0f', 1e6):>8}{number('peak_kib', '.0f', 1024):>9}"
    )


def plot(results, directory):
    """time.svg and requests.svg in the directory, as far as there is something to show."""

    def ratio(cell, name):
        return results.ratio(cell, "seconds", name, "limit")

    def writes(cell, name):
        counted = results.counted.get((cell, name))
        # There is no zero on a logarithmic scale.
        return counted and [max(counted.requests["Write"], 1)] * 3

    _bars(
        directory / "time.svg",
        "Time, as a multiple of the same conversion to a target in memory",
        results.cells(),
        (*FILTERS, *LIMITS[1:]),
        ratio,
    )
    _bars(
        directory / "requests.svg",
        "Write requests that reached storage",
        results.cells(),
        tuple(FILTERS),
        writes,
    )


def _bars(path, title, cells, names, value):
    """A plot of value(cell, name), which is a height with its bounds, or None."""
    # gnuplot refuses to draw what has no values at all.
    names = [name for name in names if any(value(cell, name) for cell in cells)]
    if not names:
        return
    rows = [(cell.name, [value(cell, name) or ["NaN"] * 3 for name in names]) for cell in cells]
    data = "\n".join(
        " ".join([_label(cell), *(str(number) for bar in bars for number in bar)])
        for cell, bars in rows
    )
    series = ", ".join(
        f"$data using {2 + 3 * i}:{3 + 3 * i}:{4 + 3 * i}:xtic(1) title '{name}'"
        for i, name in enumerate(names)
    )
    script = path.with_suffix(".gnuplot")
    script.write_text(
        f"""$data << END
{data}
END
set terminal svg size {max(700, 130 * len(rows))},480 noenhanced background "white"
set output "{path}"
set title "{title}"
set style data histograms
set style histogram errorbars gap 1 linewidth 1
set style fill solid 0.8 border -1
set logscale y
set format y "%g"
set grid ytics
set key top center horizontal outside
set bmargin 7
set xtics noenhanced scale 0
plot {series}
"""
    )
    run(["gnuplot", str(script)], path.with_suffix(".gnuplot.err"))
    script.unlink()
    path.with_suffix(".gnuplot.err").unlink()


def _label(cell):
    """A cell's name for gnuplot, one word a line."""
    return '"' + cell.replace("/", r"\n") + '"'
