"""flowjobs submit."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from flowjobs.cli.code_options import CodeOptions
from flowjobs.cli.defaults import CommandOptions, Defaults, WithDefaults
from flowjobs.cli.follow import follow
from flowjobs.cli.output import disk_words, print_rows
from flowjobs.cli.parser import Flag
from flowjobs.cli.prepare import check_ranks, prepare_run
from flowjobs.config import (
    PARTS,
    OptionalStr,
    RestartConfig,
    RunConfig,
    SlurmConfig,
    TrackingConfig,
    TrainingConfig,
)
from flowjobs.errors import ConfigError, SubmissionError
from flowjobs.field_values import flag
from flowjobs.formatting import counted
from flowjobs.models.size import checkpoint_bytes_of, size_words
from flowjobs.runs.datasets import row_shape
from flowjobs.runs.hint import hint
from flowjobs.runs.run import Run, undone_if_refused
from flowjobs.slurm.options import DECIDED, environment_for_sbatch
from flowjobs.tracking.record import tracking_of

if TYPE_CHECKING:
    from flowjobs.jobs.executors import Cluster
    from flowjobs.jobs.snapshot import CodeChoice, CodePlan
    from flowjobs.jobs.submit import SubmittedJob
    from flowjobs.runs.submittable import Submission

# Smaller checkpoints are not mentioned.
LARGE_BYTES = 100e6

EXAMPLES = """\
  flowjobs submit --arch mlp --flow icfm
  flowjobs submit --arch my_models:WideNet --arch-args width=512 --dataset data.npy
  flowjobs submit --name long --epochs 500 --partition preempt --timeout-min 60
"""


@dataclass(frozen=True)
class SubmitOptions(CodeOptions, CommandOptions):
    """Options of a command that submits a run, whichever way it found its config."""

    follow: Flag = False
    """Watch the job with a progress bar until it ends; the default on this machine."""

    no_follow: Flag = False
    """Return at once; the default on Slurm."""

    def submit_run(
        self,
        defaults: Defaults,
        run: Run,
        config: RunConfig,
        code_choice: "CodeChoice",
        plan: Callable[[Run, RunConfig, str], None] | None = None,
    ) -> int:
        """Submit a run, and follow it if asked to.

        Args:
            defaults: Say where the values come from, and which are flags.
            run: The run.
            config: What is asked for.
            code_choice: Which code it is trained with, if its own has changed.
            plan: Prints what would be submitted, instead.

        Returns:
            The exit code.
        """
        # The scheduler's side is slow to load, and --help does without.
        from flowjobs.jobs.current_job import running_job, wait_until_ended
        from flowjobs.jobs.executors import check_meant_for_here, choose_cluster, ranks_of
        from flowjobs.jobs.snapshot import plan_code

        if self.follow and self.no_follow:
            raise ConfigError("--follow and --no-follow: found both, expected one")
        cluster, why = choose_cluster(self.cluster)
        ranks = ranks_of(cluster, config.slurm)
        # A job that was cancelled may still be leaving: Slurm's new one waits for that itself.
        cancelled = run.cancel_requested()
        if cancelled and not plan:
            wait_until_ended(run)
        # Also where the config alone is lost.
        there = run.folder.exists()
        known = _jobs_noted(run)
        busy = running_job(run, cancelled=cancelled) if there else None
        if busy and cancelled and not plan:
            again = hint("cancel", run.name, study=run.study)
            raise SubmissionError(
                f"{run.name} is cancelled but still has {busy}; submitting now would let that job "
                f"train. First run: {again}"
            )
        merged, note = run.merge(config, in_use=busy is not None)
        if not busy and there:
            run.check_files(merged.training)
        code = plan_code(run, merged.training, code_choice, in_use=busy is not None)
        if busy and not cancelled:
            would_be = "would be" if plan else "was"
            print(f"{run.name} already has {busy}; nothing {would_be} submitted")
            return 0
        is_finished = there and run.finished(merged.training)
        if not is_finished:
            check_meant_for_here((cluster, why), defaults.flags, [run])
            if there:
                run.check_model(merged.training)
            check_ranks([merged.training], run.study, ranks)
        if plan:
            if is_finished:
                _print_finished(run)
                return 0
            for said in filter(None, (note, code.note, _note_on_ranks(run, ranks))):
                print(said)
            plan(run, config, f"{cluster} ({why})")
            return 0
        submit_now = partial(_submit, defaults, run, config, code, cluster, why, ranks)
        return self._submit_unless_noted(run, cluster, known, submit_now)

    def _submit_unless_noted(
        self,
        run: Run,
        cluster: "Cluster",
        known: "Sequence[Submission] | None",
        submit_now: "Callable[[], SubmittedJob | None]",
    ) -> int:
        """Submit a run and follow it, unless it has got a job beside those that are known."""
        from flowjobs.jobs.current_job import running_job

        # The debugger's job ends in here, and another command is to hear that it trains.
        with nullcontext() if cluster == "debug" else run.one_submits():
            if _jobs_noted(run) != known and (busy := running_job(run)):
                print(f"{run.name} already has {busy}; nothing was submitted")
                return 0
            attempts_before = len(run.status().attempts) if run.exists() else 0
            with undone_if_refused([run]):
                job = submit_now()
        if not job or cluster == "debug" or not self._follows(cluster):
            return 0
        return follow(
            run,
            attempts_before,
            lambda: job.alive(run),
            lambda: job.waits(run),
            requeues=cluster == "slurm",
        )

    def _follows(self, cluster: "Cluster") -> bool:
        return not self.no_follow and (cluster != "slurm" or self.follow)


@dataclass(frozen=True)
class Submit(SubmitOptions, WithDefaults):
    """Submit a run as a job, to Slurm or to this machine. The same command again resumes it."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    restarts: RestartConfig = field(default_factory=RestartConfig)

    name: OptionalStr = None
    """Name of the run; default: ARCH-FLOW-DATASET-AUG."""

    dry_run: Flag = False
    """Print the batch file and where its values come from; submit nothing."""

    def run(self, defaults: Defaults) -> int:
        """Submit, and follow if asked to. Returns the exit code."""
        run, config = prepare_run(
            defaults,
            self.study,
            self.name,
            self.training,
            self.slurm,
            self.tracking,
            self.restarts,
            own_code=self.keep_code,
        )
        plan = partial(self._print_plan, defaults) if self.dry_run else None
        return self.submit_run(defaults, run, config, self.code_choice(), plan)

    def _print_plan(self, defaults: Defaults, run: Run, config: RunConfig, cluster: str) -> None:
        from flowjobs.jobs.executors import slurm_executor

        rows = _size_rows(run, config.training)
        print_rows(run=run.name, folder=str(run.folder), **rows, cluster=cluster)
        print("\n# where the values come from")
        # As they were given, not as `config` has them: paths are absolute there.
        used = set()
        parts: list[Any] = [self, self.training, self.slurm, self.tracking, self.restarts]
        for part in parts:
            for known in dataclasses.fields(part):
                source = defaults.source_of(part, known.name)
                used.add(source)
                shown = known.name not in (*PARTS, "dry_run")
                if shown and source != "default":
                    print(f"{flag(known.name):18} {getattr(part, known.name)}  ({source})")
        print("all others are flowjobs' own defaults")
        self._print_variables(config.slurm, used)
        print()
        if not cluster.startswith("slurm"):
            print("# what sbatch would get with --cluster slurm; here none is written")
        print(slurm_executor(run, config.slurm).batch_file())

    def _print_variables(self, slurm: SlurmConfig, used: set[str]) -> None:
        seen_by_sbatch = environment_for_sbatch(os.environ, slurm)
        for name in sorted(os.environ):
            if name.startswith("SBATCH_") and (name in seen_by_sbatch or name not in used):
                reason = DECIDED.get(name, "the batch file says it")
                end = "read by sbatch" if name in seen_by_sbatch else f"not used: {reason}"
                print(f"{name} {seen_by_sbatch.get(name, os.environ[name])}  ({end})")


def _submit(
    defaults: Defaults,
    run: Run,
    config: RunConfig,
    code: "CodePlan",
    cluster: "Cluster",
    why: str,
    ranks: int,
) -> "SubmittedJob | None":
    """Submit a job; None where the run is finished."""
    from flowjobs.jobs.submit import submit
    from flowjobs.jobs.tasks import task_of

    if note := run.create(config):
        print(note)
    if run.finished():
        _print_finished(run)
        return None
    code.carry_out()
    for said in filter(None, (code.note, _note_on_ranks(run, ranks))):
        print(said)
    print_rows(
        run=run.name,
        folder=str(run.folder),
        **_size_rows(run, config.training),
        cluster=f"{cluster} ({why})",
        **({"ranks": str(ranks)} if ranks > 1 else {}),
        tracking=defaults.tracking_in_words(tracking_of(run)),
    )
    run.clear_cancel()
    job = submit(run, cluster, task_of(run))
    print_rows(
        job=job.job_id,
        follow=hint("logs", "-f", run.name, study=run.study),
        inspect=hint("status", run.name, study=run.study),
        cancel=hint("cancel", run.name, study=run.study),
    )
    return job


def _note_on_ranks(run: Run, ranks: int) -> str:
    """What its user should know if a run has trained with another number of ranks; else empty."""
    trained = [known for known in run.status().attempts if known.first_step is not None]
    before = trained[-1].job.ranks if trained else None
    if before is None or before == ranks:
        return ""
    return (
        f"{run.name} has trained with {counted(before, 'rank')}, and would now with {ranks}: it "
        "resumes, but not to the same bits; for these ask for as many (--nodes, --gpus-per-node)"
    )


def _jobs_noted(run: Run) -> "list[Submission] | None":
    try:
        return run.submissions()
    except OSError:  # whoever looks for a job that runs says it
        return None


def _size_rows(run: Run, training: TrainingConfig) -> dict[str, str]:
    """What to know of the model's size: the width that was chosen for it, and its checkpoints."""
    size = size_words([training])
    rows = {"size": size} if size else {}
    if not run.saved_files():
        disk = checkpoint_bytes_of(training, row_shape(training.dataset, run.study))
        if disk and disk >= LARGE_BYTES:
            rows["disk"] = disk_words(disk, run.study)
    return rows


def _print_finished(run: Run) -> None:
    picture = run.samples_picture
    print(f"{run.name} is finished: {run.best}", end="")
    print(f", {picture}" if picture.exists() else f"; there is no {picture}")
    print("to train on, give it more --epochs, or more --patience if it stopped early")
