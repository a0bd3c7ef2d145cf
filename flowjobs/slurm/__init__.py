"""Query and control Slurm through its commands. Knows no run.

Each function says which forms of Slurm's commands can be relied on, and why not the others. What is
asked is imported when it is first used: the command line's start needs the names of options alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowjobs.slurm.client import MARK, controller_answers, is_here
    from flowjobs.slurm.cluster import (
        cluster_name,
        kill_wait_s,
        partition_settings,
        partitions,
        qos_settings,
        settings,
    )
    from flowjobs.slurm.controller import (
        ENDED,
        JobRecord,
        JobRow,
        cancel,
        job_record,
        queue,
        requeue,
        set_parallel,
        signal_step,
        start_soon,
        write_batch_script,
    )
    from flowjobs.slurm.jobs import Gone, JobAnswer, JobIdentity, Known, Unknown, ask, ask_one
    from flowjobs.slurm.sacct import accounting, accounting_answers
    from flowjobs.slurm.submission import (
        HandedOver,
        cancelled_unless_noted,
        new_mark,
        sbatch,
    )
    from flowjobs.slurm.waiting import why_it_waits

_NAMES = {
    "client": "MARK controller_answers is_here",
    "cluster": "cluster_name kill_wait_s partition_settings partitions qos_settings settings",
    "controller": "ENDED JobRecord JobRow cancel job_record queue requeue set_parallel signal_step "
    "start_soon write_batch_script",
    "jobs": "Gone JobAnswer JobIdentity Known Unknown ask ask_one",
    "sacct": "accounting accounting_answers",
    "submission": "HandedOver cancelled_unless_noted new_mark sbatch",
    "waiting": "why_it_waits",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "ENDED",
    "MARK",
    "Gone",
    "HandedOver",
    "JobAnswer",
    "JobIdentity",
    "JobRecord",
    "JobRow",
    "Known",
    "Unknown",
    "accounting",
    "accounting_answers",
    "ask",
    "ask_one",
    "cancel",
    "cancelled_unless_noted",
    "cluster_name",
    "controller_answers",
    "is_here",
    "job_record",
    "kill_wait_s",
    "new_mark",
    "partition_settings",
    "partitions",
    "qos_settings",
    "queue",
    "requeue",
    "sbatch",
    "set_parallel",
    "settings",
    "signal_step",
    "start_soon",
    "why_it_waits",
    "write_batch_script",
]


if not TYPE_CHECKING:  # to a type checker each name is its own, and any other an error

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"flowjobs.slurm.{_MODULE_OF[name]}"), name)
