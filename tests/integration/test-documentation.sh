#!/usr/bin/env bash
# The man page, README and --help name the parameters that the filter takes, all
# of them and no others, with the same defaults; and every test that they point
# to is there.

source "$(dirname "$0")/functions.sh"

requires_program podchecker pod2man
source_dir=$(cd "$(dirname "$0")/../.." && pwd)
manual=$source_dir/filter/nbdkit-qcowcache-filter.pod
readme=$source_dir/README.md

podchecker -warnings -warnings "$manual" >"$work/podchecker" 2>&1 ||
    fail "podchecker: $(cat "$work/podchecker")"
if grep -q WARNING "$work/podchecker"; then
    fail "podchecker: $(cat "$work/podchecker")"
fi

pod2man --utf8 --section=1 --stderr "$manual" >"$work/page" 2>"$work/pod2man" ||
    fail "pod2man: $(cat "$work/pod2man")"
[ ! -s "$work/pod2man" ] || fail "pod2man: $(cat "$work/pod2man")"

# What the filter takes is what it says when it is given something else.
nbdkit_refuses --filter="$FILTER" null qcowcache-no-such-parameter=1
sed -n 's/^.*no such parameter; allowed: \(.*\), each after qcowcache-$/\1/p' <<<"$refusal" |
    sed 's/ and /, /; s/, */\n/g' | sort >"$work/taken"
[ "$(wc -l <"$work/taken")" -gt 4 ] || fail "no list of parameters in: $refusal"
# And that is a list by hand, so each of it is tried; what --help names is compared with it below.
while read -r name; do
    nbdkit_refuses --filter="$FILTER" null "qcowcache-$name="
    [[ $refusal != *"no such parameter"* ]] || fail "lists qcowcache-$name and does not take it"
done <"$work/taken"

# Each as a line: the name and its default, "-" for none.
nbdkit --filter="$FILTER" null --help >"$work/help" </dev/null
awk '
    function end() { if (name != "") print name, match(text, /default [^,)]*/) ? substr(text, RSTART + 8, RLENGTH - 8) : "-" }
    /^qcowcache-/ { end(); name = $1; sub(/^qcowcache-/, "", name); sub(/=.*/, "", name); text = "" }
    /^[^q ]/ { end(); name = "" }
    { sub(/^ */, ""); text = text " " $0 }
    END { end() }' "$work/help" | sed 's/ auto: .*/ auto/' | sort >"$work/in-help"
awk '
    function end() { if (name != "") print name, value }
    /^=head1 PARAMETERS/ { inside = 1; next }
    /^=head1/ { if (inside) end(); inside = 0 }
    inside && /^=item B<qcowcache-/ {
        this = $0; sub(/^=item B<qcowcache-/, "", this); sub(/=.*/, "", this)
        if (this != name) { end(); name = this; value = "?" }
    }
    inside && /^The default is C<.*>\.$/ { value = $0; sub(/^The default is C</, "", value); sub(/>\.$/, "", value) }
    inside && /^There is no default\.$/ { value = "-" }
    ' "$manual" | sort >"$work/in-manual"
awk -F ' *\\| *' '
    { gsub(/\\\|/, "/") }
    $2 ~ /^`qcowcache-.*`$/ {
        name = $2; sub(/^`qcowcache-/, "", name); sub(/=.*/, "", name)
        value = $3; gsub(/`/, "", value)
        print name, value == "none" ? "-" : value
    }' "$readme" | sort >"$work/in-readme"
cut -d ' ' -f 1 "$work/in-help" | diff -u "$work/taken" - || fail "--help does not name what the filter takes"
diff -u "$work/in-help" "$work/in-manual" || fail "the man page's parameters or defaults are not those of --help"
diff -u "$work/in-help" "$work/in-readme" || fail "README's parameters or defaults are not those of --help"

# The synopsis has them all, too.
sed -n '/^=head1 SYNOPSIS/,/^=head1 DESCRIPTION/s/^ *\[qcowcache-\([a-z-]*\)=.*/\1/p' "$manual" | sort |
    diff -u "$work/taken" - || fail "the man page's synopsis differs"

# The keys of the JSON report.
start_nbdkit report --filter="$FILTER" null 1M qcowcache-stats="$work/report.json"
nbdinfo --size "$(uri report)" >/dev/null
stop_nbdkit report
jq -r 'keys[], (.total | keys[])' "$work/report.json" | sort -u >"$work/keys"
sed -n '/^=head1 STATISTICS/,/^=head1 WHERE/s/^=item C<\(.*\)>$/\1/p' "$manual" | sort -u |
    diff -u "$work/keys" - || fail "the man page's keys of the report are not those of the report"
jq -r '.total.partial_units | keys[]' "$work/report.json" |
    while read -r cause; do
        grep -q "C<$cause>" "$manual" || fail "the man page does not name the cause $cause"
    done

# Tests that are pointed to.
grep -o -h -E '(tests/[a-z]+/)?(test-[a-z0-9-]+\.sh|[a-z0-9_]+_test\.cpp)' "$manual" "$readme" |
    sed 's|.*/||' | sort -u >"$work/tests-named"
[ "$(wc -l <"$work/tests-named")" -gt 20 ] || fail "hardly any tests are named"
while read -r name; do
    [ -n "$(find "$source_dir/tests/integration" "$source_dir/tests/unit" -name "$name")" ] ||
        fail "there is no test $name"
done <"$work/tests-named"

# Nobody who finds commands on the page should find them untested.
awk '/^=head/ { title = substr($0, 8) }
     /^ / && title != "SYNOPSIS" && title != seen { print title; seen = title }' "$manual" >"$work/examples"
[ "$(wc -l <"$work/examples")" -gt 13 ] || fail "hardly any commands on the page"
while read -r title; do
    grep -q -F "\"$title\"" "$source_dir"/tests/integration/test-example-*.sh ||
        fail "no test runs the commands under \"$title\""
done <"$work/examples"

# README's recipes are examples of the man page: those that a test runs.  So is
# the command further down, for which the man page has a section in its notes.
python "$readme" "$manual" <<'END' || fail "a recipe of README is not an example of the man page"
import re, sys, textwrap
readme, manual = (open(name, encoding="utf-8").read() for name in sys.argv[1:])
examples = manual.split("\n=head1 EXAMPLES\n")[1].split("\n=head1 ")[0]
examples = re.sub(r"^ ", "", examples, flags=re.MULTILINE)
recipes = readme.split("\n## Recipes\n")[1].split("\n## ")[0]
recipes = re.findall(r"^```sh\n(.*?)^```$", recipes, flags=re.MULTILINE | re.DOTALL)
assert len(recipes) >= 2
for recipe in recipes:
    assert recipe in examples, recipe
notes = re.sub(r"^ ", "", manual.split("\n=head1 NOTES\n")[1], flags=re.MULTILINE)
commands = re.findall(r"^ +nbdkit -U .*\n(?: .*\n)*", readme.split("\n## Limits\n")[1], flags=re.MULTILINE)
assert len(commands) == 1, commands
assert textwrap.dedent(commands[0]) in notes, commands[0]
END
