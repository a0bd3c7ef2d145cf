"""Which tags and notes are ours, and which are a person's."""

from pathlib import Path

import pytest

from flowjobs.runs.run import Run
from flowjobs.runs.status import AttemptRecord, JobInfo, Outcome, RunStatus
from flowjobs.tracking.labels import (
    LINE_CHARACTERS,
    our_lines,
    renewed_notes,
    tags_for,
    their_notes,
)

FAILED = Outcome(
    "failed", 1, "ValueError: the bug", "Traceback:\n" + "  deep\n" * 50 + "ValueError"
)
CANCELLED = Outcome("cancelled", 130, "interrupted by Ctrl-C")
JOB = JobInfo("slurm", "12_3", "/logs/12_3.out", "n3", 1)
STATUS = RunStatus(step=12_400, attempts=[AttemptRecord(4, JOB, "then")])


def test_a_persons_tags_stay_and_ours_follow_the_outcome() -> None:
    assert tags_for(None, ()) == ("flowjobs",)
    assert tags_for(FAILED, ("mine", "flowjobs")) == ("mine", "flowjobs", "failed")
    assert tags_for(None, ("failed", "mine")) == ("mine", "flowjobs")
    assert tags_for(CANCELLED, ("failed", "flowjobs")) == ("flowjobs", "cancelled")


def test_notes_name_the_reason_the_place_and_the_log() -> None:
    lines = our_lines(FAILED, STATUS)
    assert lines[:3] == [
        "flowjobs: failed: ValueError: the bug",
        "> attempt 4, slurm job 12_3 on n3, step 12,400",
        "> log: /logs/12_3.out",
    ]
    assert lines[-1] == "> ValueError"
    assert len(lines) < 50


OURS = our_lines(FAILED, STATUS)
NOTES = "\n".join(OURS)


@pytest.mark.parametrize("said", [OURS, []], ids=["remembered", "not remembered"])
def test_a_persons_notes_stay_above_and_below_ours(said: list[str]) -> None:
    theirs = "read this first\n\n\nand this\n\n> quoted by hand\nand the end"
    there = theirs.replace("\n\n> quoted", f"\n\n{NOTES}\n\n> quoted")
    assert their_notes(there, said) == theirs
    assert their_notes(theirs, said) == theirs
    assert their_notes(NOTES, said) == ""


@pytest.mark.parametrize(
    ("there", "theirs"),
    [
        (f"{NOTES} seen", "seen"),
        (f"{NOTES}\n> quoted by hand", "> quoted by hand"),
        (f"{NOTES}\nright below", "right below"),
        (NOTES.replace("the bug", "the bug: mine!"), ": mine!"),
        (NOTES.replace("> log", "in the middle\n> log"), "in the middle"),
        (f"first\n\n{NOTES} seen\n\nlast", "first\n\nseen\n\nlast"),
    ],
)
def test_what_a_person_wrote_into_our_paragraph_stays(there: str, theirs: str) -> None:
    assert their_notes(there, OURS) == theirs


def test_a_long_reason_of_several_lines_is_all_ours() -> None:
    reason = "no data\nthere are:\n\n  a, b\n" + "x" * 10_000
    ours = our_lines(Outcome("failed", 2, reason), None)
    assert max(map(len, ours)) <= LINE_CHARACTERS
    there = "\n".join([*ours, "", "mine"])
    assert their_notes(there, ours) == their_notes(there, []) == "mine"


def test_lines_of_earlier_attempts_are_known_to_be_ours(study: Path) -> None:
    run = Run(study, "noted")
    (run.folder / "wandb").mkdir(parents=True)
    failed = renewed_notes(run, FAILED, "")
    assert renewed_notes(run, None, f"{failed} seen") == "flowjobs: running\n\nseen"
    # As where an attempt's own notes never reached W&B, which has those of the one before.
    assert renewed_notes(run, CANCELLED, f"{failed} seen").endswith("Ctrl-C\n\nseen")
