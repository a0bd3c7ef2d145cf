"""The commands: where each is, and what it does."""

import importlib
from typing import Any

# The class of each, by its module, and what it does: a command is not kept waiting for the imports
# of the others.
COMMANDS = {
    "submit": ("submit.Submit", "Submit a run as a job; the same command again resumes it."),
    "sweep": ("sweep.Sweep", "Submit many runs: every option takes several values."),
    "resume": ("resume.Resume", "Submit a run again by its name alone, as it was configured."),
    "train": ("train.Train", "Train a run in this process, or as the last line of a batch script."),
    "status": ("status.Status", "Show the state of sweeps, groups and runs."),
    "show": ("show.Show", "Show one run: its config, attempts, time and files."),
    "report": ("report.Report", "Compare runs: mean and deviation over seeds, and which is best."),
    "logs": ("logs.Logs", "Print the output of a run's newest job."),
    "cancel": ("cancel.Cancel", "Cancel runs for good, until they are submitted again."),
    "retry": ("retry.Retry", "Start failed and cancelled runs again, by their cause."),
    "wait": ("wait.Wait", "Wait until runs have ended."),
    "rm": ("rm.Rm", "Remove runs with their weights, records and logs; asks first."),
    "reconcile": (
        "reconcile.Reconcile",
        "Record how dead jobs ended; restart what may be retried.",
    ),
    "sync": ("sync.Sync", "Upload offline runs to W&B. Safe to repeat."),
    "sample": ("sample.Sample", "Draw samples of a run's best checkpoint (EMA weights)."),
    "evaluate": ("evaluate.Evaluate", "Measure samples of runs against their data."),
    "data": ("data.Data", "Make the splits of a dataset from one file of embeddings."),
    "checkpoint": ("checkpoint.Checkpoint", "Verify a checkpoint and print what it holds."),
    "bench": ("bench.Bench", "Measure how many runs this device trains best at once."),
    "drill": ("drill.Drill", "Show on your own cluster that an interrupted run loses nothing."),
    "completion": ("completion.Completion", "Print a completion script for bash or zsh."),
}


def command_of(name: str) -> Any:
    """The dataclass of a command."""
    module, _, cls = COMMANDS[name][0].partition(".")
    return getattr(importlib.import_module(f"flowjobs.cli.{module}"), cls)
