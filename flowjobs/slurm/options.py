"""sbatch's own environment variables: the field that each one means, and what sbatch still sees.

sbatch lets its variables win over the batch file, which holds the fields' values. So a variable
that means a field becomes that field's default, and is then hidden from sbatch.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from flowjobs.config import DECIDED_OPTIONS, SlurmConfig
from flowjobs.slots import JOB_OF_RUN, SLOTS

Fields = dict[str, Any]

# Set by the batch script of an array: its folder, in which each task finds its run.
ARRAY = "FLOWJOBS_ARRAY"
# In the environment of a job that flowjobs itself submitted: the id of the job it continues.
CONTINUES = "FLOWJOBS_CONTINUES"
# Set by sbatch/*.sh: their own arguments, as a JSON list.
SCRIPT_ARGUMENTS = "FLOWJOBS_SCRIPT_ARGUMENTS"
# Set by them too: the files that their output and their errors go to, as a JSON list.
SCRIPT_OUTPUT = "FLOWJOBS_SCRIPT_OUTPUT"

# Where a site, or its user, lets jobs start without the environment of their submission
# (SBATCH_EXPORT=NONE), a job of ours still needs these.
NEEDED = re.compile(
    r"(FLOWJOBS|WANDB|OMP|MKL)_\w+|PATH|HOME|USER|LOGNAME|SHELL|LANG|LC_ALL|NETRC|SLURM_CONF|"
    r"PYTHON\w+|LD_LIBRARY_PATH|VIRTUAL_ENV|CONDA_PREFIX|XDG_CONFIG_HOME|"
    r"(?i:https?_proxy|no_proxy)|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE"
)

# The fields that other options of sbatch mean; one that has a value would be lost beside them.
FIELDS_OF_OPTIONS = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "exclude": "exclude",
    "mem": "mem_gb",
    "mem-per-cpu": "mem_gb",
    "mem-per-gpu": "mem_gb",
    "time": "timeout_min",
    "comment": "comment",
}

# The variables of options whose names differ.
OPTION_VARIABLES = {
    "array": ("SBATCH_ARRAY_INX",),
    "requeue": ("SBATCH_REQUEUE", "SBATCH_NO_REQUEUE"),
    "no-requeue": ("SBATCH_REQUEUE", "SBATCH_NO_REQUEUE"),
    "mem": ("SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU"),
    "switches": ("SBATCH_REQ_SWITCH", "SBATCH_WAIT4SWITCH"),
    "time": ("SBATCH_TIMELIMIT",),
    "verbose": ("SBATCH_DEBUG",),
}


def minutes(time_limit: str) -> int:
    """A time limit in one of sbatch's forms ("90", "1:30:00", "2-12") in minutes, rounded up.

    Raises:
        ValueError: It is of none of those forms, or no limit at all ("UNLIMITED", "0").
    """
    total = -(-_seconds(time_limit) // 60)
    if total == 0:
        raise ValueError(time_limit)
    return total


def _seconds(time_limit: str) -> int:
    """The same in seconds.

    Raises:
        ValueError: It is of none of those forms.
    """
    if not re.fullmatch(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})", time_limit):
        raise ValueError(time_limit)
    days, dash, rest = time_limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, mins, secs = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, mins, secs = parts
    else:
        hours, (mins, secs) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + mins) * 60 + secs


def gigabytes(memory: str) -> float:
    """A size in one of sbatch's forms ("4000", "4000M", "2G"; MB by default) in GB.

    Raises:
        ValueError: It is of none of those forms, or means all of the node's memory ("0").
    """
    found = re.fullmatch(r"(\d+)([KMGT]?)", memory.upper())
    if not found or not int(found[1]):
        raise ValueError(memory)
    in_gb = {"K": 1 / 1024**2, "": 1 / 1024, "M": 1 / 1024, "G": 1.0, "T": 1024.0}
    return int(found[1]) * in_gb[found[2]]


def seconds_before_end(signal: str) -> int:
    """The time of a `--signal` ("USR2@60", "B:USR1@120"; 60 by default) in seconds.

    Which signal it is and whether the batch shell or the processes get it is not taken over:
    flowjobs has its processes told by USR2, whatever other jobs of the user listen to.

    Raises:
        ValueError: It is not of that form.
    """
    found = re.fullmatch(r"(?:[RB]+:)?[A-Z0-9]+(?:@(\d+))?", signal.upper())
    if not found:
        raise ValueError(signal)
    return int(found[1] or 60)


def srun_options(cpus_per_task: int | str | None) -> list[str]:
    """How a job's step is started, with the cores that sbatch was asked for.

    srun no longer takes these over since Slurm 22.05.
    """
    cores = [f"--cpus-per-task={cpus_per_task}"] if cpus_per_task else []
    # A rank may wait for ever for one that is dead. When the others have left, the first one draws
    # and measures samples for longer than the site's WaitTime may be.
    return ["--kill-on-bad-exit", "--wait=0", *cores]


def _cpus_per_task(cpus: str) -> Fields:
    if not re.fullmatch(r"[1-9]\d*", cpus):
        raise ValueError(cpus)
    return {"cpus_per_task": int(cpus)}


def _gpus_per_node(gpus: str) -> Fields:
    """`2` or `a100:2`."""
    found = re.fullmatch(r"(?:([A-Za-z][\w.-]*):)?(\d+)", gpus)
    if not found:
        raise ValueError(gpus)
    count: Fields = {"gpus_per_node": int(found[2])}
    return count | ({"gpu_type": found[1]} if found[1] else {})


def _gpus_of_gres(gres: str) -> Fields:
    """`gpu`, `gpu:2`, `gpu:a100:2` among other resources."""
    asked = [entry for entry in gres.split(",") if _is_gpu(entry)]
    if not asked:
        return {}
    if len(asked) > 1:
        raise ValueError(gres)
    rest = asked[0].partition(":")[2]
    if rest and not rest.rpartition(":")[2].isdigit():
        rest += ":1"
    return _gpus_per_node(rest or "1")


def _is_gpu(gres_entry: str) -> bool:
    return gres_entry.strip().partition(":")[0] == "gpu"


def _as_is(field: str) -> Callable[[str], Fields]:
    return lambda value: {field: value}


# In the order of how exactly they say it: a later one wins over an earlier one.
_MEANINGS: dict[str, tuple[str, Callable[[str], Fields]]] = {
    "SBATCH_PARTITION": ("partition", _as_is("partition")),
    "SBATCH_ACCOUNT": ("account", _as_is("account")),
    "SBATCH_QOS": ("qos", _as_is("qos")),
    "SBATCH_CONSTRAINT": ("constraint", _as_is("constraint")),
    "SBATCH_TIMELIMIT": ("timeout_min", lambda value: {"timeout_min": minutes(value)}),
    "SBATCH_MEM_PER_NODE": ("mem_gb", lambda value: {"mem_gb": gigabytes(value)}),
    "SBATCH_SIGNAL": (
        "signal_delay_s",
        lambda value: {"signal_delay_s": seconds_before_end(value)},
    ),
    # There is one process per GPU.
    "SBATCH_CPUS_PER_GPU": ("cpus_per_task", _cpus_per_task),
    "SBATCH_GRES": ("gpus_per_node", _gpus_of_gres),
    # Counts all nodes together, the same thing for one node; `submit` refuses it for more.
    "SBATCH_GPUS": ("gpus_per_node", _gpus_per_node),
    "SBATCH_GPUS_PER_NODE": ("gpus_per_node", _gpus_per_node),
}
# Other ways to say what a field says. sbatch reads them where the field has no value.
_ALTERNATIVES = {"SBATCH_MEM_PER_CPU": "mem_gb", "SBATCH_MEM_PER_GPU": "mem_gb"}


def fields_from(environment: Mapping[str, str]) -> dict[str, tuple[str, Any]]:
    """What the variables say of the fields of SlurmConfig.

    Returns:
        By field, the variable and the value. The value is None where flowjobs cannot read the
        variable (`SBATCH_TIMELIMIT=UNLIMITED`).
    """
    found: dict[str, tuple[str, Any]] = {}
    for variable, field in _ALTERNATIVES.items():
        if environment.get(variable):
            found[field] = variable, None
    for variable, (field, read) in _MEANINGS.items():
        if value := environment.get(variable):
            try:
                found |= {name: (variable, read_) for name, read_ in read(value).items()}
            except ValueError:
                found[field] = variable, None
    return found


def variables_of(option: str) -> tuple[str, ...]:
    """The variables that say the same as an sbatch option (`reservation`)."""
    return OPTION_VARIABLES.get(option, ("SBATCH_" + option.upper().replace("-", "_"),))


# Why sbatch does not see them.
DECIDED = {
    variable: why for option, why in DECIDED_OPTIONS.items() for variable in variables_of(option)
}


def export_for(environment: Mapping[str, str], asked: SlurmConfig) -> str | None:
    """The value of sbatch's `--export` for a job of ours; None: all of the environment.

    Args:
        environment: The environment that the job is submitted from.
        asked: What is asked of the cluster.
    """
    found = str(asked.sbatch.get("export", environment.get("SBATCH_EXPORT", "ALL")))
    names = [name for name in found.split(",") if name and name not in ("NONE", "NIL")]
    if "ALL" in names:
        return None if names == ["ALL"] else found
    needed = [name for name in sorted(environment) if NEEDED.fullmatch(name)]
    return ",".join([*names, *(name for name in needed if name not in names)])


def environment_for_sbatch(environment: Mapping[str, str], asked: SlurmConfig) -> dict[str, str]:
    """The environment for sbatch, without what would overrule the batch file.

    sbatch takes SLURM_* variables of a job it is called from (an interactive one, say) for the
    new job's; those that say which cluster to talk to stay. SBATCH_* variables stay that the
    file does not decide.

    Args:
        environment: The environment of this process.
        asked: What the batch file is made from.
    """
    kept = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT", "SLURM_JWT"}
    foreign = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")
    fields = {variable: field for variable, (field, _) in _MEANINGS.items()} | _ALTERNATIVES
    hidden = {variable for variable, field in fields.items() if getattr(asked, field) is not None}
    hidden |= {*DECIDED, *variables_of("export"), JOB_OF_RUN, ARRAY, SLOTS}
    hidden |= {SCRIPT_ARGUMENTS, SCRIPT_OUTPUT}
    for option in asked.sbatch:
        hidden.update(variables_of(option))
    cleaned = {
        name: value
        for name, value in environment.items()
        if name in kept or not (name.startswith(foreign) or name in hidden)
    }
    if "gres" not in asked.sbatch:
        others = environment.get("SBATCH_GRES", "").split(",")
        if rest := ",".join(entry for entry in others if entry and not _is_gpu(entry)):
            cleaned["SBATCH_GRES"] = rest
    return cleaned
