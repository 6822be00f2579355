#!/usr/bin/env bash
# The man page's examples with storage on another machine, run as they stand
# there, except that the other machine is this one: an SSH server and an NBD
# server with TLS of the test's own.  Where that has no room, they fail.

# Nobody but root can be the user that sshd lets in.
# shellcheck disable=SC2034  # for functions.sh
[ "$(id -u)" -ne 0 ] || own_mounts=1
source "$(dirname "$0")/functions.sh"
source "$(dirname "$0")/examples.sh"

requires_program psktool ssh-keygen
# sshd starts itself anew for each connection, for which it needs its full name.
sshd=$(PATH=$PATH:/usr/sbin:/sbin type -P sshd) || fail "sshd is missing: ./bootstrap check installs it"

free_port ()
{
    python <<'END'
import socket
with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as free:
    free.bind(("::", 0))
    print(free.getsockname()[1])
END
}

# An SSH server for this user alone, with keys and a configuration of its own.
ssh_port=$(free_port)
mkdir -m 700 "$work/ssh"
ssh-keygen -q -t ed25519 -N "" -f "$work/ssh/host"
ssh-keygen -q -t ed25519 -N "" -f "$work/ssh/user"
cat >"$work/ssh/sshd_config" <<END
ListenAddress 127.0.0.1:$ssh_port
HostKey $work/ssh/host
AuthorizedKeysFile $work/ssh/user.pub
AuthenticationMethods publickey
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile $work/ssh/sshd.pid
Subsystem sftp internal-sftp
END
echo "[127.0.0.1]:$ssh_port $(cat "$work/ssh/host.pub")" >"$work/ssh/known_hosts"
cat >"$work/ssh/config" <<END
Host storage.example.com
    HostName 127.0.0.1
    Port $ssh_port
    IdentityFile $work/ssh/user
    UserKnownHostsFile $work/ssh/known_hosts
END
# Where root's sshd confines the part of it that nobody has authenticated to yet.
[ "$(id -u)" -ne 0 ] || mkdir -p /run/sshd
"$sshd" -f "$work/ssh/sshd_config" -E "$work/ssh/log" -D &
sshd_pid=$!
cleanup_fn kill "$sshd_pid"
wait_until 30 test -s "$work/ssh/sshd.pid" || fail "sshd does not start: $(cat "$work/ssh/log")"

# What ~/.ssh/config would say, and where the remote machine keeps its files.
places+=(-e "s|ssh host=|ssh config=$work/ssh/config host=|" -e "s|/srv/backup|$here|")
at_example
run_example "A file on an SSH server" || { tail -n 30 "$work/ssh/log" >&2; exit 1; }
holds disk.qcow2
fails "A file on an SSH server"

# The same once more, at another name of this machine.
places+=(-e "s|storage\.example\.com|localhost|" -e "s|10809|$(free_port)|")
at_example
example "A remote NBD server, with TLS" >"$work/example.tls"
paragraph 1 <"$work/example.tls" | run_here
paragraph 2 <"$work/example.tls" | run_here
holds disk.qcow2

# The two machines' commands are typed in two shells.
tls_fails ()
{
    example "$1" >"$work/example.in-vain"
    paragraph 1 <"$work/example.in-vain" | run_here >/dev/null
    paragraph 2 <"$work/example.in-vain" | fails_here
}
fails "A remote NBD server, with TLS" zlib tls_fails

# Without the key nobody is served.
at_example
paragraph 1 <"$work/example.tls" | run_here
sed 's|tls-psk=keys/keys.psk|tls-psk=keys/other.psk|' <"$work/example.tls" | paragraph 2 >"$work/other"
(cd "$here" && psktool -u backup -p keys/other.psk >/dev/null 2>&1 &&
    ! bash -eu "$work/other" >"$work/other.out" 2>&1) || fail "another key opens the server"
