#!/usr/bin/env bash
# nbdkit as a service: the units are in order, what the service starts serves a
# socket that somebody else has opened, SIGTERM loses nothing, and it works as an
# unprivileged user.  An image that finds no room is a failure.

# shellcheck disable=SC2034  # for functions.sh
[ "$(id -u)" -ne 0 ] || own_mounts=1
source "$(dirname "$0")/functions.sh"
source "$(dirname "$0")/examples.sh"

units=$(cd "$(dirname "$0")/../.." && pwd)/systemd

# Prints what it finds, and exits with 0 all the same.
if command -v systemd-analyze >/dev/null; then
    systemd-analyze verify --man=no "$units"/nbdkit-qcowcache.{socket,service} >"$work/verdict" 2>&1 || :
    [ ! -s "$work/verdict" ] || fail "systemd-analyze verify: $(cat "$work/verdict")"
else
    echo "systemd-analyze is not here to verify the units"
fi

# setting UNIT NAME: its value, with the lines that it continues on
setting ()
{
    sed -e ':more' -e '/\\$/{N;s/\\\n *//;b more' -e '}' "$units/nbdkit-qcowcache.$1" | sed -n "s/^$2=//p"
}

# What the man page explains.
[ "$(setting service KillMode)" = mixed ] || fail "KillMode"
[ "$(setting service TimeoutStopSec)" = 15min ] || fail "TimeoutStopSec"
read -r images state < <(setting service StateDirectory)
directory=/var/lib/$images
state=/var/lib/$state
socket=$(setting socket ListenStream)
grep -q -F "$directory" "$manual" || fail "the man page does not name $directory"
grep -q -F "$state" "$manual" || fail "the man page does not name $state"
grep -q -F "$socket" "$manual" || fail "the man page does not name $socket"

# activate USER: what systemd does. Opens the socket, waits for a client, and
# becomes the service's command, as that user.
mkdir "$work/run" "$work/state"
report=/run/$(setting service RuntimeDirectory)
places+=(-e "s|$socket|$work/service.sock|g" -e "s|$state|$work/state|" -e "s|$directory|$work/images|" -e "s|$report|$work/run|")
activate ()
{
    rm -f "$work/service.sock"
    setting service ExecStart | sed "${places[@]}" >"$work/command"
    "$PYTHON" - "$work/service.sock" "$work/command" "$1" >"$work/service.err" 2>&1 <<'END' &
import os, pwd, select, shlex, socket, sys

path, command, user = sys.argv[1:]
with open(command) as file:
    command = shlex.split(file.read())
listening = socket.socket(socket.AF_UNIX)
listening.bind(path)
listening.listen()
select.select([listening], [], [])
account = pwd.getpwnam(user)
if os.getuid() != account.pw_uid:
    os.setgroups([])
    os.setgid(account.pw_gid)
    os.setuid(account.pw_uid)
if listening.fileno() == 3:
    os.set_inheritable(3, True)
else:
    os.dup2(listening.fileno(), 3)
os.environ["LISTEN_FDS"] = "1"
os.environ["LISTEN_PID"] = str(os.getpid())
os.execvp(command[0], command)
END
    server_pid[service]=$!
    cleanup_fn kill_server service
    wait_until 30 test -S "$work/service.sock" || fail "no socket"
}

# An unprivileged user, where the test may choose; else the one that it has.
user=nobody
[ "$(id -u)" -eq 0 ] || user=$(id -un)
chmod 711 "$work"
# That user must be able to read the filter, wherever the build is.
if [[ $FILTER == */* ]]; then
    install -m 644 "$FILTER" "$work/nbdkit-qcowcache-filter.so"
    places+=(-e "s|--filter=$FILTER|--filter=$work/nbdkit-qcowcache-filter.so|")
fi

chown "$user" "$work/run" "$work/state"

# As the page says, but for the user, who is there, and for the systemd that runs
# here: the units are put, and enabled, below a root of their own.
title="AS A SERVICE"
group=$(id -gn "$user")
places+=(-e "s|-o nbdkit-qcowcache -g nbdkit-qcowcache|-o $user -g $group|" -e "s|chown nbdkit-qcowcache|chown $user|")
places+=(-e "s|/etc/systemd/system|$work/root/etc/systemd/system|")
places+=(-e "s|systemctl enable --now|systemctl --root=$work/root enable|")
left_out='useradd |systemctl daemon-reload'
if ! command -v systemctl >/dev/null; then
    echo "systemctl is not here to enable the socket"
    left_out+='|systemctl '
fi
mkdir -p "$work/root/etc/systemd/system"
at_example
cp "$units"/* "$here"
example "$title" | paragraph 1 | sed -E "s/^($left_out).*[^&]/true /; s/true &&$/true \&\&/" | run_here
for unit in "$units"/*; do
    cmp "$unit" "$work/root/etc/systemd/system/${unit##*/}" || fail "${unit##*/} is not installed"
done
if command -v systemctl >/dev/null; then
    [ -L "$work/root/etc/systemd/system/sockets.target.wants/nbdkit-qcowcache.socket" ] ||
        fail "the socket is not enabled"
fi
example "$title" | grep "^useradd .* $(setting service User) &&\$" >/dev/null ||
    fail "the man page makes another user than the service has"
activate "$user"
example "$title" | paragraph 2 | run_here
[ "$(stat -c %U "/proc/${server_pid[service]}")" = "$user" ] || fail "not as $user"
stop_nbdkit service
image_holds "$work/images/disk.qcow2" "$work/source"
grep -q '^qcowcache_lost_bytes_total{server="backup",export="disk.qcow2"} 0$' "$work/run/backup.prom" ||
    fail "no report: $(cat "$work/run/backup.prom")"

# service_fails: the same commands have to fail
service_fails ()
{
    rm -f "$work/images/disk.qcow2"
    chown "$user" "$work/images"
    activate "$user"
    example "$title" | paragraph 2 | fails_here
    echo "refused: $(tail -n 1 "$work/said")"
    stop_nbdkit service
}
changes=(-e 's/truncate -s 1G /truncate -s 4M /')
service_fails
changes=()
if small_filesystem "$work/images" 4M; then
    service_fails
    unmount "$work/images"
fi

# What the disk had no room for was never acknowledged.
[ ! -s "$work/state/unclean" ] || fail "something is lost: $(cat "$work/state/unclean")"

# A client that is still there at the end and has not flushed.
truncate -s 0 "$work/images/disk.qcow2"
truncate -s 64M "$work/images/disk.qcow2"
write_header "$work/images/disk.qcow2" 16
activate "$user"
python "$work/service.sock" "${server_pid[service]}" <<'END'
import os, signal, sys
from nbd_clients import connect
client = connect(sys.argv[1], "disk.qcow2")
client.pwrite(b"acknowledged", 1000001)
os.kill(int(sys.argv[2]), signal.SIGTERM)
END
end_of_nbdkit service
[ "$(dd if="$work/images/disk.qcow2" bs=1 skip=1000001 count=12 status=none)" = acknowledged ] ||
    fail "SIGTERM lost what was acknowledged"

# The other way to an unprivileged user, which only root can go: nbdkit's own -u.
if [ "$(id -u)" -eq 0 ]; then
    fresh_file "$work/images/disk.qcow2" 64M
    chown "$user" "$work" "$work/images/disk.qcow2" # the first for the file of -P
    start_nbdkit own -u "$user" --filter="$FILTER" file "$work/images/disk.qcow2"
    convert "$work/source" "$(uri own)" 64k zlib
    [ "$(stat -c %U "/proc/${server_pid[own]}")" = "$user" ] || fail "-u: not as $user"
    stop_nbdkit own
    image_holds "$work/images/disk.qcow2" "$work/source"
fi
