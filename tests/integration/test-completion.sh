#!/usr/bin/env bash
# The tab key completes the name of the filter in bash, with nbdkit's own
# completion: after "--filter " and after "--filter=".

source "$(dirname "$0")/functions.sh"

completions=/usr/share/bash-completion
for file in "$completions/bash_completion" "$completions/completions/nbdkit"; do
    [ -e "$file" ] || fail "$file is missing: ./bootstrap check installs it"
done

# The completion lists the directory that nbdkit says it takes filters from. A
# filter that is not installed is put into another one, beside all that are.
cat >"$work/bashrc" <<END
PS1='ready> '
unset HISTFILE
source $completions/bash_completion
END
if [[ $FILTER == */* ]]; then
    filterdir=$(nbdkit --dump-config | sed -n 's/^filterdir=//p')
    mkdir "$work/filters"
    ln -s "$filterdir"/nbdkit-*-filter.so "$work/filters"
    rm -f "$work/filters/nbdkit-qcowcache-filter.so"
    install -m 755 "$FILTER" "$work/filters"
    cat >>"$work/bashrc" <<END
nbdkit () { command nbdkit "\$@" | sed 's|^filterdir=.*|filterdir=$work/filters|'; }
END
fi

# completed TYPED: the command line that TYPED and a tab make, in a terminal
completed ()
{
    python "$work" "$1" <<'END'
import os, pty, re, select, sys, time

work, typed = sys.argv[1:]
child, terminal = pty.fork()
if child == 0:
    os.chdir(work)
    os.environ.update(TERM="dumb", COLUMNS="200", INPUTRC="/dev/null")
    os.execlp("bash", "bash", "--noprofile", "--rcfile", "bashrc", "-i")


def shown(pattern):
    text = ""
    limit = time.monotonic() + 60
    while not (found := re.search(pattern, text)):
        if not select.select([terminal], [], [], max(0, limit - time.monotonic()))[0]:
            sys.exit(f"the terminal shows only: {text!r}")
        text += os.read(terminal, 4096).decode()
    return found


shown("ready> ")
# Control-A goes to the line's beginning, so that the shell says what the line has become.
os.write(terminal, typed.encode() + b"\t\x01echo made: \n")
print(shown(r"\nmade: (.*?) *\r?\n")[1])
os.close(terminal)
os.waitpid(child, 0)
END
}

for typed in 'nbdkit --filter qcowc' 'nbdkit --filter=qcowc'; do
    line=$(completed "$typed")
    [ "$line" = "${typed}ache" ] || fail "\"$typed\" and a tab make \"$line\""
done

# And it is the directory that is looked at.
[ "$(completed 'nbdkit --filter=no-such-fil')" = 'nbdkit --filter=no-such-fil' ] ||
    fail "a filter that is not there is completed"
