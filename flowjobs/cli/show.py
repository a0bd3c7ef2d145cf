"""flowjobs show."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from flowjobs.cli.defaults import Defaults, InStudy
from flowjobs.cli.json_output import print_json
from flowjobs.cli.parser import Flag
from flowjobs.cli.runs_named import RunName, existing_run
from flowjobs.config import differences_from_defaults
from flowjobs.field_values import flag
from flowjobs.formatting import duration_words, format_count
from flowjobs.report.origin import wandb_page_of
from flowjobs.runs.goodput import TimeSpent, time_spent
from flowjobs.runs.run import Run
from flowjobs.runs.status import RunStatus


@dataclass(frozen=True)
class Show(InStudy):
    """Show one run: its changed options, its attempts, its time, its files."""

    name: RunName
    """Name of the run, or anything that means one run alone."""

    json: Flag = False
    """Print JSON."""

    def run(self, defaults: Defaults) -> int:
        """Print. Returns the exit code."""
        from flowjobs.cli.status import describe, print_attempts
        from flowjobs.cli.table import print_text
        from flowjobs.jobs.dead_jobs import find_dead_jobs

        run = existing_run(self.study, self.name)
        described = describe(run, find_dead_jobs([run], at_most_twice=True).get(run))
        status = run.status()
        spent = time_spent(status, run.submissions())
        config = run.config()
        changed = differences_from_defaults(config)
        files = {name: str(path) for name, path in _files(run).items() if path.exists()}
        if self.json:
            time = {**dataclasses.asdict(spent), "goodput": spent.goodput}
            print_json({**described, "config": changed, "time": time, "files": files}, indent=None)
            return 0
        waits, why = described["waits"], described["unknown"] or described["reason"]
        stands = f": {described['state_in_words']}{f', {why}' if why else ''}"
        print_text(run.name + (f" waits {waits}" if waits else stands))
        for name, value in changed.items():
            print(f"  {flag(name)} {value}")
        if not changed:
            print("  every option is the default")
        if status.parameters:
            print_text(_size_in_words(status))
        print_attempts(described)
        if spent.held_s:
            print_text(_in_words(spent))
        for name, path in files.items():
            print(f"{name:<10} {path}")
        page = wandb_page_of(run)
        if page or config.tracking.wandb_mode != "disabled":
            print(f"{'W&B':<10} {page or config.tracking.place}")
        return 0


def _size_in_words(status: RunStatus) -> str:
    flops = status.flops_per_sample
    a_sample = f", {format_count(flops)} FLOPs a sample (forward)" if flops is not None else ""
    return f"model: {format_count(status.parameters or 0)} parameters{a_sample}"


def _in_words(spent: TimeSpent) -> str:
    parts = {
        "waiting": spent.waiting_s,
        "starting": spent.starting_s,
        "saving": spent.saving_s,
        "steps that were lost and repeated": spent.repeated_s,
        "progress": spent.progress_s,
    }
    words = ", ".join(f"{name} {duration_words(value)}" for name, value in parts.items())
    return f"time: {words}; goodput {spent.goodput:.0%} of the time that it held its GPUs"


def _files(run: Run) -> dict[str, Path]:
    return {
        "folder": run.folder,
        "weights": run.checkpoints,
        "config": run.config_file,
        "metrics": run.metrics_file,
        "samples": run.samples_picture,
        "evaluation": run.evaluation_file,
        "logs": run.logs,
    }
