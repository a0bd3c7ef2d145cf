"""What submitit pickles and runs on the node: from a run's folder to its outcome, and to a restart.

The same under every executor. Signals are armed before the slow imports; then the lock is taken and
tracking opened; then the trainer runs, which knows neither Slurm nor W&B.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flowjobs.errors import (
    FlowjobsError,
    MeasuringInterrupted,
    NoProgressError,
    RunInterrupted,
    RunTakenOverError,
    UserCodeExitError,
)
from flowjobs.jobs import exit_cause
from flowjobs.jobs.environment import JobProcess, this_process
from flowjobs.jobs.lock_judge import judge_for
from flowjobs.jobs.restart import cancel_requested_with_retries, restart
from flowjobs.jobs.signals import MARGIN_MAX_S, StopSignals
from flowjobs.jobs.stop_cause import Notice, notice_of, seconds_left
from flowjobs.runs.code import import_from_snapshot
from flowjobs.runs.hint import hint
from flowjobs.runs.rank_failures import RankFailure, note_failure, noted_failures
from flowjobs.runs.restarts import may_retry
from flowjobs.runs.run import Run
from flowjobs.runs.status import (
    CANCELLED,
    EXIT_CANCELLED,
    EXIT_FAILED,
    EXIT_PREEMPTED,
    AttemptRecord,
    Outcome,
    cancelled_outcome,
    outcome_of,
)
from flowjobs.tracking.process import close_session

if TYPE_CHECKING:
    from flowjobs.runs.recorder import Recorder
    from flowjobs.training.ranks import Ranks

logger = logging.getLogger(__name__)

# When the other ranks are gone since Slurm has ended them, it says why.
ENDED_BY_SLURM = ("node failure", "preempted", "time limit", "requeued", "cancelled")
# From the end of another rank to srun's word of it.
FAILURE_KNOWN_WITHIN_S = 10.0

# From the run's outcome to the end of its process.
END_WITHIN_S = 10.0


@dataclass(frozen=True)
class RunTask:
    """What submitit pickles: the folder of a run, and nothing else. What is on disk decides.

    Args:
        folder: `STUDY/runs/NAME`, absolute.
    """

    folder: str

    def __call__(self) -> None:
        """Run the job; its exit code is the outcome's. A bug raises."""
        run_submitit_task(lambda: train_run(Run.at(Path(self.folder))))


def run_submitit_task(work: Callable[[], int]) -> None:
    """Do the work of a process that submitit has started, and exit with its code, unless 0."""
    log_to_stderr()
    try:
        code = work()
    except FlowjobsError as error:
        logger.error("%s", error)
        code = error.exit_code
    finally:
        # submitit's handler would requeue the job, whatever became of the run.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if code:
        sys.exit(code)


def train_run(run: Run, resume_path: Path | None = None) -> int:
    """Train a run in this process, from its newest checkpoint if there is one.

    A run that is told to leave saves its state and is started again where that can be done.

    Args:
        run: The run; its config is on disk.
        resume_path: Resume from this checkpoint instead.

    Returns:
        The exit code of the process: 0 if the run is finished.

    Raises:
        RunBusyError: Another attempt trains the run.
        FlowjobsError: The config cannot be trained.
    """
    try:
        process = this_process(run)
    except OSError as error:
        return exit_code_if_storage_is_away(error)
    if process.job.cluster == "none" and process.job.log:
        log_to_file(Path(process.job.log))
    # Read once, when torch is loaded: a thread that waits leaves its core to the others. By default
    # it spins, and runs side by side take forty times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    job = TrainingJob(run, process)
    code = EXIT_FAILED
    try:
        code = job.run(resume_path)
    except Exception as error:
        code = outcome_of(error).exit_code
        if not job.may_begin_later:
            raise
        code = exit_code_if_storage_is_away(error)
    finally:
        if process.job.cluster != "debug":  # there the process is the user's, in the debugger
            end_in_time(code)
    return code


def exit_code_if_storage_is_away(error: Exception) -> int:
    """EXIT_PREEMPTED if a file system error kept the job from starting, so that its batch script
    restarts it; re-raises anything else."""
    if exit_cause.transient_kind(error) != "file system":
        raise error
    logger.error("%s: nothing has begun, and the job is started again", error)
    return EXIT_PREEMPTED


class TrainingJob:
    """One attempt inside a job: trains, finds out why it ended, restarts the job."""

    def __init__(self, run: Run, process: JobProcess) -> None:
        self._run = run
        self._process = process
        self._job = process.job
        self._recorder: Recorder | None = None
        self._exclude: str | None = None
        debugged = self._job.cluster == "debug"  # the process is the user's, in the debugger
        self._signals = StopSignals(self._seconds_left, self._too_late, process_ends=not debugged)

    @property
    def may_begin_later(self) -> bool:
        """Whether no attempt has begun in this start of a job that can be started again."""
        return self._is_first and self._recorder is None and self._job.cluster == "slurm"

    @property
    def _is_first(self) -> bool:
        """Whether this rank says how the job ends.

        Another one must not end with an exit code of its own unless it is what failed: srun would
        tell all to end, the first one in the middle of its last words.
        """
        return self._process.rank == 0

    def run(self, resume_path: Path | None) -> int:
        """Do what is left of the run; see `train_run`. Returns this process's exit code."""
        run = self._run
        # Armed before the slow imports: a job may be preempted while torch loads.
        with self._signals:
            if resume_path is None and run.finished():
                run.check_files()
                picture = run.samples_picture
                missing = "" if picture.exists() else f"; there is no {picture}"
                logger.info("%s is finished%s", run.name, missing)
                return 0
            if self._end_if_cancelled():
                logger.info("%s was cancelled: submit it again to resume", run.name)
                return EXIT_CANCELLED if self._is_first else 0
            try:
                self._train(resume_path)
            except RunTakenOverError as error:
                logger.warning("%s", error)
                return EXIT_PREEMPTED
            except RunInterrupted as interrupted:
                logger.warning("%s", interrupted)
                if interrupted.kind == "cancelled":
                    return EXIT_CANCELLED
                return self._restart(interrupted.kind)
        return 0

    def _end_if_cancelled(self) -> bool:
        """Whether the run was cancelled; records that once."""
        # A user who starts the run has deleted the cancel file first.
        cancelled = cancel_requested_with_retries(self._run) or (
            not self._job.started_by_user and exit_cause.cancelled_while_requeued(self._job)
        )
        status = self._run.status()
        if cancelled and status.state == "preempted" and self._is_first:
            outcome = cancelled_outcome("cancelled")
            status.record_outcome(outcome)
            status.write(self._run.status_file)
            close_session(self._run)
        return cancelled

    def _train(self, resume_path: Path | None) -> None:
        """Train to the end, or until told to leave."""
        # Left last: where the other ranks hang, leaving may, and the outcome is told by then.
        with ExitStack() as group:
            if not self._is_first:
                self._train_as_other_rank(group, resume_path)
                return
            # Before torch is loaded: what tracks the run starts beside that, on a free core.
            with self._recording(group) as self._recorder, self._explaining_the_end():
                if self._known_to_be_cancelled():
                    # Since the last look: `cancel` did not know this process yet, to tell it.
                    signal.raise_signal(signal.SIGTERM)
                self._train_as_rank(group, resume_path)

    def _train_as_other_rank(self, group: ExitStack, resume_path: Path | None) -> None:
        """Train as a rank that is not the first."""
        try:
            self._train_as_rank(group, resume_path)
        except (RunInterrupted, RunTakenOverError) as interrupted:
            logger.warning("%s", interrupted)
        except Exception as error:
            if not exit_cause.failure_of(error, self._process).is_consequence:
                raise
            logger.error("the other ranks are gone: %s", error)

    def _train_as_rank(self, group: ExitStack, resume_path: Path | None) -> None:
        """Train; how that fails is noted, for the rank that says how the job ends."""
        try:
            from flowjobs.training.run_training import run_training

            import_from_snapshot(self._run)
            ranks = self._join_group(group)
            run_training(self._run, self._recorder, ranks, self._signals.reason, resume_path)
        except (RunInterrupted, RunTakenOverError, KeyboardInterrupt):
            raise  # agreed by all
        except SystemExit as called:
            failed = UserCodeExitError(called)
            self._note_rank_failure(failed)
            raise failed from called
        except BaseException as error:
            self._note_rank_failure(error)  # before the others see this one leave
            raise

    def _join_group(self, group: ExitStack) -> "Ranks":
        from flowjobs.training.ranks import joined_ranks

        process, use_gpu = self._process, self._run.config().slurm.gpus_per_node > 0
        return group.enter_context(
            joined_ranks(process.rank, process.world_size, process.local_rank, use_gpu)
        )

    def _note_rank_failure(self, error: BaseException) -> None:
        if self._process.world_size == 1:
            return
        try:
            failure = exit_cause.failure_of(error, self._process)
            note_failure(self._run, self._process.start_id, failure)
        except OSError as refused:
            logger.warning("how this rank failed could not be noted: %s", refused)

    @contextmanager
    def _recording(self, group: ExitStack) -> Iterator["Recorder"]:
        """Holds the run and tracks it; for the first rank, which the others wait for."""
        from flowjobs.runs.recorder import recording
        from flowjobs.tracking.tracker import tracked

        def explain(record: AttemptRecord) -> Outcome:
            again = record.job.job_id == self._job.job_id
            return exit_cause.cause_of(self._run, record, restarted=again)

        try:
            with ExitStack() as stack:
                try:
                    judge = judge_for(self._run, self._job)
                    held = recording(self._run, self._job, judge, explain, tracked)
                    recorder = stack.enter_context(held)
                except Exception:
                    if self._process.world_size > 1:
                        with suppress(Exception):
                            self._join_group(group)  # they see it leave, and leave too
                    raise
                yield recorder
        except NoProgressError:
            close_session(self._run)  # it may be known before tracking begins
            raise

    @contextmanager
    def _explaining_the_end(self) -> Iterator[None]:
        """Replaces the exception that ends the block: by Slurm's reason if Slurm stopped the job,
        by the failing rank's error, or by RunInterrupted if it may be retried. A run that lacks
        only its measures is finished without them, unless its next start may take them."""
        try:
            yield
        except RunInterrupted as interrupted:
            self._signals.stand_down()  # the state is saved
            notice = self._stop_cause()
            only_measuring = isinstance(interrupted, MeasuringInterrupted)
            if only_measuring and not self._may_measure_later(notice):
                again = hint("evaluate", self._run.name, study=self._run.study)
                logger.warning(
                    "%s while samples were measured: `%s` measures them", interrupted, again
                )
                return
            if notice:  # else the signal's name must do
                raise RunInterrupted(notice.reason, interrupted.step, notice.kind) from None
            raise
        except Exception as error:
            self._signals.stand_down()
            if self._known_to_be_cancelled():
                # What a process runs into as others of its job are told to end.
                logger.exception("%s", CANCELLED.reason)
                raise RunInterrupted(CANCELLED.reason, kind=CANCELLED.kind) from error
            self._raise_root_cause(error)
            raise
        self._signals.stand_down()

    def _raise_root_cause(self, error: Exception) -> None:
        """Raise what is behind an error of this rank, unless that is the error itself."""
        failure = self._root_cause(error)
        kind = failure.outcome.kind
        if (
            failure.is_consequence
            and (notice := self._stop_cause())
            and notice.kind in ENDED_BY_SLURM
        ):
            raise RunInterrupted(notice.reason, kind=notice.kind) from error
        may_retry = self._may_retry(kind)
        elsewhere = failure.is_consequence or exit_cause.may_be_anothers(kind)
        its_own = failure.rank == 0 and not elsewhere
        if its_own and not may_retry:
            # Here and not from the error, which is raised again and does not tell its kind.
            assert self._recorder is not None
            self._recorder.record_outcome(failure.outcome)
            return
        reason = failure.reason
        if may_retry:
            self._exclude = failure.host
            reason = f"{kind}: {reason}; starts again"
        logger.error("%s\n%s", reason, failure.outcome.traceback)
        if may_retry:
            raise RunInterrupted(reason, kind=kind) from error
        raise failure.as_error() from error

    def _root_cause(self, error: Exception) -> RankFailure:
        """The failure of another rank that the first one's follows from; else its own."""
        mine = exit_cause.failure_of(error, self._process)
        if self._process.world_size == 1:
            return mine
        first = self._first_failure()
        if mine.is_consequence and not first:
            logger.error("another rank is gone: %s; looking for its failure", error)
            deadline = time.monotonic() + FAILURE_KNOWN_WITHIN_S
            while not first and time.monotonic() < deadline:
                time.sleep(0.1)
                first = self._first_failure()
        if first is None or first.outcome.reason == mine.outcome.reason:
            return mine
        return mine if first.rank == 0 else first

    def _first_failure(self) -> RankFailure | None:
        return exit_cause.first_failure(
            noted_failures(self._run, self._process.start_id), self._job
        )

    def _stop_cause(self) -> Notice | None:
        """What the signal meant that this process got; None if that is unknown now."""
        # Slurm does not answer, say, or a file server fails over.
        with suppress(FlowjobsError, OSError):
            return notice_of(self._run, self._job, self._signals.received())
        return None

    def _known_to_be_cancelled(self) -> bool:
        """Whether the run is known to be cancelled: an error at looking ends nothing by itself."""
        with suppress(OSError):
            return self._run.cancel_requested()
        return False

    def _may_retry(self, kind: str) -> bool:
        attempts = self._run.status().attempts
        if not attempts or self._job.cluster == "none":
            return False
        return may_retry(attempts, kind, self._run.config().restarts)

    def _may_measure_later(self, notice: Notice | None) -> bool:
        """Whether the run's next start, which trains no step, measures its samples.

        Not for whoever wants it to end. And once: what did not get to its end in a start of its own
        may never do.
        """
        if notice and notice.kind in ("cancelled", "told to leave"):
            return False
        with suppress(OSError):  # a file server fails over: unknown
            if attempts := self._run.status().attempts:
                return attempts[-1].last_step != attempts[-1].first_step
        return False

    def _restart(self, kind: str) -> int:
        """Have the run started again, that left for `kind`. Returns this process's exit code."""
        if self._job.packed:
            return EXIT_PREEMPTED  # who holds the slots restarts the job
        task, told = RunTask(str(self._run.folder)), kind == "told to leave"
        return restart(self._run, self._job, task, self._exclude, told_to_leave=told)

    def _seconds_left(self, number: signal.Signals) -> float | None:
        """How long this process may live after a signal."""
        return seconds_left(self._run, self._job, number)

    def _too_late(self) -> None:
        """The main thread hangs and is about to be killed: keep what is on disk, and restart."""
        if not self._is_first:
            time.sleep(MARGIN_MAX_S)  # the first one speaks
            os._exit(0)
        code = EXIT_PREEMPTED
        try:
            interrupted = self._interrupted_while_hanging()
            if interrupted.kind == "hung" and (failure := self._first_failure()):
                # It waits for a rank that is dead, and srun told it to end for that. The batch
                # script's last lines say so, and restart the run if it may be.
                logger.error("%s\n%s", failure.reason, failure.outcome.traceback)
                code = failure.outcome.exit_code
                return
            logger.error("%s: the run is as its last checkpoint has it", interrupted)
            if self._recorder is not None:
                self._recorder.attempt.record_outcome(outcome_of(interrupted))
            if interrupted.kind == "cancelled":
                code = EXIT_CANCELLED
            elif self._recorder is not None:
                code = self._restart(interrupted.kind)
        finally:
            # Not sys.exit: it would wait for the thread that hangs.
            os._exit(code)

    def _interrupted_while_hanging(self) -> RunInterrupted:
        reason = "told to leave, and no step ended in time"
        if (notice := self._stop_cause()) and notice.kind == "cancelled":
            return RunInterrupted(f"{notice.reason}; {reason}", kind="cancelled")
        return RunInterrupted(reason, kind="hung")


def end_in_time(code: int) -> None:
    """Have this process end with `code` even if what the user's code has started does not end.

    The interpreter waits for every thread and process at its end, and would hold the GPU of a run
    that is over. A traceback takes a moment to be printed, so there is time for that.
    """

    def end() -> None:
        time.sleep(END_WITHIN_S)
        alive = [thread.name for thread in threading.enumerate() if not thread.daemon]
        alive += [process.name for process in multiprocessing.active_children()]
        alive.remove(threading.main_thread().name)
        logger.error(
            "the run is over, and %s did not end within %g s: ended from here",
            ", ".join(alive) or "the process",
            END_WITHIN_S,
        )
        os._exit(code)

    threading.Thread(target=end, name="end-in-time", daemon=True).start()


def log_to_stderr() -> None:
    """Set up logging for a process that trains."""
    # A log that a full disk does not take is no reason for a traceback a line.
    logging.raiseExceptions = False
    logging.basicConfig(
        level=logging.INFO,
        # exit_cause.ATTEMPT_LINE has the letter of the level: change both.
        format="%(asctime)s %(levelname).1s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    # submitit has handlers of its own.
    logging.getLogger("submitit").propagate = False


def log_to_file(path: Path) -> None:
    """Copy the log of a process in the foreground to a file, for `flowjobs logs`."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.getLogger().handlers[0].formatter)
    logging.getLogger().addHandler(handler)
