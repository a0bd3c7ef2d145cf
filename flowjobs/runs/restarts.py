"""What the attempts so far say about starting a run once more. Knows no scheduler."""

from collections.abc import Sequence
from itertools import pairwise

from flowjobs.config import RestartConfig
from flowjobs.runs.status import AttemptRecord

# The words of `Outcome.kind`. "Always" means as long as attempts make progress (--give-up-after).
#
#   kind                                who says it                  started again
#   preempted, time limit               stop_cause, exit_cause       always
#   requeued                            stop_cause                   always, by Slurm itself
#   told to leave                       stop_cause                   always in Slurm; elsewhere it
#                                                                    was the user, and never
#   hung (no step ended in time)        entry                        always
#   launch failed (by srun)             exit_cause                   always
#   node failure, which it could leave  stop_cause                   always
#   node failure, which killed it       exit_cause                   with --retries, or by Slurm
#   lost GPU before the first step      exit_cause                   always, in a Slurm job of its
#                                                                    own
#   all others of TRANSIENT             exit_cause                   with --retries
#   no progress, diverged               runs/status                  never
#   exception                           runs/status, exit_cause      never
#   segmentation fault, aborted,        exit_cause                   never
#   bus error, signal, never started
#   cancelled                           stop_cause, exit_cause       never
#
# In the foreground and the debugger nothing is, nor, outside of Slurm, a job that was killed. Who
# acts by these words: entry, dead_jobs, reconcile, run_stages (all in jobs), runs/newest_job,
# sweeps/retry.

# Deaths that may pass: another node, or another hour, and the same step goes well.
TRANSIENT = frozenset(
    {
        *("node failure", "out of memory", "lost GPU", "lost connection", "file system", "killed"),
        "address in use",
    }
)


def attempts_without_progress(attempts: Sequence[AttemptRecord]) -> int:
    """How many attempts in a row, up to the last one that ended, brought the run no step further.

    An attempt made progress if the next one began at a later step: steps that it did and could not
    save do not count. So did one that prepared some of what the steps need. For the last one, which
    nothing followed yet, its own last step is used. A start by the run's user begins the count
    anew.

    Args:
        attempts: All attempts; a last one that has not ended is the one that asks.
    """
    count = 0
    following: int | None = None  # where the attempt after the one looked at started
    for attempt in reversed(attempts):
        if attempt.ended is not None:
            reached = attempt.last_step if following is None else following
            start = attempt.first_step
            if start is not None and reached is not None and reached > start:
                return count
            if attempt.prepared:
                return count
            count += 1
        if attempt.job.started_by_user:
            return count
        following = attempt.first_step if attempt.first_step is not None else following
    return count


def may_retry(attempts: Sequence[AttemptRecord], kind: str, restarts: RestartConfig) -> bool:
    """Whether a run whose newest attempt died of `kind` is started again.

    Args:
        attempts: All attempts; the last one is the one that died, whether that is noted or not.
        kind: How it died; see `TRANSIENT`.
        restarts: How often it may be, since the user started the run.
    """
    this = attempts[-1]
    in_own_job = this.job.cluster == "slurm" and not this.job.packed
    if kind == "lost GPU" and this.first_step is None and in_own_job:
        # As if the node had not launched it: a node whose GPU is broken is free again at once, and
        # one run of a sweep after another would end there.
        return attempts_without_progress(attempts) + 1 < restarts.give_up_after
    if kind not in TRANSIENT:
        return False
    spent = 0
    for following, attempt in pairwise(reversed(attempts)):
        if following.job.started_by_user:
            break
        if attempt.kind in TRANSIENT and attempt.ended is not None:
            spent += 1
            if attempt.kind == kind and attempt.last_step == this.last_step is not None:
                return False  # a bug after all: it comes back at the same step
    return spent < restarts.retries
