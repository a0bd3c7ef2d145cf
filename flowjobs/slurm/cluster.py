"""The settings of the cluster, its partitions and its qualities of service."""

import re

from flowjobs.slurm.client import run_command

FIELD = re.compile(r"(?:^|\s)([A-Za-z][\w:/]*)=(.*?)(?=\s+[A-Za-z][\w:/]*=|\s*$)")


def partitions() -> list[str]:
    """The names of the cluster's partitions; none if it does not answer."""
    # The words before the name tell it from a line of a banner.
    answer = run_command("sinfo", "--noheader", "--format=partition %R")
    lines = [line.split() for line in answer.stdout.splitlines()]
    return sorted({words[1] for words in lines if words[:1] == ["partition"] and words[1:]})


def kill_wait_s() -> float:
    """Seconds that Slurm waits between telling a job to end and killing it; its default if it
    does not say."""
    # scontrol says "30 sec".
    found = cluster_settings().get("KillWait", "").partition(" ")[0]
    return float(found) if found.isdigit() else 30.0


def cluster_name() -> str:
    """Slurm's name of the cluster that answers here; empty if none does."""
    return cluster_settings().get("ClusterName", "")


def cluster_settings() -> dict[str, str]:
    """The cluster's settings by slurm.conf's names; none if it does not answer."""
    answer = run_command("scontrol", "show", "config")
    lines = (line.partition("=") for line in answer.stdout.splitlines())
    return {name.strip(): value.strip() for name, equals, value in lines if equals}


def partition_settings(name: str) -> dict[str, str]:
    """A partition's settings by slurm.conf's names; none if it does not answer."""
    answer = run_command("scontrol", "show", "partition", name, "--oneliner")
    _, found, settings = answer.stdout.partition("PartitionName=")
    return dict(FIELD.findall((found + settings).partition("\n")[0]))


def qos_settings(name: str) -> dict[str, str]:
    """PreemptMode and GraceTime of a quality of service; none where accounting does not answer."""
    names = ("PreemptMode", "GraceTime")
    answer = run_command("sacctmgr", "-nP", "show", "qos", name, f"format={','.join(names)}")
    lines = [line.split("|") for line in answer.stdout.splitlines()]
    return next((dict(zip(names, line, strict=True)) for line in lines if len(line) == 2), {})
