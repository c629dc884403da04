#!/usr/bin/env python3
"""Start a real SLURM on the hosts of hosts.py, then run a command on login.

    tests/cluster/hosts.py --hosts 3 --cores 1 -- {python} tests/cluster/slurm.py --hosts 3 -- sbatch jobs/train-cpu.sh

Runs inside hosts.py, as root: one munged, slurmctld on login and slurmd on every host, all from the distribution's
packages (Debian: slurm-wlm, munge, libpmix2), with a configuration, keys and logs of their own beside the hosts'
files. Nothing under /etc or /run is read or written. The exit code is the command's, 69 where SLURM cannot be had.
Partitions: main; low, which high takes nodes from (its jobs get 4 s, then go back into the queue).
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

PLACE = Path("/media")      # as in hosts.py
PROGRAMS = ("slurmctld", "slurmd", "munged", "sinfo", "sbatch", "srun")
UNAVAILABLE = 69
START_S = 80                # on a busy machine; a quiet one needs 0.3

CONF = """\
ClusterName=mini
SlurmctldHost=login(10.77.0.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits for cred_expire + 1 s; 5 is the least that is taken
AuthInfo=socket={place}/munge.socket,cred_expire=5
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool.%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.%n.log
# hosts share a file tree: without directories of their own PMIx collides
TmpFS={place}/tmp.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
MpiDefault=pmi2
SwitchType=switch/none
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=1,requeue_setup_env_fail
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout={timeout}
KillWait=4
OverTimeLimit=0
MinJobAge=600
JobCompType=jobcomp/filetxt
JobCompLoc={place}/jobcomp.log
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# the lightest is taken first: a job that may run anywhere runs on the last host
NodeName=DEFAULT CPUs=4 RealMemory=4000 Gres=gpu:fake:2 State=UNKNOWN
NodeName=n[1-{others}] Weight=10
NodeName=n{hosts} Weight=1
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=4
PartitionName=high Nodes=ALL MaxTime=60 State=UP PriorityTier=9 PreemptMode=OFF
"""

# SLURM's plugin opens libpmix.so, which only PMIx's development package has: give the link to this host alone.
PMIX = """
for folder in /usr/lib/*/pmix2/lib; do
    [ -e $folder/libpmix.so.2 ] && [ ! -e $folder/libpmix.so ] || continue
    mkdir -p $0/pmix
    cp -a $folder/. $0/pmix
    ln -sf libpmix.so.2 $0/pmix/libpmix.so
    mount --bind $0/pmix $folder
done
"""


def write_files(hosts, timeout):
    """Write the configuration, a key and GPUs that are none, and name the configuration to all programs."""
    (PLACE / "slurm.conf").write_text(CONF.format(place=PLACE, hosts=hosts, others=hosts - 1, timeout=timeout))
    # slurmd loads a cgroup plugin though nothing uses it; v1's starts everywhere
    (PLACE / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (PLACE / "gres.conf").write_text(f"NodeName=n[1-{hosts}] Name=gpu Type=fake File={PLACE}/dev/nvidia[0-1]\n")
    (PLACE / "dev").mkdir()
    for number in range(2):     # a plain file would leave CUDA_VISIBLE_DEVICES unset, in silence
        os.mknod(PLACE / f"dev/nvidia{number}", 0o020666, os.makedev(1, 3))
    (PLACE / "state").mkdir()
    key = PLACE / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    os.environ["SLURM_CONF"] = str(PLACE / "slurm.conf")


def start(hosts):
    """Start the daemons and wait until all hosts are idle; raise RuntimeError with the logs when they do not come."""
    names = ("key-file=munge.key", "socket=munge.socket", "pid-file=munge.pid", "log-file=munge.log",
             "seed-file=munge.seed")
    options = [f"--{word.split('=')[0]}={PLACE}/{word.split('=')[1]}" for word in names]
    run("munged", "--force", "--num-threads=4", *options)
    run("slurmctld", "-i")
    end = time.monotonic() + START_S
    # A host that asks before the controller answers asks again only much later.
    while "UP" not in said("scontrol", "ping") and time.monotonic() < end:
        time.sleep(0.05)
    for k in range(1, hosts + 1):
        (PLACE / f"spool.n{k}").mkdir()
        run("on", f"n{k}", "sh", "-ec", PMIX, PLACE)
        run("on", f"n{k}", "slurmd")
    again = time.monotonic() + START_S / 6
    while time.monotonic() < end:
        if said("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D") == str(hosts):
            return
        if time.monotonic() > again:    # has the controller ask the hosts
            said("scontrol", "reconfigure")
            again += START_S / 6
        time.sleep(0.05)
    raise RuntimeError(f"SLURM does not start:\n{said('sinfo', '-N')}\n{said('scontrol', 'show', 'node')}\n{logs()}")


def said(*command):
    """Return what a command prints, whatever its exit code."""
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout.strip()


def run(*command):
    """Run a command of the set-up; RuntimeError with what it said when it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(map(str, command))}` fails: {done.stderr}\n{logs()}")


def logs(lines=20):
    """Return the ends of the daemons' logs."""
    return "\n".join(f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
                     for path in sorted(PLACE.glob("*.log")))


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2, help="number of hosts, as given to hosts.py (default 2)")
    parser.add_argument("--lost-after", type=int, default=30, metavar="SECONDS", help="silence after which a host "
                        "counts as lost (default 30)")
    parser.add_argument("command", nargs="+", help="what to run on login")
    options = parser.parse_args(arguments)
    if options.hosts < 2:
        parser.error("--hosts must be at least 2")
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        print(f"No SLURM here: these programs are missing: {', '.join(missing)} (Debian: slurm-wlm, munge)",
              file=sys.stderr)
        return UNAVAILABLE
    write_files(options.hosts, options.lost_after)
    try:
        start(options.hosts)
    except RuntimeError as error:
        print(f"No SLURM here: {error}", file=sys.stderr)
        return UNAVAILABLE
    return subprocess.run(options.command).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
