"""The options of sbatch that say what a field of SlurmConfig says: read as that field's value."""

import re
from collections.abc import Callable, Mapping
from typing import Any

Fields = dict[str, Any]


def minutes(time_limit: str) -> int:
    """A time limit in one of sbatch's forms ("90", "1:30:00", "2-12") in minutes, rounded up.

    Raises:
        ValueError: It is of none of those forms, or no limit at all ("UNLIMITED", "0").
    """
    total = -(-seconds(time_limit) // 60)
    if total == 0:
        raise ValueError(time_limit)
    return total


def seconds(time_limit: str) -> int:
    """The same in seconds; so Slurm writes a time that has passed, too ("1-02:03:04").

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


def _gpus_per_node(gpus: str) -> Fields:
    """`2`, `a100:2` or `1g.10gb:2`."""
    found = re.fullmatch(r"(?:([\w.-]*[A-Za-z][\w.-]*):)?(\d+)", gpus)
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


def without_gpus(gres: str) -> str:
    """The other resources of a GRES: `lustre:1` of `gpu:2,lustre:1`."""
    return ",".join(entry for entry in gres.split(",") if entry and not _is_gpu(entry))


def _is_gpu(gres_entry: str) -> bool:
    return gres_entry.strip().partition(":")[0] == "gpu"


def _as_is(field: str) -> Callable[[str], Fields]:
    return lambda value: {field: value}


def _count(field: str) -> Callable[[str], Fields]:
    def read(value: str) -> Fields:
        if not re.fullmatch(r"[1-9]\d*", value):
            raise ValueError(value)
        return {field: int(value)}

    return read


# In the order of how exactly they say it: a later one wins over an earlier one.
MEANINGS: dict[str, tuple[str, Callable[[str], Fields]]] = {
    "partition": ("partition", _as_is("partition")),
    "account": ("account", _as_is("account")),
    "qos": ("qos", _as_is("qos")),
    "constraint": ("constraint", _as_is("constraint")),
    "exclude": ("exclude", _as_is("exclude")),
    "comment": ("comment", _as_is("comment")),
    "nodes": ("nodes", _count("nodes")),
    "time": ("timeout_min", lambda value: {"timeout_min": minutes(value)}),
    "mem": ("mem_gb", lambda value: {"mem_gb": gigabytes(value)}),
    "signal": ("signal_delay_s", lambda value: {"signal_delay_s": seconds_before_end(value)}),
    # There is one process per GPU.
    "cpus-per-gpu": ("cpus_per_task", _count("cpus_per_task")),
    "cpus-per-task": ("cpus_per_task", _count("cpus_per_task")),
    "gres": ("gpus_per_node", _gpus_of_gres),
    # Of all nodes together, which is the same where there is one; it is refused for more.
    "gpus": ("gpus_per_node", _gpus_per_node),
    "gpus-per-node": ("gpus_per_node", _gpus_per_node),
}
FIELDS_OF_OPTIONS = {field for field, _ in MEANINGS.values()} | {"gpu_type"}


def fields_of_options(
    options: Mapping[str, Any],
) -> tuple[dict[str, tuple[str, Any]], dict[str, Any]]:
    """What options of sbatch say of the fields of SlurmConfig, and the options beside.

    Returns:
        By field, the option and the value, None where that cannot be read (`mem=0`); and the
        options that say nothing of a field, or cannot be read, GRES without the GPUs.
    """
    said: dict[str, tuple[str, Any]] = {}
    rest = dict(options)
    for option, (field, read) in MEANINGS.items():
        value = options.get(option)
        if type(value) not in (str, int):
            continue
        try:
            found = read(str(value))
        except ValueError:
            said[field] = option, None
            continue
        said |= {name: (option, read_) for name, read_ in found.items()}
        if found:
            del rest[option]
        if option == "gres" and (others := without_gpus(str(value))):
            rest["gres"] = others
    return said, rest
