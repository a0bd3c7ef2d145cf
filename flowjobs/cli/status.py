"""flowjobs status."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from flowjobs.cli.defaults import Defaults
from flowjobs.cli.prepare import existing_run
from flowjobs.runs.metrics import latest_values
from flowjobs.runs.run import Run, default_study, run_names
from flowjobs.runs.status import RunStatus

if TYPE_CHECKING:
    from flowjobs.jobs.findings import Dead, Unclear


@dataclass(frozen=True)
class Status:
    """Show the runs of a study, or one run with its attempts."""

    name: tyro.conf.Positional[str | None] = None
    """Name of the run; default: all."""

    study: Path = dataclasses.field(default_factory=default_study)
    """Root of the study."""

    json: bool = False
    """Print JSON."""

    def run(self, defaults: Defaults) -> int:
        """Print. Returns the exit code."""
        # Slow to load, and --help does without.
        from flowjobs.jobs.findings import find

        study = self.study.expanduser().absolute()
        names = run_names(study) if self.name is None else [self.name]
        runs = [existing_run(study, name) for name in names]
        if not runs:
            print(f"there are no runs in {study}", file=sys.stderr)
        findings = find(runs, at_most_twice=True)
        described = [_describe(run, findings.get(run)) for run in runs]
        found: Any = described if self.name is None else described[0]
        if self.json:
            print(json.dumps(found, indent=2))
        else:
            _print_table(described)
            for run in described:
                if run["unknown"]:
                    print(f"{run['run']}: {run['unknown']}", file=sys.stderr)
            if not isinstance(found, list):
                _print_attempts(found)
        return 0


def _describe(run: Run, finding: "Dead | Unclear | None") -> dict[str, Any]:
    from flowjobs.jobs.findings import Dead, Unclear, final_outcome

    status = run.status() or RunStatus()
    if isinstance(finding, Dead):
        # Shown, not noted: that is what `reconcile` is for, and the run's own jobs.
        status.close(final_outcome(run, status, finding))
    latest = latest_values(run.metrics_file)
    described = {"run": run.name, **dataclasses.asdict(status)}
    described["step"] = max(status.step, latest.get("step", 0))
    described["latest"] = latest
    described["jobs"] = run.submissions()
    described["unknown"] = finding.why if isinstance(finding, Unclear) else ""
    described["folder"] = str(run.folder)
    described["checkpoints"] = str(run.checkpoints)
    return described


def _print_table(runs: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "state", "epoch", "step", "val/loss", "best", "job", box=None)
    for run in runs:
        best = run["best_val_loss"]
        latest = run["latest"].get("val/loss")
        table.add_row(
            run["run"],
            run["state"],
            f"{run['epoch']}/{run['epochs'] or '?'}",
            f"{run['step']}/{run['total_steps'] or '?'}",
            "" if latest is None else f"{latest:.4f}",
            "" if best is None else f"{best:.4f}",
            run["jobs"][-1]["job_id"] if run["jobs"] else "",
        )
    # Another program reads whole names.
    Console(width=None if sys.stdout.isatty() else 1000).print(table)


def _print_attempts(run: dict[str, Any]) -> None:
    for attempt in run["attempts"]:
        job = attempt["job"]
        print(
            f"attempt {attempt['number']}: {attempt['started']} {job['cluster']} job "
            f"{job['job_id']} on {job['host']}, steps {attempt['first_step']} to "
            f"{attempt['last_step']}, {attempt['state']} {attempt['reason']}".rstrip()
        )
    print(f"folder {run['folder']}\nweights {run['checkpoints']}")
