"""Which tags and notes are ours, and which are a person's."""

import pytest

from flowjobs.runs.status import AttemptRecord, JobInfo, Outcome, RunStatus
from flowjobs.tracking.page import LINE_CHARACTERS, labels_for, our_lines

FAILED = Outcome(
    "failed", 1, "ValueError: the bug", "Traceback:\n" + "  deep\n" * 50 + "ValueError"
)
CANCELLED = Outcome("cancelled", 130, "interrupted by Ctrl-C")
JOB = JobInfo("slurm", "12_3", "/logs/12_3.out", "n3", 1)
STATUS = RunStatus(step=12_400, attempts=[AttemptRecord(4, JOB, "then")])


def tags_for(outcome: Outcome | None, there: tuple[str, ...]) -> tuple[str, ...]:
    return labels_for(outcome, STATUS, there, "")[0]


def notes_for(outcome: Outcome | None, status: RunStatus, there: str) -> str:
    return labels_for(outcome, status, (), there)[1]


NOTES = notes_for(FAILED, STATUS, "")


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


@pytest.mark.parametrize(
    ("there", "theirs"),
    [
        ("", ""),
        (NOTES, ""),
        ("mine", "mine"),
        (f"{NOTES}\n\nmine\n> quoted by hand", "mine\n> quoted by hand"),
        (f"first\n\n\nsecond\n\n{NOTES}\n\nlast", "first\n\n\nsecond\n\nlast"),
    ],
)
def test_what_a_person_wrote_beside_our_paragraph_stays(there: str, theirs: str) -> None:
    notes = notes_for(CANCELLED, RunStatus(), there)
    assert notes == "\n\n".join(
        filter(None, ["flowjobs: cancelled: interrupted by Ctrl-C", theirs])
    )
    assert notes_for(CANCELLED, RunStatus(), notes) == notes


def test_a_long_reason_of_several_lines_is_all_ours() -> None:
    reason = "no data\nthere are:\n\n  a, b\n" + "x" * 10_000
    notes = notes_for(Outcome("failed", 2, reason), RunStatus(diverged_after=1200), "mine")
    assert max(map(len, notes.splitlines())) <= LINE_CHARACTERS
    assert "> past step 1,200 work was lost" in notes
    assert notes_for(None, RunStatus(), notes) == "flowjobs: running\n\nmine"
