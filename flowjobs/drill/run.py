"""Interrupts tiny runs in every way there is, and sees whether each ends as an undisturbed one."""

import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from flowjobs.config import RunConfig, TrackingConfig
from flowjobs.drill.facts import ClusterFacts, facts_of_slurm, facts_of_this_machine
from flowjobs.drill.interruptions import Interruption, interruptions_for
from flowjobs.drill.probe import NodeAnswer, NodeProbe, NodeQuestion
from flowjobs.drill.report import Drilled, Report, make_report
from flowjobs.errors import SubmissionError, SubmissionUnknownError
from flowjobs.jobs.cancel import cancel, cancel_together
from flowjobs.jobs.deferred_signals import signals_deferred
from flowjobs.jobs.executors import Cluster
from flowjobs.jobs.origin import identity_of
from flowjobs.jobs.reconcile import reconcile
from flowjobs.jobs.submit import SubmittedJob, submit
from flowjobs.jobs.tasks import task_of
from flowjobs.runs.metrics import latest_values
from flowjobs.runs.run import Run
from flowjobs.runs.status import AttemptRecord
from flowjobs.slurm.controller import JobRow, start_soon
from flowjobs.slurm.jobs import Known, Unknown, ask
from flowjobs.slurm.waiting import Waiting, why_it_waits

POLL_S = 0.2
ASK_SLURM_EVERY_S = 2.0
EXPEDITE_EVERY_S = 15.0
# Steps that an attempt does before it is interrupted.
STEPS_BEFORE = 20
# A job that left the queue may be back in a moment, under a new id; its files may be late.
GONE_S = 15.0
CANCEL_WAIT_S = 60.0
# Nothing happens for so long to a job that runs: it hangs. So does a Slurm that does not answer.
HANGS_S = 600.0
SILENT_S = 60.0
# A person may yet release a job that is held, say.
STUCK_S = 60.0


@dataclass
class Queued:
    """Why a job waits in the queue, as seen from look to look.

    Attributes:
        waits: Why; None if it does not wait.
        stuck_since: Since when it has waited for what never comes, by this process's monotonic
            clock; infinite if it does not.
    """

    waits: Waiting | None = None
    stuck_since: float = math.inf

    def look(self, live: Sequence[JobRow]) -> None:
        """Look at the jobs of a run that wait or run."""
        waiting = [row for row in live if row.waits]
        # When it would start Slurm estimates anew again and again, which is no news.
        self.waits = why_it_waits(replace(waiting[-1], starts=None)) if waiting else None
        stuck = self.waits is not None and self.waits.stuck
        self.stuck_since = min(self.stuck_since, time.monotonic()) if stuck else math.inf

    @property
    def never_starts(self) -> bool:
        """Whether it has waited for a while for what never comes."""
        return time.monotonic() - self.stuck_since > STUCK_S


@dataclass(kw_only=True)
class Watched(Drilled):
    """A run of the drill, from its submission to its end.

    Attributes:
        job: Its first job.
        interrupted_at: When it was interrupted, by this process's monotonic clock; None if unknown.
        queued: Why its job waits.
        expedited_at: When Slurm was last asked to start it sooner.
        last_seen: What was last seen of it.
        changed_at: When that was new.
        done: Whether there is nothing more to wait for.
    """

    job: SubmittedJob
    interrupted_at: float | None = None
    queued: Queued = field(default_factory=Queued)
    expedited_at: float = -math.inf
    last_seen: object = None
    changed_at: float = field(default_factory=time.monotonic)
    done: bool = False


def drill(
    study: Path,
    cluster: Cluster,
    config: RunConfig,
    *,
    time_limit: bool,
    say: Callable[[str, str], None],
) -> Report:
    """Submit the runs, interrupt them, wait for their end and compare.

    Takes minutes, and as long as the jobs wait for their place, if they can get one. Leaves no jobs
    behind, whatever ends it, or says which.

    Args:
        study: An empty folder for the drill's own runs, absolute, in the user's study.
        cluster: Where to.
        config: The run that is trained, once for each interruption.
        time_limit: Whether one of them is to meet its time limit.
        say: Called again and again with the states of the runs, whose changes are news, and with
            a line that also has their steps.

    Raises:
        SubmissionError: A job was refused, or can never start, or Slurm does not answer for too
            long.
        SubmissionUnknownError: Something has ended it, and jobs of it may live: they need the
            folder.
    """
    config = replace(config, tracking=TrackingConfig(wandb_mode="disabled"))
    probe = Run(study, "drill-node")
    probe.create(config)
    drilling = _Drill(study, cluster, probe, say)
    try:
        facts = drilling.start(config, time_limit)
        node = drilling.watch()
    except BaseException as error:  # also Ctrl-C
        with signals_deferred(signal.SIGTERM, signal.SIGHUP):
            left = drilling.cancel()
        if left:
            command = "scancel" if cluster == "slurm" else "kill"
            raise SubmissionUnknownError(
                f"the drill has ended ({str(error) or type(error).__name__}), and jobs of it are "
                f"not known to have: {command} {' '.join(left)}; then remove {study}"
            ) from error
        raise
    say("comparing", "comparing")
    undisturbed, *others = drilling.watched
    return make_report(replace(facts, node=node), others, undisturbed)


class _Drill:
    def __init__(
        self, study: Path, cluster: Cluster, probe: Run, say: Callable[[str, str], None]
    ) -> None:
        self._study = study
        self._cluster = cluster
        self._probe = probe
        self._question = NodeQuestion(probe.folder)
        self._probe_gone_at: float | None = None
        self._probe_queued = Queued()
        self._say = say
        self._jobs: list[tuple[Run, SubmittedJob]] = []
        self.watched: list[Watched] = []

    def start(self, config: RunConfig, time_limit: bool) -> ClusterFacts:
        """Submit all jobs. Returns what the cluster says of itself."""
        job = self._submit(self._probe, NodeProbe(str(self._probe.folder)))
        study = str(self._study.parent)
        if self._cluster == "slurm":
            facts = facts_of_slurm(job.job_id, study)
        else:
            facts = facts_of_this_machine(study)
        self._start_run("drill-undisturbed", config, None)
        for how in interruptions_for(self._cluster, requeue=facts.requeue, time_limit=time_limit):
            self._start_run(how.run_name, how.prepare(config), how)
        return facts

    def _start_run(self, name: str, config: RunConfig, how: Interruption | None) -> None:
        run = Run(self._study, name)
        run.create(config)
        self.watched.append(Watched(run=run, how=how, job=self._submit(run)))

    def _submit(self, run: Run, task: Callable[[], None] | None = None) -> SubmittedJob:
        with signals_deferred():
            job = submit(run, self._cluster, task or task_of(run))
            self._jobs.append((run, job))
        return job

    def cancel(self) -> list[str]:
        """End every job, and wait until they are gone. Returns those that may not be, by id."""
        self._question.release()
        deadline = time.monotonic() + CANCEL_WAIT_S
        left = {run: [job.job_id] for run, job in self._jobs}
        with suppress(KeyboardInterrupt):  # whoever does not want to wait hears what is left
            ending = f"ending the drill's jobs, up to {CANCEL_WAIT_S:.0f} s"
            self._say(ending, ending)
            while left and time.monotonic() < deadline:
                # Again and again: Slurm may be away, and a process that only starts has not said
                # yet who it is.
                for _ in cancel_together([*left]):
                    pass  # whether it could be shows below
                time.sleep(1)
                alive = {run: self._may_live(run) for run in left}
                left = {run: job_ids for run, job_ids in alive.items() if job_ids}
        return [job_id for job_ids in left.values() for job_id in job_ids]

    def _may_live(self, run: Run) -> list[str]:
        """The jobs of a run that are not known to have ended, by id; it may have got new ones."""
        if self._cluster != "slurm":
            return [job.job_id for other, job in self._jobs if other == run and job.alive(run)]
        try:
            return [row.job_id for row in _live_jobs(run)]
        except SubmissionError:
            return [entry.job_id for entry in run.submissions()]

    def watch(self) -> NodeAnswer | None:
        """Interrupt the runs, and wait until their jobs are gone and the node has answered.

        Returns:
            The node's answer; None if its job has ended without one.

        Raises:
            SubmissionError: A job can never start, or Slurm does not answer for too long.
        """
        node: NodeAnswer | None = None
        asked_at, answered_at, silent = 0.0, time.monotonic(), ""
        while True:
            if node is None and (node := self._question.answer()):
                self._question.release()
            for watched in self.watched:
                self._look_at_folder(watched)
            if time.monotonic() - asked_at > ASK_SLURM_EVERY_S:
                asked_at = time.monotonic()
                try:
                    self._look_at_jobs()
                except SubmissionError as error:  # Slurm is away, or does not know yet
                    silent_s = asked_at - answered_at
                    if silent_s > HANGS_S:
                        raise
                    silent = f"; for {silent_s:.0f} s: {error}" if silent_s > SILENT_S else ""
                else:
                    answered_at, silent = asked_at, ""
                    self._check_that_jobs_can_start()
            # The probe's answer may come late over a network file system.
            probed = self._probe_gone_at and (
                node or time.monotonic() - self._probe_gone_at > GONE_S
            )
            if probed and all(watched.done for watched in self.watched):
                return node
            shown = [_state_and_words(watched) for watched in self.watched]
            if waits := self._probe_queued.waits:
                text = f"the probe of a node waits {waits.why}"
                shown.append((text, text))
            states, words = zip(*shown, strict=True)
            # For how long it has been silent is no news.
            unanswered = "; no answer" if silent else ""
            self._say("; ".join(states) + unanswered, "; ".join(words) + silent)
            time.sleep(POLL_S)

    def _look_at_folder(self, watched: Watched) -> None:
        """Interrupt the run once it trains, and note what becomes of that."""
        run = watched.run
        status = run.status()
        step = int(latest_values(run.metrics_file).get("step", 0))
        if watched.interrupted:
            ended = status.attempts[watched.interrupted - 1].ended
            if ended and watched.interrupted_at and watched.saved_s is None:
                watched.saved_s = time.monotonic() - watched.interrupted_at
            if len(status.attempts) == watched.interrupted:
                watched.reached = max(watched.reached, step)
        elif watched.how and (attempt := status.open_attempt):
            begun = attempt.first_step is not None and step >= attempt.first_step + STEPS_BEFORE
            if begun and run.last.exists():
                _interrupt(watched, watched.how, attempt)
        seen = (status.state, len(status.attempts), step)
        if seen != watched.last_seen or watched.queued.waits:
            watched.last_seen, watched.changed_at = seen, time.monotonic()

    def _look_at_jobs(self) -> None:
        """Find out which runs are done, and why the others wait."""
        if self._probe_gone_at is None and not self._probe_lives():
            self._probe_gone_at = time.monotonic()
        for watched in self.watched:
            if watched.done:
                continue
            if self._cluster == "slurm":
                live = _live_jobs(watched.run)
                alive = bool(live)
                watched.queued.look(live)
                self._expedite(watched, live)
            else:
                alive = watched.job.alive(watched.run)
            self._judge(watched, alive)

    def _probe_lives(self) -> bool:
        if self._cluster != "slurm":
            return self._jobs[0][1].alive(self._probe)
        live = _live_jobs(self._probe)
        self._probe_queued.look(live)
        return bool(live)

    def _expedite(self, watched: Watched, live: Sequence[JobRow]) -> None:
        """Let a job start that is only to wait for a while before it is started again."""
        for row in live:
            due = time.monotonic() - watched.expedited_at > EXPEDITE_EVERY_S
            if row.state == "PENDING" and row.reason == "BeginTime" and due:
                watched.expedited_at = time.monotonic()
                start_soon(row.job_id)

    def _check_that_jobs_can_start(self) -> None:
        """Raise a SubmissionError if one that has never run waits too long for what never comes.

        They all ask for the same, but for the time limit of one.
        """
        queued = [each.queued for each in self.watched if not each.run.status().attempts]
        for each in (self._probe_queued, *queued):
            if each.waits and each.never_starts:
                raise SubmissionError(f"a job of the drill waits {each.waits.why}")

    def _judge(self, watched: Watched, alive: bool) -> None:
        status = watched.run.status()
        still_s = time.monotonic() - watched.changed_at
        if alive:
            waits = watched.queued.waits
            if still_s > HANGS_S:
                watched.problem = f"nothing happened for {HANGS_S:.0f} s"
                cancel(watched.run)
            elif waits and watched.queued.never_starts and status.attempts:  # held since, say
                watched.problem = f"its job waits {waits.why}"
                cancel(watched.run)
        elif status.state in ("finished", "failed", "cancelled"):
            watched.done = True
        elif self._cluster == "slurm":
            if still_s > GONE_S:
                reconcile([watched.run])  # writes down how it ended
        elif watched.interrupted and watched.how and not watched.by_drill:
            # On this machine TERM is its user's, and nobody else notices that a job was killed.
            watched.by_drill = True
            watched.job = self._submit(watched.run)
        elif still_s > GONE_S:
            watched.problem = f"its job ended without a result, see {watched.job.log}"
            watched.done = True


def _live_jobs(run: Run) -> list[JobRow]:
    """Those jobs of a run that wait or run.

    Raises:
        SubmissionError: That is unknown of one.
    """
    answers = ask([identity_of(run, entry.job_id) for entry in run.submissions()]).values()
    if unknown := [answer.why for answer in answers if isinstance(answer, Unknown)]:
        raise SubmissionError(unknown[0])
    return [answer.newest for answer in answers if isinstance(answer, Known) and not answer.over]


def _interrupt(watched: Watched, how: Interruption, attempt: AttemptRecord) -> None:
    watched.interrupted = attempt.number
    if how.way != "time limit":  # that one comes by itself, nobody knows when
        watched.interrupted_at = time.monotonic()
    try:
        how.happen_to(attempt.job)
    except SubmissionError as error:
        watched.problem = f"could not be interrupted: {error}"


def _state_and_words(watched: Watched) -> tuple[str, str]:
    """The state of a run, and how far it is."""
    name = watched.how.way if watched.how else "undisturbed"
    status = watched.run.status()
    waits = watched.queued.waits
    state = f"waits {waits.why}" if waits else status.state
    if state != "running":
        return f"{name} {state}", f"{name} {state}"
    step = int(latest_values(watched.run.metrics_file).get("step", 0))
    return f"{name} {state}", f"{name} at step {step} of {status.total_steps or '?'}"
