#!/usr/bin/env bash
# qcowcache-stats: its numbers are those that nbdkit's log filter counts above
# the filter and nbdkit's stats filter below it, in each of the three forms, and
# what an operator has to know (memory, refusals, losses) is among them.

source "$(dirname "$0")/functions.sh"

"$PYTHON" -c 'import prometheus_client' 2>/dev/null ||
    fail "prometheus_client is missing for $PYTHON: ./bootstrap installs it"

: "${SIZE:=24M}"
make_tar_image "$work/source" "$SIZE"
report=$work/reports/disk
mkdir "$work/reports"

# What the reports have to be like, for the programs below.
cat >"$work/reports.py" <<'END'
import json, re
from prometheus_client.parser import text_string_to_metric_families

CAUSES = {"flush", "disconnect", "expiry", "memory", "cluster_end", "many_pieces", "new_layout",
          "comparison"}
COUNTS = {
    "client_writes", "client_odd_writes", "client_written_bytes", "client_reads",
    "client_read_bytes", "client_flushes", "client_zeros", "client_trims", "storage_writes",
    "storage_written_bytes", "merged_writes", "whole_units", "writes_through", "storage_reads",
    "storage_read_bytes", "fill_up_reads", "fill_up_read_bytes", "storage_flushes",
    "storage_zeros", "storage_trims", "reservations", "reserved_bytes", "refused_reservations",
    "memory_wait_seconds", "refused_writes", "retries",
    "lost_bytes", "verified_deflate_clusters", "verified_deflate_bytes", "verified_zstd_clusters",
    "verified_zstd_bytes", "unreadable_alarms",
}
LEVELS = {"unreadable_clusters"}
DERIVED = {"average_client_write_bytes", "average_storage_write_bytes", "write_amplification"}
SERVER = {"elapsed_seconds", "memory_limit_bytes", "memory_used_bytes", "memory_peak_bytes"}


def from_json(path):
    with open(path) as file:
        report = json.load(file)
    assert report.keys() == SERVER | {"version", "exports", "others", "total"}, report.keys()
    assert report["version"] == 2
    for export in report["exports"] + [report["total"]]:
        assert export.keys() == COUNTS | LEVELS | DERIVED | {"name", "partial_units"}, export.keys()
        assert export["partial_units"].keys() == CAUSES
    return report


def from_prometheus(path, server):
    """The counts, by export."""
    with open(path) as file:
        families = list(text_string_to_metric_families(file.read()))
    types = {}
    exports = {}
    for family in families:
        assert family.documentation, f"{family.name} has no HELP"
        name = family.name.removeprefix("qcowcache_")
        types[name] = family.type
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("server") == server, sample
            if family.type == "counter" or name in LEVELS:
                assert sample.name == family.name + ("_total" if name not in LEVELS else ""), sample
                counts = exports.setdefault(labels.pop("export"), {"partial_units": {}})
                key = name
                if name == "partial_units":
                    counts, key = counts[name], labels.pop("cause")
                assert key not in counts, f"{sample} twice"
                counts[key] = sample.value
            assert not labels, sample
    assert {name for name, kind in types.items() if kind == "gauge"} == SERVER | LEVELS, types
    assert {name for name, kind in types.items() if kind == "counter"} == COUNTS | {"partial_units"}, types
    for counts in exports.values():
        assert counts["partial_units"].keys() == CAUSES
    return exports


def below(path):
    """What nbdkit's stats filter says: operations, bytes, and how exactly it says those."""
    units = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    found = {}
    with open(path) as file:
        for line in file:
            match = re.match(r"(\w+): (\d+) ops, [\d.]+ s, ([\d.]+) (bytes|[KMG]iB)", line)
            if match:
                unit = units[match[4]]
                found[match[1]] = int(match[2]), float(match[3]) * unit, 0.006 * unit
    return found


def agree(counts, above, stats):
    """An export's counts, those of the log above, and what `below` found."""
    for name, value in above.items():
        assert counts[name] == int(value), f"{name}: {counts[name]}, but above {value}"
    for request in ("write", "read", "zero", "trim", "flush"):
        operations, size, exactness = stats.get(request, (0, 0, 0))
        name = "storage_flushes" if request == "flush" else f"storage_{request}s"
        assert counts[name] == operations, f"{name}: {counts[name]}, but below {operations}"
        if request in ("write", "read"):
            name = "storage_written_bytes" if request == "write" else "storage_read_bytes"
            assert abs(counts[name] - size) <= exactness, f"{name}: {counts[name]}, but below {size}"
    assert counts["fill_up_reads"] <= counts["storage_reads"]
    assert counts["merged_writes"] <= counts["storage_writes"]
END
PYTHONPATH+=:$work

# in_total CONDITION...: of the JSON report, whose sums are "total", and of what is "below"
in_total ()
{
    "$PYTHON" -c 'import sys, reports
path, stats, *conditions = sys.argv[1:]
report, below = reports.from_json(path), reports.below(stats)
for condition in conditions:
    if not eval(condition, {"report": report, "total": report["total"], "below": below}):
        sys.exit(f"not so: {condition}: {report}")' "$report.json" "$work/below.stats" "$@"
}

# start NAME FORM ARGUMENT...: with log above, stats below, and a report of this form
start ()
{
    local name=$1 form=$2
    shift 2
    rm -f "$report".*
    start_nbdkit "$name" --filter=log --filter="$FILTER" --filter=stats "$@" \
        logfile="$work/above.log" statsfile="$work/below.stats" qcowcache-stats="$report.$form"
}

# agrees FORM: the report, the log above and the stats below say the same of the
# only export
agrees ()
{
    local log=$work/above.log
    python "$report.$1" "$work/below.stats" \
        client_writes="$(count_log "$log" writes)" \
        client_odd_writes="$(count_log "$log" odd)" \
        client_written_bytes="$(count_log "$log" bytes)" \
        client_reads="$(count_log "$log" reads)" \
        client_read_bytes="$(count_log "$log" read-bytes)" \
        client_zeros="$(count_log "$log" zeros)" \
        client_trims="$(count_log "$log" trims)" \
        client_flushes="$(count_log "$log" flushes)" <<'END'
import sys
from reports import agree, below, from_json, from_prometheus
path, stats, *above = sys.argv[1:]
if path.endswith(".json"):
    report = from_json(path)
    assert len(report["exports"]) == 1, report["exports"]
    counts = report["exports"][0]
    assert counts["name"] == ""
    for name in counts.keys() - {"name"}:
        assert report["total"][name] == counts[name], name
    assert 0 < report["memory_peak_bytes"] <= report["memory_limit_bytes"], report
    amplification = counts["storage_written_bytes"] / counts["client_written_bytes"]
    assert abs(counts["write_amplification"] - amplification) < 1e-5, counts
    average = counts["storage_written_bytes"] / counts["storage_writes"]
    assert abs(counts["average_storage_write_bytes"] - average) < 1e-5, counts
else:
    exports = from_prometheus(path, "disk")
    assert exports.keys() == {""}, exports.keys()
    counts = exports[""]
agree(counts, dict(word.split("=") for word in above), below(stats))
assert counts["whole_units"] > 0 and counts["client_odd_writes"] > 0, counts
assert counts["partial_units"]["flush"] > 0, counts
assert counts["lost_bytes"] == counts["refused_writes"] == counts["retries"] == 0, counts
print(f"{int(counts['client_writes'])} writes became {int(counts['storage_writes'])}: all agree")
END
}

echo "conversions"
fresh_file "$work/target" 64M
start server json file "$work/target"
convert "$work/source" "$(uri server)" 64k zstd
stop_nbdkit server
agrees json
fresh_file "$work/target" 64M
start server prom file "$work/target"
convert "$work/source" "$(uri server)" 4k zlib -W -m 16
stop_nbdkit server
agrees prom
[ "$(ls "$work/reports")" = disk.prom ] || fail "left beside the report: $(ls "$work/reports")"

echo "requests of every kind, to storage that knows nothing of zeros, in little memory"
head -c 16777216 "$work/source" >"$work/target"
write_header "$work/target" 16
start server json --filter=noextents file "$work/target" qcowcache-size=512K
mixed_requests server
stop_nbdkit server
agrees json
in_total 'total["fill_up_reads"] > 0' 'total["fill_up_read_bytes"] > 0' 'total["writes_through"] > 0' \
    'report["memory_limit_bytes"] == 512 << 10'

echo "memory that runs out"
fresh_image "$work/target" 64M 16
start server json file "$work/target" qcowcache-size=512K
run_client server <<'END'
for unit in range(1, 500):
    client.pwrite(b"part", unit * 65536)
client.shutdown()
END
stop_nbdkit server
in_total 'total["memory_wait_seconds"] > 0' 'total["partial_units"]["memory"] > 400' \
    'sum(total["partial_units"].values()) == 499' '128 << 10 < report["memory_peak_bytes"] <= 512 << 10'

echo "storage that refuses, is tried again, and refuses to the end"
fresh_image "$work/target" 16M 16
start server json --filter=error file "$work/target" qcowcache-expire=0 \
    error-pwrite=ENOSPC error-pwrite-rate=100% error-pwrite-file="$work/full"
run_client server "$work/full" <<'END'
open(arguments[0], "w").close()
client.pwrite(b"part" * 250, (1 << 20) + 17)
assert error_of(client.flush) and error_of(client.flush), "storage should have refused"
os.unlink(arguments[0])
client.flush()
open(arguments[0], "w").close()
client.pwrite(b"gone" * 300, (2 << 20) + 17)
client.pwrite(b"gone" * 300, (3 << 20) + 17)
client.shutdown()
END
stop_nbdkit server
rm "$work/full"
in_total 'total["lost_bytes"] == 2400' 'total["refused_writes"] >= 3' 'total["retries"] >= 2' \
    'total["partial_units"]["flush"] == 1' \
    'sum(total["partial_units"].values()) == total["storage_writes"] == 1' 'below["write"][0] == 1'

echo "text for people"
fresh_image "$work/target" 16M 16
start server txt file "$work/target"
nbdsh -u "$(uri server)" -c 'h.pwrite(b"x" * 100, 70000)' -c 'h.flush()'
stop_nbdkit server
cat "$report.txt"
for line in '1  Write requests of clients' '100 bytes  Bytes in write requests of clients' \
    '1  Units written before clients had filled them: flush' \
    '40.960  Bytes written to storage for each byte that clients wrote' \
    '0 bytes  Acknowledged bytes that storage never took and that are gone'; do
    grep -q "^ *$line\$" "$report.txt" || fail "no line: $line"
done

echo "names that clients choose, some of them odd, and more than are kept apart"
start server prom memory 1M qcowcache-cluster-size=64k
run_client server <<'END'
odd = ["a%22b", "a%5cb", "a%0ab", "%ff%fe", "%c3%bc", "%5cother", "other"]
client.pwrite(b"x", 0)
for name in odd + [f"disk{number}" for number in range(1029 - len(odd))] + ["disk0"]:
    client = nbd.NBD()
    client.connect_uri(f"nbd+unix:///{name}?socket={address}")
    client.pwrite(b"x", 0)
    client.shutdown()
END
stop_nbdkit server
python "$report.prom" <<'END'
import sys
from reports import from_prometheus
exports = from_prometheus(sys.argv[1], "disk")
assert len(exports) == 1001, len(exports)
for name in ("", 'a"b', "a\\x5cb", "a\\x0ab", "\\xff\\xfe", "\u00fc", "\\x5cother", "other"):
    assert exports[name]["client_writes"] == 1, name
assert exports["disk0"]["client_writes"] == 2
assert exports["\\other"]["client_writes"] == 30
END

echo "rewritten while nbdkit serves, without background writers, too"
fresh_file "$work/target" 16M
start server json file "$work/target" qcowcache-writers=0 qcowcache-stats-interval=1
run_client server "$report.json" <<'END'
from reports import from_json
def wait_for(writes):
    wait_until(lambda: os.path.exists(arguments[0]) and from_json(arguments[0])["total"]["client_writes"] == writes,
               f"{writes} writes are reported", 60)

wait_for(0)
client.pwrite(b"x", 0)
wait_for(1)
client.pwrite(b"x", 0)
client.shutdown()
END
stop_nbdkit server
in_total 'total["client_writes"] == 2'

echo "a directory that goes away: a message, and nothing more"
start server json file "$work/target"
nbdsh -u "$(uri server)" -c 'h.pwrite(b"still stored", 70000)'
rm -r "$work/reports"
stop_nbdkit server
[ "$(grep -c "error: qcowcache-stats=$report.json: No such file or directory" "$work/server.err")" -eq 1 ] ||
    fail "not said once: $(cat "$work/server.err")"
[ "$(dd if="$work/target" bs=1 skip=70000 count=12 status=none)" = "still stored" ] || fail "not stored"
