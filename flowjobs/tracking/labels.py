"""Tags and notes of a run in W&B: which are ours, and which are its user's and stay.

Ours are the tags below, and in the notes one paragraph: a line that begins with "flowjobs: " and
the quoted lines after it, written anew each time. They are never empty, since W&B's client does not
send an empty list or text, so that one could not be cleared.
"""

import re
from collections.abc import Sequence

from flowjobs.runs.status import Outcome, RunStatus

OUR_TAG = "flowjobs"
OUTCOME_TAGS = ("failed", "cancelled")
OUR_HEAD = "flowjobs: "
OUR_PARAGRAPH = re.compile(rf"^{OUR_HEAD}.*(?:\n>.*)*\n*", re.MULTILINE)

# The end of a traceback names the error; W&B shows notes in a small box.
TRACEBACK_LINES = 40
LINE_CHARACTERS = 400


def tags_for(outcome: Outcome | None, there: Sequence[str]) -> tuple[str, ...]:
    """All tags of a run: its user's among those that are there, and ours.

    Args:
        outcome: How its newest attempt ended; None while it runs.
        there: The run's tags as W&B has them.
    """
    theirs = [tag for tag in there if tag != OUR_TAG and tag not in OUTCOME_TAGS]
    ours = [OUR_TAG]
    if outcome is not None and outcome.state in OUTCOME_TAGS:
        ours.append(outcome.state)
    return (*theirs, *ours)


def notes_for(
    outcome: Outcome | None, status: RunStatus, there: str, diverged_after: int | None = None
) -> str:
    """The run's notes: our paragraph, anew, and below it all else that is there.

    Args:
        outcome: How the newest attempt ended; None while it runs.
        status: Says where the attempt was and where its log is.
        there: The run's notes as W&B has them.
        diverged_after: The step past which W&B may have rows that do not count.
    """
    lines = our_lines(outcome, status)
    if diverged_after is not None:
        lines.append(
            f"> past step {diverged_after:,} work was lost and repeated with other values; W&B "
            "keeps the first row of a step, metrics.jsonl has the ones that count"
        )
    theirs = OUR_PARAGRAPH.sub("", there).strip("\n")
    return "\n".join([*lines, "", theirs] if theirs else lines)


def our_lines(outcome: Outcome | None, status: RunStatus) -> list[str]:
    """Our paragraph: the state and its reason, the place, the log, the end of the traceback."""
    state = "running" if outcome is None else outcome.state
    reason = outcome.reason if outcome is not None else ""
    head, *details = (f"{state}: {reason}" if reason else state).splitlines()
    if status.attempts:
        attempt = status.attempts[-1]
        job = "in the foreground"
        if attempt.job.cluster != "none":
            job = f"{attempt.job.cluster} job {attempt.job.job_id}"
        details.append(f"attempt {attempt.number}, {job} on {attempt.job.host}")
        if outcome is not None:
            details[-1] += f", step {status.step:,}"
        details.append(f"log: {attempt.job.log or 'none'}")
    if outcome is not None:
        details += outcome.traceback.splitlines()[-TRACEBACK_LINES:]
    ours = [f"{OUR_HEAD}{head}", *(f"> {line}" for line in details)]
    return [line[:LINE_CHARACTERS].rstrip() for line in ours]
