"""What was measured, and the numbers that are made of it."""

import csv

from intervals import interval_of, ratios

MIB = 1 << 20


class Results:
    """Everything measured so far, by cell (or question) and contender."""

    def __init__(self):
        self.runs = {}
        """(cell, contender): its Measured, in the order of the rounds."""
        self.counted = {}
        """(cell, contender): Counted."""
        self.answers = {}
        """(question, contender): its numbers, in the order of the rounds."""

    def cells(self):
        return list(dict.fromkeys(cell for cell, _ in self.runs))

    def contenders(self, cell):
        return [contender for of, contender in self.runs if of == cell]

    def questions(self):
        return list(dict.fromkeys(question for question, _ in self.answers))

    def values(self, cell, contender, field):
        """A field of Measured, run by run; nothing where that was not measured."""
        return [getattr(run, field) for run in self.runs.get((cell, contender), [])]

    def answers_of(self, question, contender):
        return self.answers.get((question, contender), [])

    def ratio(self, cell, field, contender, other):
        """The Interval of contender / other, pair by pair; None where there are no pairs."""
        pairs = ratios(
            *_whole_rounds(
                self.values(cell, contender, field), self.values(cell, other, field)
            )
        )
        return interval_of(pairs) if pairs else None

    def image_bytes(self, cell):
        """Of the image without a filter, which all others are measured by."""
        counted = self.counted.get((cell, "none"))
        return counted.image_bytes if counted else None

    def row(self, cell, contender):
        """Everything about a contender, as a dict; None where it was not measured."""
        seconds = interval_of(self.values(cell, contender, "seconds"))
        limit = self.ratio(cell, "seconds", contender, "limit")
        written = interval_of(self.values(cell, contender, "write_bytes")).median
        image = self.image_bytes(cell)
        counted = self.counted.get((cell, contender))
        requests = counted.requests if counted else {}
        return {
            **cell._asdict(),
            "contender": contender,
            "runs": len(self.runs[cell, contender]),
            "seconds": seconds.median,
            "seconds_low": seconds.low,
            "seconds_high": seconds.high,
            "to_limit": limit and limit.median,
            "to_limit_low": limit and limit.low,
            "to_limit_high": limit and limit.high,
            "stop_seconds": interval_of(self.values(cell, contender, "stop_seconds")).median,
            "writes": requests.get("Write"),
            "reads": requests.get("Read"),
            "zeros": requests.get("Zero"),
            "trims": requests.get("Trim"),
            "flushes": requests.get("Flush"),
            "requested_bytes": requests.get("bytes"),
            "device_write_bytes": written,
            "device_read_bytes": interval_of(
                self.values(cell, contender, "read_bytes")
            ).median,
            "written_per_byte": written / image if image else None,
            "processor_ns": interval_of(self.values(cell, contender, "processor_ns")).median,
            "peak_kib": max(self.values(cell, contender, "peak_kib")),
        }

    def rows(self):
        return [
            self.row(cell, contender)
            for cell in self.cells()
            for contender in self.contenders(cell)
        ]


def _whole_rounds(first, second):
    """A round that was cut short has no pair."""
    count = min(len(first), len(second))
    return first[:count], second[:count]


def write_csv(results, path):
    rows = results.rows()
    if rows:
        _write_rows(path, list(rows[0]), [list(row.values()) for row in rows])


def write_runs_csv(results, path):
    """Each single run, for those who want other statistics."""
    rows = [
        [cell.name, contender, number, *run]
        for (cell, contender), runs in results.runs.items()
        for number, run in enumerate(runs)
    ]
    if rows:
        fields = next(iter(results.runs.values()))[0]._fields
        _write_rows(path, ["cell", "contender", "round", *fields], rows)


def write_answers_csv(results, path):
    rows = [
        [question, contender, number, value]
        for (question, contender), values in results.answers.items()
        for number, value in enumerate(values)
    ]
    if rows:
        _write_rows(path, ["question", "contender", "round", "value"], rows)


def _write_rows(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
