#!/usr/bin/env python3
"""Run a command on a small cluster of hosts that are namespaces of this machine.

    tests/cluster/hosts.py --hosts 2 --ranks 2 --rate 1gbit --cores 1 -- {mpiexec} {python} -m hpcmlp bench comm

Every host has its own name, network interface, process numbers, /dev/shm and TMPDIR, so MPI sees separate nodes
without being told; files are common, as on a cluster's shared file system. The command runs on one more host,
`login`. In it `{mpiexec}` stands for the MPI's own launcher with hosts and number of ranks, `{python}` for this Python;
`on n2 COMMAND` (in PATH) runs COMMAND on host n2. The exit code is the command's, 69 where no hosts can be had.

Everything lives under one process in one outer set of namespaces, files of the cluster on a memory file system that
is mounted there only: when that process ends, however it ends, the kernel takes down processes, links and files.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

# Our files stand on a private mount over this directory, which every Linux has and only removable media use.
PLACE = Path("/media")
NAMESPACES = ("--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--mount", "--net", "--uts", "--ipc")
TOOLS = ("unshare", "nsenter", "setpriv", "taskset", "ip", "tc", "mount", "hostname", "bash")
NETWORK = "10.77.0"
LOGIN = 254
UNAVAILABLE = 69        # EX_UNAVAILABLE

# The first process of a host. It stays, and must collect the orphans of its namespace: hence the loop.
INIT = """
set -e
hostname "$1"
ip link set lo up
mount -t tmpfs tmpfs /dev/shm
mount -t sysfs sysfs /sys
mount --bind "$2" "$3"
echo up
exec >/dev/null
while :; do sleep 3600 & wait $!; done
"""

ON = """#!/bin/sh
# on HOST COMMAND...: run COMMAND on HOST, on its cores, in this directory.
host=$1; shift
# the directory is entered inside: through --wd it would stand on login's mount, and renaming to an own path would fail
exec taskset -c "$(cat {place}/$host.cores)" nsenter -t "$(cat {place}/$host.pid)" -n -u -m -i -p -- \\
    sh -c 'cd "$0" && exec "$@"' "$PWD" "$@"
"""

# What a launcher takes for ssh. Like ssh it gives a bare environment, and 255 when the other side was killed: without
# that Open MPI's launcher returns 0 for a host that died.
AGENT = """#!/bin/bash
while [ "${{1#-}}" != "$1" ]; do shift; done
host=${{1##*@}}; shift
cd /
env -i HOME="$HOME" USER="$USER" SHELL=/bin/bash PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin TMPDIR={place}/tmp \\
    {place}/on "$host" bash -c "$*"
code=$?
[ $code -le 128 ] || code=255
exit $code
"""


class Unavailable(Exception):
    """Why no hosts can be had on this machine."""


def run(*command):
    """Run a command of the set-up; Unavailable with its message when it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"`{' '.join(map(str, command))}` fails: {' '.join(done.stderr.split())}")


def unshare_command(environ=os.environ):
    """Return the command that opens a set of namespaces and dies with its parent."""
    missing = [tool for tool in TOOLS if not shutil.which(tool, path=environ.get("PATH"))]
    if missing:
        raise Unavailable(f"these programs are missing: {', '.join(missing)} (Debian: iproute2, util-linux)")
    user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    command = ("setpriv", "--pdeathsig", "KILL", "unshare", *user, *NAMESPACES)
    run(*command, "true")
    return command


def outside(arguments):
    """Open the outer namespaces, let this program go on inside, hand out its exit code."""
    command = [*unshare_command(), sys.executable, __file__, "--inside", *arguments]
    process = subprocess.Popen(command)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: process.kill())
    code = process.wait()
    return 128 - code if code < 0 else code


class Cluster:
    """Login and the hosts n1, n2, ...: made in the namespaces that `outside` has opened."""

    def __init__(self, num_hosts, rate=None, cores=None):
        self.names = [f"n{k}" for k in range(1, num_hosts + 1)]
        self.rate = rate
        self.cores = cores
        self.inits = []     # the processes that hold the hosts' namespaces open
        self._start_login()
        for k, name in enumerate(self.names, 1):
            self._start_host(k, name)

    def _start_login(self):
        run("mount", "-t", "tmpfs", "tmpfs", PLACE)
        run("mount", "-t", "tmpfs", "tmpfs", "/dev/shm")
        run("mount", "-t", "sysfs", "sysfs", "/sys")
        run("hostname", "login")
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "br0", "type", "bridge")
        run("ip", "addr", "add", f"{NETWORK}.{LOGIN}/24", "dev", "br0")
        run("ip", "link", "set", "br0", "up")
        lines = ["127.0.0.1 localhost", f"{NETWORK}.{LOGIN} login"]
        lines += [f"{NETWORK}.{k} {name}" for k, name in enumerate(self.names, 1)]
        (PLACE / "etc-hosts").write_text("\n".join(lines) + "\n")
        run("mount", "--bind", PLACE / "etc-hosts", "/etc/hosts")
        (PLACE / "tmp").mkdir(mode=0o1777)
        for name, text in (("on", ON), ("agent", AGENT)):
            (PLACE / name).write_text(text.format(place=PLACE))
            (PLACE / name).chmod(0o755)
        (PLACE / "ssh").symlink_to("agent")     # what launchers that are told nothing look for

    def _start_host(self, number, name):
        available = sorted(os.sched_getaffinity(0))
        count = self.cores or len(available)
        mine = {available[((number - 1) * count + k) % len(available)] for k in range(count)}
        (PLACE / f"{name}.cores").write_text(",".join(map(str, sorted(mine))))
        own = PLACE / f"tmp.{name}"
        own.mkdir(mode=0o1777)
        init = subprocess.Popen(["unshare", *NAMESPACES, "bash", "-c", INIT, "init", name, own, PLACE / "tmp"],
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.inits.append(init)
        if init.stdout.readline() != "up\n":
            raise Unavailable(f"host {name} does not start: {' '.join(init.stderr.read().split())}")
        pid = Path(f"/proc/{init.pid}/task/{init.pid}/children").read_text().split()[0]
        (PLACE / f"{name}.pid").write_text(pid)
        port = f"v{number}"
        run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", pid)
        run("ip", "link", "set", port, "master", "br0", "up")
        inside = (PLACE / "on", name)
        run(*inside, "ip", "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        run(*inside, "ip", "link", "set", "eth0", "up")
        if self.rate:
            shape = ("root", "tbf", "rate", self.rate, "burst", "128kb", "latency", "20ms")
            run("tc", "qdisc", "add", "dev", port, *shape)
            run(*inside, "tc", "qdisc", "add", "dev", "eth0", *shape)


def find_mpiexec():
    """Return the launcher: $MPIEXEC, else the one beside this Python, else the one in PATH."""
    beside = Path(sys.executable).parent / "mpiexec"
    found = os.environ.get("MPIEXEC") or (str(beside) if beside.exists() else shutil.which("mpiexec"))
    return shutil.which(found) if found else None


def launcher(mpiexec, names, ranks):
    """Return the words that start `ranks[k]` ranks on host `names[k]`, every variable of this environment passed on."""
    if mpiexec is None:
        raise Unavailable("there is no mpiexec beside this Python, in PATH or named by MPIEXEC")
    version = subprocess.run([mpiexec, "--version"], capture_output=True, text=True).stdout
    hosts = ",".join(f"{name}:{count}" for name, count in zip(names, ranks, strict=True) if count)
    agent, total = str(PLACE / "agent"), str(sum(ranks))
    if "HYDRA" in version:
        return [mpiexec, "-launcher", "ssh", "-launcher-exec", agent, "-hosts", hosts, "-n", total]
    if "Open MPI" not in version:
        raise Unavailable(f"{mpiexec} is the launcher of neither MPICH nor Open MPI")
    ours = ["--prtemca", "plm_ssh_agent"] if "Open MPI) 5" in version else ["-mca", "plm_rsh_agent"]
    variables = [word for name in os.environ if name.isidentifier() for word in ("-x", name)]
    return [mpiexec, *ours, agent, "--bind-to", "none", "--host", hosts, "-n", total, *variables]


def inside(options):
    """Build the cluster and run the command on login; return its exit code."""
    cluster = Cluster(options.hosts, options.rate, options.cores)
    os.environ.update(PATH=f"{PLACE}:{os.environ['PATH']}", TMPDIR=str(PLACE / "tmp"),
                      OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    command = []
    for word in options.command:
        if word == "{mpiexec}":
            command += launcher(find_mpiexec(), cluster.names, options.ranks)
        else:
            command.append(word.replace("{python}", sys.executable))
    process = subprocess.Popen(command)
    while True:     # as the first process of a namespace this one collects the orphans, too
        pid, status = os.wait()
        if pid == process.pid:
            code = os.waitstatus_to_exitcode(status)
            return 128 - code if code < 0 else code


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--hosts", type=int, default=2, help="number of hosts, n1, n2, ... (default 2)")
    parser.add_argument("--ranks", default="1", help="ranks that {mpiexec} starts on each host, one number for all or "
                        "one per host, as 2,1 (default 1)")
    parser.add_argument("--rate", help="rate of each host's link, both ways, as `tc` writes it: 1gbit, 200mbit "
                        "(default: as fast as the machine)")
    parser.add_argument("--cores", type=int, help="cores of each host; hosts take turns when there are too few "
                        "(default: all, shared by all hosts)")
    parser.add_argument("command", nargs="+", help="what to run on login")
    options = parser.parse_args(arguments)
    ranks = [int(count) for count in options.ranks.split(",")]
    options.ranks = ranks * options.hosts if len(ranks) == 1 else ranks
    if len(options.ranks) != options.hosts:
        parser.error(f"--ranks {','.join(map(str, ranks))} does not name one number for each of {options.hosts} hosts")
    return options


def main(arguments):
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    options = parse(arguments)
    try:
        return inside(options) if options.inside else outside(arguments)
    except Unavailable as reason:
        print(f"No hosts here: {reason}", file=sys.stderr)
        return UNAVAILABLE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
