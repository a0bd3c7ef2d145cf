"""`python -m tests.cluster up | status | shell | down | install`: the cluster by hand."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.cluster.requirements import install, missing_requirement
from tests.cluster.slurm import ROOT_VARIABLE, SlurmCluster, default_root
from tests.cluster.waiting import ClusterError

_UP_TEXT = """\
Slurm is up: nodes n1 to n4, each with 16 CPUs, 64 GB and 4 GPUs (none of them real).

    export SLURM_CONF={slurm_conf}

Partitions, all of the same nodes:
    gpu               the default; never preempted, preempts jobs of the others for their place
    preempt           preempted: told at once, killed 20 s later at the earliest, requeued
    preempt-nograce   preempted: told and killed together, requeued
    preempt-cancel    preempted: told at once, killed later, not requeued

To preempt what runs on n1:    sbatch -p gpu -w n1 --gres=gpu:4 --wrap 'sleep 60'
To start a requeued job now:   scontrol update jobid=JOB starttime=now+1
Logs:                          {log}
To stop it:                    python -m tests.cluster down{root_option}
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cluster", description="A real Slurm cluster on this machine."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install", help="install Slurm, munge and MariaDB with apt-get")
    for name, text in (
        ("up", "boot the cluster, or start what is missing of it"),
        ("status", "print as JSON what runs; exit code 3 if the cluster is not up"),
        ("shell", "a shell in which Slurm's commands talk to the cluster"),
        ("down", "end all jobs and daemons"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "--root",
            type=Path,
            default=default_root(),
            metavar="DIR",
            help=f"the cluster's folder (default: ${ROOT_VARIABLE} or %(default)s)",
        )
    arguments = parser.parse_args()
    try:
        return install() if arguments.command == "install" else _run(arguments)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace) -> int:
    cluster = SlurmCluster(arguments.root)
    match arguments.command:
        case "up":
            if missing := missing_requirement():
                print(f"error: {missing}", file=sys.stderr)
                return 2
            return _up(cluster)
        case "status":
            return _status(cluster)
        case "shell":
            if not cluster.is_up():
                raise ClusterError("the cluster is not up: run `python -m tests.cluster up` first")
            shell = os.environ.get("SHELL", "/bin/sh")
            return subprocess.run([shell], env=os.environ | cluster.env, check=False).returncode
        case _:
            cluster.down()
            return 0


def _up(cluster: SlurmCluster) -> int:
    if not cluster.up():
        print("It was up already.")
    text = _UP_TEXT.format(
        slurm_conf=cluster.env["SLURM_CONF"],
        log=cluster.root / "log",
        root_option="" if cluster.root == default_root() else f" --root {cluster.root}",
    )
    print(text, end="")
    return 0


def _status(cluster: SlurmCluster) -> int:
    up = cluster.is_up()
    status = {"up": up, "root": str(cluster.root), "daemons": cluster.daemons()}
    if up:
        nodes = cluster.run("sinfo", "--Node", "--noheader", "-p", "gpu", "-o", "%N %T")
        status["nodes"] = dict(line.split() for line in nodes.splitlines())
    print(json.dumps(status, indent=2))
    return 0 if up else 3


if __name__ == "__main__":
    sys.exit(main())
