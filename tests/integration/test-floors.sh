#!/usr/bin/env bash
# The filter's folders are floors: a file includes what lies on its own floor or on
# one below, and no files include each other in a circle.

source "$(dirname "$0")/functions.sh"

python "$(dirname "$0")/../../filter" <<'END'
import re, sys
from pathlib import Path

FLOORS = ["", "cache", "verify", "storage", "memory", "reports", "util"]
root = Path(sys.argv[1])
files = {str(path.relative_to(root)) for path in root.rglob("*.?pp")}
assert len(files) > 50, "the sources are not where they are looked for"

def floor(name):
    return FLOORS.index(name.split("/")[0] if "/" in name else "")

included = {}
for name in files:
    text = (root / name).read_text()
    beside = name.rpartition("/")[0]
    found = [f"{beside}/{each}" if f"{beside}/{each}" in files else each
             for each in re.findall(r'^#include "(.*)"$', text, re.MULTILINE)]
    included[name] = [each for each in found if each in files]
    for each in included[name]:
        if floor(each) < floor(name):
            sys.exit(f"{name} includes {each}, of a floor above")

def visit(name, path):
    if name in path:
        sys.exit("a circle: " + " ".join([*path, name]))
    if name not in done:
        for each in included[name]:
            visit(each, [*path, name])
        done.add(name)

done = set()
for name in sorted(files):
    visit(name, [])
END
