"""Which tags and notes are ours, and which are a person's."""

from flowjobs.runs.status import AttemptRecord, JobInfo, Outcome, RunStatus
from flowjobs.tracking.labels import LINE_CHARACTERS, notes_for, tags_for

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
    lines = notes_for(FAILED, "", STATUS).splitlines()
    assert lines[:3] == [
        "flowjobs: failed: ValueError: the bug",
        "> attempt 4, slurm job 12_3 on n3, step 12,400",
        "> log: /logs/12_3.out",
    ]
    assert lines[-1] == "> ValueError"
    assert len(lines) < 50


def test_a_persons_notes_stay_wherever_they_are() -> None:
    notes = notes_for(FAILED, "", STATUS)
    above_and_below = f"read this first\n\n{notes}\n\n> quoted by hand\nand this"
    after = notes_for(None, above_and_below, STATUS)
    assert after.startswith("flowjobs: running\n> attempt 4, ")
    assert "the bug" not in after
    assert after.endswith("\n\nread this first\n\n> quoted by hand\nand this")
    assert notes_for(None, after, STATUS) == after


def test_a_long_reason_of_several_lines_is_all_ours() -> None:
    reason = "no data\nthere are:\n\n  a, b\n" + "x" * 10_000
    notes = notes_for(Outcome("failed", 2, reason), "mine", None)
    assert max(map(len, notes.splitlines())) <= LINE_CHARACTERS
    assert notes_for(None, notes, None) == "flowjobs: running\n\nmine"
