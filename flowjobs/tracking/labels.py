"""Tags and notes of a run in W&B: which are ours, and which are a person's and stay.

Ours are the tags below, and in the notes one paragraph: a line that begins with "flowjobs: " and
the quoted lines after it. They are never empty, since W&B's client does not send an empty list or
text, so that one could not be cleared.
"""

import re
from collections.abc import Sequence

from flowjobs.runs.status import Outcome, RunStatus

OUR_TAG = "flowjobs"
OUTCOME_TAGS = ("failed", "cancelled")
OUR_NOTES = re.compile(r"^flowjobs: .*\n?(?:^>.*\n?)*\n?", flags=re.MULTILINE)

# The end of a traceback names the error; W&B shows notes in a small box.
TRACEBACK_LINES = 40
LINE_CHARACTERS = 400


def tags_for(outcome: Outcome | None, there: Sequence[str]) -> tuple[str, ...]:
    """All tags of a run: a person's among those that are there, and ours.

    Args:
        outcome: How its newest attempt ended; None while it runs.
        there: The run's tags as W&B has them.
    """
    theirs = [tag for tag in there if tag != OUR_TAG and tag not in OUTCOME_TAGS]
    ours = [OUR_TAG]
    if outcome is not None and outcome.state in OUTCOME_TAGS:
        ours.append(outcome.state)
    return (*theirs, *ours)


def notes_for(outcome: Outcome | None, there: str, status: RunStatus | None) -> str:
    """The run's notes: ours, anew, and below them what a person wrote.

    Args:
        outcome: How the newest attempt ended; None while it runs.
        there: The run's notes as W&B has them.
        status: The run's status, for where the attempt was and where its log is.
    """
    state = "running" if outcome is None else outcome.state
    reason = outcome.reason if outcome is not None else ""
    head, *details = (f"{state}: {reason}" if reason else state).splitlines()
    if status is not None and status.attempts:
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
    ours = [f"flowjobs: {head}", *(f"> {line}" for line in details)]
    theirs = OUR_NOTES.sub("", there or "").strip("\n")
    text = "\n".join(line[:LINE_CHARACTERS] for line in ours)
    return f"{text}\n\n{theirs}" if theirs else text
