#!/usr/bin/env bash
# coverage.sh DIRECTORY: which lines and branches of filter/ the tests reach.
# DIRECTORY/source is a copy of the sources, as `make coverage` provides it; all that comes of it
# is put beside it: build/, profiles/, html/ to read, and summary.json.
#
# Everything is built anew by clang++, with what counts the executions and without assertions, and
# all tests run: the unit tests, and the integration tests with the counting filter in the real
# nbdkit. A server that a test kills outright cannot say what it executed; the others write it down
# when they end.
#
#   COVERAGE_LINES=95     fail when fewer per cent of the lines are reached,
#   COVERAGE_BRANCHES=85  or of the branches
#   JOBS=2                for make
set -euo pipefail

cd "${1:?the directory that has source/}"
directory=$PWD
: "${COVERAGE_LINES:=95}" "${COVERAGE_BRANCHES:=85}" "${JOBS:=2}"

for program in clang++ llvm-profdata llvm-cov jq; do
  if ! command -v "$program" >/dev/null; then
    echo "coverage: $program is missing: apt-get install clang llvm jq (Debian)" >&2
    exit 1
  fi
done

mkdir -p build profiles
rm -f profiles/*.profraw
cd build
# What counts calls atexit, and is linked behind the library that has it. Valgrind 3.19 cannot read
# the DWARF 5 of clang.
if [[ ! -e config.status ]]; then
  ../source/configure --quiet CC=clang CXX=clang++ CPPFLAGS=-DNDEBUG \
    CXXFLAGS='-O1 -gdwarf-4 -fprofile-instr-generate -fcoverage-mapping' \
    LDFLAGS='-fprofile-instr-generate -Wl,-u,atexit'
fi
# Nobody asked for what configure's own programs counted.
LLVM_PROFILE_FILE=/dev/null make -j"$JOBS"
LLVM_PROFILE_FILE=$directory/profiles/%p.profraw make check VERBOSE=1
cd ..

# A server that was killed while it wrote left half a file.
find profiles -name '*.profraw' -size +0 >profiles/list
llvm-profdata merge -sparse --failure-mode=all --input-files=profiles/list -o profiles/merged

objects=(build/tests/unit-tests -object build/filter/.libs/nbdkit-qcowcache-filter.so)
options=(-instr-profile=profiles/merged -ignore-filename-regex='/tests/|^/usr/')
llvm-cov show "${objects[@]}" "${options[@]}" -format=html -output-dir=html \
  -show-branches=count >/dev/null
llvm-cov export "${objects[@]}" "${options[@]}" -summary-only >summary.json

jq -r '
  def row: [.name, .of.lines.count, .of.lines.count - .of.lines.covered, .of.lines.percent,
            .of.branches.count, .of.branches.notcovered, .of.branches.percent];
  .data[0]
  | [.files[] | {name: (.filename | sub(".*/filter/"; "")), of: .summary}]
    + [{name: "total", of: .totals}]
  | .[] | row | @tsv' summary.json |
  awk -F '\t' '
    BEGIN {
      printf "%-24s %8s %8s %8s %10s %8s %8s\n",
        "filter/", "lines", "missed", "%", "branches", "missed", "%"
    }
    { printf "%-24s %8d %8d %8.2f %10d %8d %8.2f\n", $1, $2, $3, $4, $5, $6, $7 }'
echo "line by line: $directory/html/index.html"

jq -e --argjson lines "$COVERAGE_LINES" --argjson branches "$COVERAGE_BRANCHES" '
  .data[0].totals | .lines.percent >= $lines and .branches.percent >= $branches' \
  summary.json >/dev/null || {
  echo "coverage: below $COVERAGE_LINES % of lines or $COVERAGE_BRANCHES % of branches" >&2
  exit 1
}
