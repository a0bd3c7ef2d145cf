"""Trains the runs of a pack in one job: so many slots, each with the next run that is left.

A run in a slot is a process of its own and goes the way of every run (jobs/entry.py), with its log,
lock, tracking and outcome. What is the job's is done here, once: a signal is passed on, the job is
requeued when all have saved, and a death that said nothing is written down.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from flowjobs.cgroups import memory_kills
from flowjobs.config import RestartConfig
from flowjobs.errors import ConfigError, FlowjobsError
from flowjobs.jobs.dead_jobs import DeadJob, version_of
from flowjobs.jobs.entry import exit_code_if_storage_is_away, run_submitit_task
from flowjobs.jobs.environment import this_process
from flowjobs.jobs.exit_cause import cancelled_while_requeued
from flowjobs.jobs.mps import mps_daemon
from flowjobs.jobs.record_end import record_dead_attempt, record_end_of_slot
from flowjobs.jobs.restart import restart
from flowjobs.jobs.signals import StopSignals
from flowjobs.jobs.stop_cause import seconds_left
from flowjobs.runs.files import AWAY_AT_MOST_S, warn_once
from flowjobs.runs.pack import Pack, is_remaining
from flowjobs.runs.run import Run
from flowjobs.runs.status import (
    EXIT_CANCELLED,
    EXIT_FAILED,
    EXIT_PREEMPTED,
    JobInfo,
    cancelled_outcome,
)
from flowjobs.slots import SLOTS
from flowjobs.slurm.options import CONTINUES
from flowjobs.tracking.process import close_session, pending_outcome

logger = logging.getLogger(__name__)

POLL_S = 0.2
# Each look opens a file per running process on a shared file system.
LOOK_EVERY_S = 1.0
# The job's own watchdog fires after those of its runs, and still before Slurm kills it.
LATER_S = 1.0
LATER_SHARE = 0.1


@dataclass(frozen=True)
class PackTask:
    """What submitit pickles: the folder of a pack. What is on disk decides.

    Args:
        folder: `STUDY/packs/NAME`, absolute.
    """

    folder: str

    def __call__(self) -> None:
        """Run the job; its exit code is that of the worst outcome. A bug raises."""
        run_submitit_task(lambda: train_pack(Pack.at(Path(self.folder))))


def train_pack(pack: Pack) -> int:
    """Train what is left of a pack, in processes of this job.

    Returns:
        The exit code: 0 if all that was left is finished, 75 if the job is to continue, 1 if a run
        failed, 130 if one was cancelled.
    """
    try:
        job = this_process(pack).job
        slots = _Slots(pack, job)
    except (FlowjobsError, OSError) as error:
        return exit_code_if_storage_is_away(error)
    # Before anything that takes a while: a job may be preempted as soon as it has begun.
    with StopSignals(slots.seconds_left, slots.too_late, process_ends=True) as signals:
        try:
            pack.note_start(job.job_id)
        except OSError as error:  # its runs are trained all the same
            logger.error("that the job has started could not be noted: %s", error)
        if job.restart_count and cancelled_while_requeued(job):
            slots.cancel_all()
        else:
            with _clients_of_mps(pack) as variables:
                slots.train(signals.received, variables)
        signals.stand_down()  # all have ended
        if signals.received() and pack.remaining(job.job_id):
            return slots.restart()
    slots.tell_wandb()
    return slots.exit_code()


@contextmanager
def _clients_of_mps(pack: Pack) -> Iterator[Mapping[str, str]]:
    """The variables of runs that share the GPU by CUDA's MPS; none where it is not asked for."""
    with ExitStack() as stack:
        variables: Mapping[str, str] = {}
        if pack.asked().mps:
            try:
                variables = stack.enter_context(mps_daemon())
            except ConfigError as error:  # they train all the same, to the same bits
                logger.error("%s: the runs take turns on the GPU", error)
        yield variables


@dataclass
class _Process:
    """A run's process.

    Attributes:
        popen: The process.
        told: Whether it has been told to end, as the run is cancelled.
        ends_by: When it is killed, in time.monotonic's seconds; None: nobody will.
        noted_by: When it is given up to write down how it ended; None: it went well so far.
        out_of_memory: Whether its log says that the kernel has killed it for the job's memory.
    """

    popen: "subprocess.Popen[bytes]"
    told: bool = False
    ends_by: float | None = None
    noted_by: float | None = None
    out_of_memory: bool = False


class _Slots:
    """The processes of one start of a pack's job."""

    def __init__(self, pack: Pack, job: JobInfo) -> None:
        self._pack = pack
        self._job = job
        self._waiting: deque[Run] = deque()
        self._running: dict[Run, _Process] = {}
        self._fruitless: Counter[Run] = Counter()
        self._memory_kills = memory_kills()  # ascribed to a run, or older than the job
        self._looked_at = 0.0
        self._starts_from = 0.0
        self._variables: Mapping[str, str] = {}

    def train(
        self, told: Callable[[], signal.Signals | None], variables: Mapping[str, str]
    ) -> None:
        """Give each slot the next run until none is left, or all have left on a signal.

        Args:
            told: The signal that asks the job to leave; None if none has come.
            variables: What the runs' processes have in their environment.
        """
        self._variables = variables
        passed_on = False
        self._waiting.extend(self._pack.remaining(self._job.job_id))
        try:
            while self._running or self._waiting:
                number = told()
                if number and not passed_on:
                    passed_on = True
                    self._waiting.clear()
                    self._pass_on(number)
                self._note_ended(again=not passed_on)
                self._end_cancelled()
                while self._may_start() and not told():
                    self._start_next()
                time.sleep(POLL_S)
        finally:
            for process in self._running.values():  # of a bug here: they save what they have
                process.popen.terminate()

    def _may_start(self) -> bool:
        free = len(self._running) < self._pack.slots
        return free and bool(self._waiting) and time.monotonic() >= self._starts_from

    def _start_next(self) -> None:
        run = self._waiting.popleft()
        try:
            if is_remaining(run, self._job.job_id):  # not cancelled meanwhile, say
                self._start(run)
        except (FlowjobsError, OSError) as error:
            logger.warning("%s does not start now: %s", run.name, error)
            self._put_behind(run, began=False)
            # A file server is away, or the node has no memory left: later, and later still.
            self._starts_from = time.monotonic() + 2 ** self._fruitless[run]

    def _start(self, run: Run) -> None:
        environment = {**os.environ, **self._variables, SLOTS: str(self._pack.slots)}
        if self._has_begun(run):
            # Not a start by its user, which would let fruitless attempts count from zero again.
            environment.setdefault(CONTINUES, self._job.job_id)
        else:
            environment.pop(CONTINUES, None)  # its user has submitted it, and this is its start
        # Blocked until python listens, in the process too: see jobs/signals.py.
        signals = {signal.SIGTERM, signal.SIGUSR2}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            with run.output_of(self._job.job_id).open("ab") as log:
                popen = subprocess.Popen(
                    # -u: what it printed last is in its log when it is killed.
                    [sys.executable, "-u", "-m", "flowjobs.jobs", str(run.folder)],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._running[run] = _Process(popen)
        logger.info("%s starts as process %d", run.name, popen.pid)

    def _has_begun(self, run: Run) -> bool:
        """Whether the run has had a process since its user submitted the pack."""
        jobs = set()
        for entry in reversed(run.submissions()):
            jobs.add(entry.job_id)
            if not entry.continues:
                break
        attempts = run.status().attempts
        return any(attempt.job.job_id in jobs for attempt in attempts)

    def _pass_on(self, number: signal.Signals) -> None:
        logger.warning(
            "told to leave (%s): waiting for %d runs to save", number.name, len(self._running)
        )
        for process in self._running.values():
            # Ctrl-C at a terminal has reached them too, and twice means at once.
            usual = number if number is signal.SIGUSR2 else signal.SIGTERM
            process.popen.send_signal(usual)

    def _note_ended(self, *, again: bool) -> None:
        for run, process in list(self._running.items()):
            code = process.popen.poll()
            if code is None:
                continue
            remaining = began = False
            try:
                if run.removed():
                    logger.warning("%s was removed", run.name)
                    del self._running[run]
                    continue
                # Popen has a signal as -n, and everything here as the shell does, 128 + n.
                self._record_end(run, process, code if code >= 0 else 128 - code)
                remaining = again and is_remaining(run, self._job.job_id)
                attempts = run.status().attempts
                began = bool(attempts) and attempts[-1].job.pid == process.popen.pid
            except (FlowjobsError, OSError) as error:
                if again and isinstance(error, OSError) and self._is_noted_later(process):
                    warn_once(f"{run.name}: how it ended is not written down yet: {error}")
                    continue
                # Unknown: it is not started again.
                logger.error("%s: how it ended could not be written down: %s", run.name, error)
            del self._running[run]
            if remaining:
                self._put_behind(run, began=began)

    def _is_noted_later(self, process: _Process) -> bool:
        now = time.monotonic()
        process.noted_by = process.noted_by or now + AWAY_AT_MOST_S
        return now < process.noted_by

    def _record_end(self, run: Run, process: _Process, exit_code: int) -> None:
        log = run.output_of(self._job.job_id)
        killed = exit_code == 128 + signal.SIGKILL and not process.out_of_memory
        if killed and memory_kills() > self._memory_kills:
            # In the run's log, where the cause is looked for: the kernel tells the job alone.
            line = "oom-kill: the kernel has killed the process, the job's memory is full\n"
            with log.open("a") as file:
                file.write(line)
            process.out_of_memory = True
            # One is this run's: the kernel may have killed others at once, which come next.
            self._memory_kills += 1
        # A kill beyond theirs was of something else: the next run that is killed is no part of it.
        others = [each for each in self._running.values() if not each.out_of_memory]
        killed_codes = (-signal.SIGKILL, 128 + signal.SIGKILL)
        dead = sum(each.popen.poll() in killed_codes for each in others if each is not process)
        self._memory_kills = max(self._memory_kills, memory_kills() - dead)
        job = replace(self._job, pid=process.popen.pid, log=str(log), packed=True)
        if outcome := record_end_of_slot(run, job, exit_code):
            logger.error("%s: %s: %s", run.name, outcome.state, outcome.reason)
            if outcome.state != "preempted":  # else its next attempt tells
                close_session(run, wait=False)
        else:
            status = run.status()
            logger.info("%s: %s %s", run.name, status.state, status.reason)

    def _put_behind(self, run: Run, *, began: bool) -> None:
        """Put a run behind the others, unless its starts do not even get hold of it."""
        self._fruitless[run] = 0 if began else self._fruitless[run] + 1
        try:
            give_up_after = run.config().restarts.give_up_after
        except (FlowjobsError, OSError):  # its own process says what is wrong with it
            give_up_after = RestartConfig().give_up_after
        if self._fruitless[run] < give_up_after:
            self._waiting.append(run)
        else:
            logger.error("%s is not started again: see %s", run.name, run.logs)

    def _end_cancelled(self) -> None:
        now = time.monotonic()
        for process in self._running.values():
            if process.ends_by is not None and now > process.ends_by:
                process.popen.kill()
        if now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        for run, process in self._running.items():
            try:
                if process.told or not run.cancel_requested():
                    continue
            except OSError as error:
                warn_once(f"whether {run.name} is cancelled is unknown: {error}")
                continue
            logger.info("%s is cancelled", run.name)
            process.told = True
            process.popen.terminate()
            if (seconds := seconds_left(run, self._job, signal.SIGTERM)) is not None:
                process.ends_by = now + seconds

    def cancel_all(self) -> None:
        """The user cancelled the job just as it asked to be requeued: nothing of it continues."""
        logger.info("the job was cancelled: submit its runs again to resume them")
        outcome = cancelled_outcome("cancelled")
        for run in self._pack.remaining(self._job.job_id):
            try:
                status = run.status()
                began = any(known.job.job_id == self._job.job_id for known in status.attempts)
                if record_dead_attempt(
                    run, DeadJob(self._job, outcome, version_of(status), attempt_began=began)
                ):
                    close_session(run, wait=False)
            except (FlowjobsError, OSError) as error:
                logger.error("%s: that it is cancelled is not noted: %s", run.name, error)

    def restart(self) -> int:
        """Have the job started again, for what is left. Returns this process's exit code."""
        return restart(self._pack, self._job, PackTask(str(self._pack.folder)))

    def seconds_left(self, number: signal.Signals) -> float | None:
        """How long this process may live after a signal, with what it gives to the runs'."""
        seconds = seconds_left(self._pack, self._job, number)
        return None if seconds is None else seconds + min(LATER_S, LATER_SHARE * seconds)

    def too_late(self) -> None:
        """A run hangs, and its process too: the job is about to be killed."""
        code = EXIT_PREEMPTED
        try:
            names = ", ".join(run.name for run in self._running)
            logger.error("%s did not end in time: as the last checkpoint has it", names)
            for process in self._running.values():
                process.popen.kill()
            code = self.restart()
        finally:
            os._exit(code)

    def tell_wandb(self) -> None:
        """Wait until W&B knows how those ended that could not say it."""
        for run in self._pack.runs:
            try:
                ended = self._is_mine(run) and not is_remaining(run, self._job.job_id)
                if ended and pending_outcome(run):
                    close_session(run)
            except (FlowjobsError, OSError) as error:
                logger.error("%s: %s", run.name, error)

    def _is_mine(self, run: Run) -> bool:
        """Whether this job is the run's, which may have ended in an earlier start of it."""
        newest = run.newest_job()
        return newest is not None and newest.job_id == self._job.job_id

    def exit_code(self) -> int:
        """That of the worst outcome; where that is unknown, as if something were left."""
        if self._pack.remaining(self._job.job_id):
            return EXIT_PREEMPTED
        try:
            mine = [run for run in self._pack.runs if self._is_mine(run)]
            states = {run.status().state for run in mine}
        except OSError as error:
            logger.error("how the runs ended cannot be read: %s", error)
            return EXIT_PREEMPTED
        if "failed" in states:
            return EXIT_FAILED
        return EXIT_CANCELLED if "cancelled" in states else 0
