"""flowjobs train."""

import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

from flowjobs.cli.code_options import CodeOptions
from flowjobs.cli.defaults import Defaults, WithDefaults
from flowjobs.cli.prepare import prepare_run
from flowjobs.config import (
    OptionalPath,
    OptionalStr,
    RestartConfig,
    RunConfig,
    TrackingConfig,
    TrainingConfig,
)
from flowjobs.errors import ConfigError, RunBusyError, SubmissionError
from flowjobs.runs.hint import hint
from flowjobs.runs.lock import lock_holder
from flowjobs.runs.run import Run, default_study
from flowjobs.runs.status import EXIT_PREEMPTED
from flowjobs.slots import submitted_for_run


@dataclass(frozen=True)
class Train(CodeOptions, WithDefaults):
    """Train a run in this process: here, or as the last line of a batch script."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    restarts: RestartConfig = field(default_factory=RestartConfig)

    study: Path = field(default_factory=default_study)
    """Root of the study; default: $FLOWJOBS_STUDY, else ./study."""

    name: OptionalStr = None
    """Name of the run; default: ARCH-FLOW-DATASET-AUG."""

    resume: OptionalPath = None
    """Resume from this checkpoint, of the same config; default: the run's last.pt. A run that
    already resumed from this file continues from its own last.pt. For its weights alone:
    --init-from."""

    def prepare(self, defaults: Defaults) -> tuple[Run, RunConfig]:
        """The run and its config. Writes nothing."""
        from flowjobs.jobs.environment import is_first_start

        return prepare_run(
            defaults,
            self.study,
            self.name,
            self.training,
            None,
            self.tracking,
            self.restarts,
            own_code=not self.no_snapshot and (self.keep_code or not is_first_start()),
        )

    def run(self, defaults: Defaults) -> int:
        """Train to the end. Returns the exit code."""
        from flowjobs.jobs.current_job import wait_until_ended
        from flowjobs.jobs.entry import log_to_stderr, train_run
        from flowjobs.jobs.environment import is_first_start, waited_while_cancelled
        from flowjobs.jobs.snapshot import plan_code

        choice = self.code_choice()
        run, config = self.prepare(defaults)
        first_start = is_first_start()
        if not first_start and choice != "live":
            choice = "keep"  # a restart has the code of the submission
        begun = any(attempt.first_step is not None for attempt in run.status().attempts)
        # A job that is started again resumes from its own last.pt, once it has trained.
        resume = self.resume if first_start or not begun else None
        if resume is not None and not resume.is_file():
            raise ConfigError(f"--resume: found no file {resume}, expected a checkpoint")
        wanted = first_start and not waited_while_cancelled(run)
        cancelled = wanted and run.cancel_requested()
        if cancelled:
            wait_until_ended(run)
        there = run.folder.exists()  # also where its config alone is lost
        in_use = there and (lock_holder(run.folder) is not None or _awaits_job(run, cancelled))
        merged, _ = run.merge(config, in_use=in_use)
        code = plan_code(run, merged.training, choice, in_use=in_use)
        if there and resume is None and not in_use:
            run.check_files(merged.training)
            if not run.finished(merged.training):
                run.check_model(merged.training)
        if note := run.create(config, in_use=in_use):
            print(note)
        if not in_use:
            code.carry_out()
            if code.note:
                print(code.note)
        log_to_stderr()
        if wanted:
            run.clear_cancel()
        exit_code = train_run(run, resume)
        if exit_code == EXIT_PREEMPTED:
            print("the same command resumes it", file=sys.stderr)
        return exit_code


def _awaits_job(run: Run, cancelled: bool) -> bool:
    """Whether another job of the run waits, which is to find its config as it was submitted.

    Raises:
        RunBusyError: One does, or runs, and this process is no job of the run.
        SubmissionError: That is unknown.
    """
    from flowjobs.jobs.current_job import job_besides
    from flowjobs.jobs.environment import batch_script_job_id

    if submitted_for_run():
        # A job by hand trains on what has begun. Some nodes may not ask Slurm: unknown is not gone.
        with contextlib.suppress(SubmissionError):
            own = batch_script_job_id()
            return not run.started() and job_besides(run, own, cancelled=cancelled) is not None
        return True
    if job := job_besides(run, None, cancelled=cancelled):
        cancel = hint("cancel", run.name, study=run.study)
        raise RunBusyError(
            f"{run.name} already has {job}: give this one a --name of its own, or cancel that one "
            f"first: {cancel}"
        )
    return False
