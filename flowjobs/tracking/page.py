"""What a run's page in W&B shows: its config, summary, tags and notes. Loads no wandb.

All of it is read from the run's folder, so that whoever tells W&B tells the same. Some of the tags
and notes are ours, and its user's stay. Ours are the tags below, and in the notes one paragraph:
a line that begins with "flowjobs: " and the quoted lines after it, written anew each time. They are
never empty, since W&B's client does not send an empty list or text, so that one could not be
cleared.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from flowjobs.errors import ConfigError
from flowjobs.runs.code import code_of
from flowjobs.runs.files import read_json
from flowjobs.runs.metrics import read_rows
from flowjobs.runs.run import Run
from flowjobs.runs.status import Outcome, RunStatus
from flowjobs.runs.surroundings import surroundings_of

# Metrics whose lowest value a run is judged by.
LOWEST = ("train/loss", "val/loss")
# How much of a diff W&B's config has; the whole is in the run's folder.
DIFF_LIMIT_BYTES = 20_000

OUR_TAG = "flowjobs"
OUTCOME_TAGS = ("failed", "cancelled")
OUR_HEAD = "flowjobs: "
OUR_PARAGRAPH = re.compile(rf"^{OUR_HEAD}.*(?:\n>.*)*\n*", re.MULTILINE)
# The end of a traceback names the error; W&B shows notes in a small box.
TRACEBACK_LINES = 40
LINE_CHARACTERS = 400


def config_for_wandb(run: Run) -> dict[str, Any]:
    """What it takes to reproduce a run: its training config, where its attempts were, its code."""
    config = run.config().training
    status = run.status()
    return {
        **config.to_dict(),
        **surroundings_of(run),
        **_code(run),
        "signature": config.signature,
        "run_folder": str(run.folder),
        "extensions": status.extensions,
        "attempts": [
            {
                "attempt": attempt.number,
                "cluster": attempt.job.cluster,
                "job_id": attempt.job.job_id,
                "host": attempt.job.host,
            }
            for attempt in status.attempts
        ],
    }


def _code(run: Run) -> dict[str, Any]:
    """What the run keeps of its code: known by that, not by what is checked out at an attempt."""
    try:
        code = code_of(run)
        if code is None:
            return {}
        diff = run.code_diff_file.read_bytes()
    except (ConfigError, OSError):
        return {}  # the attempt says so itself
    cut = f"\n(cut: see {run.code_diff_file})" if len(diff) > DIFF_LIMIT_BYTES else ""
    return {
        "code": code.digest,
        "code_earlier": list(code.earlier),
        "git_commit": code.git_commit,
        "git_dirty": code.git_dirty,
        "git_diff": diff[:DIFF_LIMIT_BYTES].decode(errors="replace") + cut,
    }


def summary_of(run: Run) -> dict[str, Any]:
    """The lowest losses, the newest of all else that rows hold, and what the run came to.

    Each session says it whole: wandb itself knows only the rows of a session of its own.
    """
    summary: dict[str, Any] = {}
    for row in read_rows(run.metrics_file):
        for key, value in row.items():
            if key in LOWEST:
                summary[key] = {"min": min(value, summary.get(key, {}).get("min", value))}
            elif key != "step":
                summary[key] = value
    status = run.status()
    summary |= {"parameters": status.parameters, "flops_per_sample": status.flops_per_sample}
    if status.state == "finished":
        summary |= {"final_epoch": status.epoch - 1, "best_val_loss": status.best_val_loss}
        summary |= {"checkpoint_path": str(run.best)}
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or damaged
        found = read_json(run.evaluation_file)
        if not run.is_outdated(found):
            summary["eval/n"] = found["n"]
            for name, of in found["measures"].items():
                summary |= {f"eval/{name}": of["value"], f"eval/{name}/floor": of["floor"]}
    return {key: value for key, value in summary.items() if value is not None}


def is_of_an_end(key: str) -> bool:
    """Whether a value of the summary is there only once the run has finished, or was measured."""
    return key.startswith("eval/") or key in ("final_epoch", "best_val_loss", "checkpoint_path")


def labels_for(
    outcome: Outcome | None, status: RunStatus, tags: Sequence[str], notes: str
) -> tuple[tuple[str, ...], str]:
    """The run's tags, and its notes: ours, anew, and all else that is there.

    Args:
        outcome: How the newest attempt ended; None while it runs.
        status: Says where the attempt was and where its log is.
        tags: The run's tags as W&B has them.
        notes: Its notes.
    """
    their_tags = [tag for tag in tags if tag != OUR_TAG and tag not in OUTCOME_TAGS]
    our_tags = [OUR_TAG]
    if outcome is not None and outcome.state in OUTCOME_TAGS:
        our_tags.append(outcome.state)
    lines = our_lines(outcome, status)
    their_notes = OUR_PARAGRAPH.sub("", notes).strip("\n")
    all_notes = "\n".join([*lines, "", their_notes] if their_notes else lines)
    return (*their_tags, *our_tags), all_notes


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
    if status.diverged_after is not None:
        details.append(
            f"past step {status.diverged_after:,} work was lost and repeated with other values; of "
            "a step that W&B had by then it keeps the first row, metrics.jsonl has those that count"
        )
    ours = [f"{OUR_HEAD}{head}", *(f"> {line}" for line in details)]
    return [line[:LINE_CHARACTERS].rstrip() for line in ours]
