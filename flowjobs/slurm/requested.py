"""What a job was submitted with, from its record, as options of sbatch for one more like it."""

import os
import re
from collections.abc import Mapping

from flowjobs.slurm.client import run_command

# What sbatch was told on its command line is not in the script, so it is taken from the job's
# record: scontrol's name of a field, and the option it came from.
OPTIONS = {
    "JobName": "--job-name",
    "Partition": "--partition",
    "Account": "--account",
    "QOS": "--qos",
    "TimeLimit": "--time",
    "NumNodes": "--nodes",
    "CPUs/Task": "--cpus-per-task",
    "MinMemoryNode": "--mem",
    "MinMemoryCPU": "--mem-per-cpu",
    "Features": "--constraint",
    "ReqNodeList": "--nodelist",
    "ExcNodeList": "--exclude",
    "Reservation": "--reservation",
    "Comment": "--comment",
    "WorkDir": "--chdir",
    "StdOut": "--output",
    "ArrayTaskId": "--array",
    "TimeMin": "--time-min",
    "Licenses": "--licenses",
    "MinTmpDiskNode": "--tmp",
    "Switches": "--switches",
    "Nice": "--nice",
    "WCKey": "--wckey",
    "MailUser": "--mail-user",
    "MailType": "--mail-type",
}
NOTHING = ("", "(null)", "N/A")
# What says nothing, or cannot be asked for.
UNASKED = {
    "MinTmpDiskNode": re.compile("0"),
    "Nice": re.compile(r"0|-\d+"),  # an administrator's
    "WCKey": re.compile(r"\*.*"),  # the default
}
# GPUs that are not asked of each node, and what is asked for each.
GPU_OPTIONS = {
    "TresPerJob": "--gpus",
    "TresPerTask": "--gpus-per-task",
    "CpusPerTres": "--cpus-per-gpu",
    "MemPerTres": "--mem-per-gpu",
}
GPUS = re.compile(r"gres[:/]gpu[:=]([^,\s]+)")
# Where these are asked, the record shows the partition's default of that beside them, which sbatch
# refuses together.
INSTEAD_OF = {"MemPerTres": ("MinMemoryCPU", "MinMemoryNode"), "CpusPerTres": ("CPUs/Task",)}
WORDS = {
    "Requeue": {"0": "--no-requeue", "1": "--requeue"},
    "OverSubscribe": {"NO": "--exclusive", "USER": "--exclusive=user", "YES": "--oversubscribe"},
}

# What sbatch says of a job that no node would ever start, and where --exclude has a node that
# --nodelist asks for.
NO_NODE = re.compile(r"Requested node configuration is not available|Invalid node name specified")


def options_of(fields: Mapping[str, str]) -> list[str]:
    """The options of sbatch that a job's record shows, but for its generic resources.

    Args:
        fields: All fields of the record, by scontrol's names.
    """
    gpus = {name: found[1] for name in GPU_OPTIONS if (found := GPUS.search(fields.get(name, "")))}
    defaults = {other for name in gpus for other in INSTEAD_OF.get(name, ())}
    options = [
        f"{option}={value}"
        for name, option in OPTIONS.items()
        if (value := fields.get(name, "")) not in NOTHING
        and name not in defaults
        and not (name in UNASKED and UNASKED[name].fullmatch(value))
    ]
    options += [f"{GPU_OPTIONS[name]}={value}" for name, value in gpus.items()]
    errors = fields.get("StdErr", "")
    if errors not in (*NOTHING, fields.get("StdOut")):  # else they go where the output goes
        options.append(f"--error={errors}")
    options += [words[fields[name]] for name, words in WORDS.items() if fields.get(name) in words]
    tasks = fields.get("NtasksPerN:B:S:C", "").partition(":")[0]
    if tasks not in (*NOTHING, "0"):
        options.append(f"--ntasks-per-node={tasks}")
    return options


def gres_of(fields: Mapping[str, str]) -> str:
    """What a job asked of each node beside processors and memory ("gpu:1"); empty for nothing."""
    resources = fields.get("TresPerNode", "")
    return "" if resources in NOTHING else re.sub("gres[:/]", "", resources)


def starts_without(nodes: str, fields: Mapping[str, str]) -> bool:
    """Whether nodes are left that would start a job without some; True if Slurm does not say.

    Slurm itself leaves out whatever it is told to, and the job then waits for ever.

    Args:
        nodes: Those to leave out, as sbatch takes them.
        fields: All fields of the job's record, by scontrol's names.
    """
    # Not what makes it this job, should a site's sbatch submit it all the same.
    own = ("--comment=", "--job-name=", "--output=", "--error=", "--array=", "--chdir=")
    options = [option for option in options_of(fields) if not option.startswith(own)]
    options.append(f"--exclude={nodes}")
    if gres := gres_of(fields):
        options.append(f"--gres={gres}")
    # They describe where the question is asked, not the job.
    foreign = {name for name in os.environ if name.startswith(("SBATCH_", "SLURM_"))}
    foreign -= {"SLURM_CONF", "SLURM_JWT"}
    here = {name: value for name, value in os.environ.items() if name not in foreign}
    answer = run_command("sbatch", "--test-only", *options, "--wrap=true", environment=here)
    return not NO_NODE.search(answer.stderr)
