"""Tags and notes of a run in W&B: which are ours, and which are a person's and stay.

Ours are the tags below, and in the notes one paragraph: a line that begins with "flowjobs: " and
the quoted lines after it, but for what a person has written into it. They are never empty, since
W&B's client does not send an empty list or text, so that one could not be cleared.
"""

from collections.abc import Collection, Sequence

from flowjobs.runs.run import Run
from flowjobs.runs.status import Outcome, RunStatus

OUR_TAG = "flowjobs"
OUTCOME_TAGS = ("failed", "cancelled")
OUR_HEAD = "flowjobs: "

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


def renewed_notes(run: Run, outcome: Outcome | None, there: str) -> str:
    """The run's notes: ours, anew, and below them what a person wrote.

    Notes in the run's folder each line that is ours, so that a person's can be told from them. The
    caller holds the `upload_lock`.

    Args:
        run: The run; its status says where the attempt was and where its log is.
        outcome: How the newest attempt ended; None while it runs.
        there: The run's notes as W&B has them.

    Raises:
        OSError: The lines cannot be noted.
    """
    file = run.folder / "wandb" / "notes.txt"
    said = file.read_text(errors="replace").splitlines() if file.exists() else []
    ours = our_lines(outcome, run.status())
    if not set(ours) <= set(said):
        with file.open("a", errors="replace") as notes:
            notes.writelines(f"{line}\n" for line in ours)
    theirs = their_notes(there, said)
    return "\n".join([*ours, "", theirs] if theirs else ours)


def our_lines(outcome: Outcome | None, status: RunStatus | None) -> list[str]:
    """Our paragraph: the state and its reason, the place, the log, the end of the traceback."""
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
    ours = [f"{OUR_HEAD}{head}", *(f"> {line}" for line in details)]
    return [line[:LINE_CHARACTERS].rstrip() for line in ours]


def their_notes(there: str, said: Collection[str]) -> str:
    """What a person wrote: all but our paragraph, and what was added in and to its lines.

    Args:
        there: The run's notes as W&B has them.
        said: Every line that we ever wrote; none if that is not known any more.
    """
    theirs: list[str] = []
    in_ours = False
    for line in there.splitlines():
        if in_ours and not line.strip():  # the blank line after it
            in_ours = False
            if any(theirs[-1:]):
                theirs.append("")
            continue
        in_ours = in_ours or line.startswith(OUR_HEAD)
        remark = _remark(line.rstrip(), said) if in_ours else line
        if remark or not in_ours:
            theirs.append(remark)
    return "\n".join(theirs).strip("\n")


def _remark(line: str, said: Collection[str]) -> str:
    """What of a line in our paragraph is a person's."""
    if line in said or (not said and line.startswith((OUR_HEAD, ">"))):
        return ""
    begins = [own for own in said if own.strip("> ") and line.startswith(own)]
    return line.removeprefix(max(begins, key=len, default="")).strip()
