"""Look at a launch from every rank, say what is wrong with it and the cure."""

import ast
import json
import os
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
from mpi4py import MPI

from hpcmlp import node_memory
from hpcmlp.comm import messages
from hpcmlp.comm.agreement import agreed
from hpcmlp.comm.topology import Topology, mpi_library
from hpcmlp.config import DoctorConfig
from hpcmlp.errors import ConfigError, InputMissing
from hpcmlp.run.checkup import Finding, check_all
from hpcmlp.run.facts import local_facts
from hpcmlp.run.speeds import clock_offset, gemm_gflops, link_rate

LEVELS = {MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled", MPI.THREAD_SERIALIZED: "serialized",
          MPI.THREAD_MULTIPLE: "multiple"}


def main(config: DoctorConfig, comm: Any) -> int:
    """Check this launch. Collective over `comm`; returns 0 when all is well, 78 when something is not."""
    topology = Topology(comm)
    with agreed(comm):
        if not os.path.isdir(config.dir):
            raise InputMissing(f"{config.dir}: no such directory; give --dir one that exists.")
    leader = np.array([comm.rank], np.int64)
    topology.node.Bcast(leader)
    own = {**local_facts(config.dir), "launch_error": "", "leader": int(leader[0]), "library": mpi_library(),
           "thread_level": LEVELS[MPI.Query_thread()], "shm_advice": node_memory.advice(),
           "clock_s": clock_offset(comm), "gflops": gemm_gflops(), "link_rate": link_rate(comm)}
    facts = [ast.literal_eval(text.decode()) for text in messages.all_gather_bytes(comm, repr(own).encode())]
    topology.free()
    findings = check_all(facts)
    if comm.rank == 0:
        show(findings, len(facts), config.json)
    return exit_code(findings)


def unstarted(config: DoctorConfig, error: Exception) -> int:
    """Check what one process can see of a launch whose ranks did not become one world; returns 78. Local."""
    own = {**local_facts(config.dir), "launch_error": str(error).rstrip("."), "leader": 0, "library": mpi_library(),
           "thread_level": "serialized", "shm_advice": node_memory.advice(), "clock_s": 0.0, "gflops": gemm_gflops(),
           "link_rate": 0.0}
    findings = check_all([own])
    show(findings, 1, config.json)
    return exit_code(findings)


def show(findings: list[Finding], ranks: int, as_json: bool) -> None:
    """Print the findings, faults with their cures. Local."""
    faults = sum(not finding.ok for finding in findings)
    if as_json:
        print(json.dumps({"ranks": ranks, "faults": faults, "checks": [asdict(finding) for finding in findings]}))
        return
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{'ok   ' if finding.ok else 'FAULT'}  {finding.name:<{width}}  {finding.found}")
        if not finding.ok:
            print(f"{'':7}{'cure':<{width}}  {finding.cure}")
    print("all well" if not faults else f"{faults} fault{'s' * (faults > 1)}")
    sys.stdout.flush()


def exit_code(findings: list[Finding]) -> int:
    """Return 0 when all is well, else the code of a launch that cannot work well. Local."""
    return 0 if all(finding.ok for finding in findings) else ConfigError.code
