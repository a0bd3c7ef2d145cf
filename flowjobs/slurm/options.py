"""sbatch's own environment variables: the field that each one means, and what sbatch still sees.

sbatch lets its variables win over the batch file, which holds the fields' values. So a variable
that means a field becomes that field's default, and is then hidden from sbatch.
"""

import re
from collections.abc import Mapping
from typing import Any

from flowjobs.config import DECIDED_OPTIONS, SlurmConfig
from flowjobs.sbatch_options import MEANINGS, without_gpus
from flowjobs.slots import JOB_OF_RUN, SLOTS

# Set by the batch script of an array: its folder, in which each task finds its run.
ARRAY = "FLOWJOBS_ARRAY"
# In the environment of a job that flowjobs itself submitted: the id of the job it continues.
CONTINUES = "FLOWJOBS_CONTINUES"
# Set by sbatch/*.sh: their own arguments, as a JSON list.
SCRIPT_ARGUMENTS = "FLOWJOBS_SCRIPT_ARGUMENTS"

# Where a site, or its user, lets jobs start without the environment of their submission
# (SBATCH_EXPORT=NONE), a job of ours still needs these.
NEEDED = re.compile(
    r"(FLOWJOBS|WANDB|OMP|MKL)_\w+|PATH|HOME|USER|LOGNAME|SHELL|LANG|LC_ALL|NETRC|SLURM_CONF|"
    r"PYTHON\w+|LD_LIBRARY_PATH|VIRTUAL_ENV|CONDA_PREFIX|XDG_CONFIG_HOME|"
    r"(?i:https?_proxy|no_proxy)|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE"
)

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


def variables_of(option: str) -> tuple[str, ...]:
    """The variables that say the same as an sbatch option (`reservation`)."""
    return OPTION_VARIABLES.get(option, ("SBATCH_" + option.upper().replace("-", "_"),))


# By variable. The options of other fields have none that sbatch reads.
_MEANINGS = {
    variables_of(option)[0]: meaning
    for option, meaning in MEANINGS.items()
    if option not in ("exclude", "comment", "nodes", "cpus-per-task")
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
    new job's; those that say which cluster to talk to stay. Of the SBATCH_* variables those stay
    that the file does not decide.

    Args:
        environment: The environment of this process.
        asked: What the batch file is made from.
    """
    kept = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT", "SLURM_JWT"}
    foreign = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")
    fields = {variable: field for variable, (field, _) in _MEANINGS.items()} | _ALTERNATIVES
    hidden = {variable for variable, field in fields.items() if getattr(asked, field) is not None}
    hidden |= {*DECIDED, *variables_of("export"), JOB_OF_RUN, ARRAY, SLOTS, SCRIPT_ARGUMENTS}
    for option in asked.sbatch:
        hidden.update(variables_of(option))
    cleaned = {
        name: value
        for name, value in environment.items()
        if name in kept or not (name.startswith(foreign) or name in hidden)
    }
    if "gres" not in asked.sbatch and (rest := without_gpus(environment.get("SBATCH_GRES", ""))):
        cleaned["SBATCH_GRES"] = rest
    return cleaned
