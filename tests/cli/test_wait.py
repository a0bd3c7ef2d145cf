"""Watching runs of which nothing can be said."""

import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from flowjobs.cli import follow, status, wait
from flowjobs.cli.defaults import Defaults
from flowjobs.config import TrainingConfig
from flowjobs.errors import SubmissionError
from flowjobs.runs.lock import RunLock
from flowjobs.runs.status import JobInfo
from flowjobs.sweeps.grid import Sweep, run_names_of
from flowjobs.sweeps.saved import save_sweep
from tests.cli.test_many import failed, without_checkpoints
from tests.report.made_up import made_run


def test_wait_ends_however_long_another_run_was_unknown_or_gone_before_the_last_ends(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lives = failed(study, "lives", "killed")  # and its process is about to end
    lives.add_submission(lives.status().attempts[-1].job.job_id, "local", None)
    without_checkpoints(study, "gone")
    unknown, removed, damaged = (
        without_checkpoints(study, name) for name in ("unknown", "removed", "damaged")
    )
    for run in (unknown, removed, damaged):
        run.checkpoints.rmdir()
        run.checkpoints.symlink_to("/not/mounted")
    config, lock = damaged.config_file.read_text(), unknown.folder / ".lock-holder.json"
    looks: list[float] = []

    def look_again(pause_s: float) -> None:
        looks.append(pause_s)
        assert len(looks) < 200, capsys.readouterr().out
        match len(looks):
            case 2:
                shutil.rmtree(removed.folder)
                damaged.config_file.write_text("")  # as a file server that is away for a moment
                lock.symlink_to(lock)
                unknown.cancel_file.symlink_to(unknown.cancel_file)
            case 3:
                lock.unlink()
                unknown.cancel_file.unlink()
                damaged.config_file.write_text(config)
            case 10:
                holder.__exit__(None, None, None)
                left.append(seconds())

    def seconds() -> float:  # a look takes long where Slurm does not answer
        return 60.0 * len(looks)

    left: list[float] = []
    clock = SimpleNamespace(sleep=look_again, monotonic=seconds, strftime=time.strftime)
    monkeypatch.setattr(wait, "time", clock)
    holder = RunLock(lives.folder, JobInfo.in_foreground())
    holder.__enter__()
    assert wait.Wait(names=("*",), study=study).run(Defaults()) == 1
    # The others may be seen again: a controller restarts, a file server is away.
    assert wait.UNKNOWN_AT_MOST_S <= seconds() - left[0] <= wait.UNKNOWN_AT_MOST_S + 120
    said = capsys.readouterr().out
    assert "1 running, " in said
    assert re.search("3 unknown; damaged has trained 5 steps, .* …$", said, re.MULTILINE)
    assert "waiting" not in said
    assert "failed: gone, lives (checkpoints gone, killed)" in said
    assert f"no run removed in {study}" in said
    assert f"unknown: damaged, removed, {unknown.name}" in said


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("s", 2),
        ("s flow=icfm", 0),
        ("s seed=0", 2),
        ("sweep=s seed=0 seed=1 flow=icfm", 0),
        ("s state=finished", 0),  # what was never made is in no state
        ("s retries=0", 2),  # with how many it would be made, the study does not say
    ],
)
def test_wait_asks_for_what_was_never_made_of_a_sweep_only_where_it_is_meant(
    study: Path, words: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = Sweep(grid={"flow": ["icfm", "otcfm"], "seed": [0, 1]})
    configs = [TrainingConfig(**point) for point in sweep.points()]
    names = run_names_of(configs)
    save_sweep(study, "s", sweep, names)
    for name, config in zip(names[:2], configs[:2], strict=True):
        made_run(study, [1.0] * 3, name=name, flow=config.flow, seed=config.seed)
    assert wait.Wait(names=tuple(words.split()), study=study).run(Defaults()) == code
    said = capsys.readouterr().err
    assert said.startswith("error: of the sweep, not in the study: mlp-otcfm") if code else not said
    assert status.Status(names=tuple(words.split()), study=study).run(Defaults()) == 0
    assert ("not in the study: mlp-otcfm" in capsys.readouterr().out) is bool(code)


def test_who_follows_a_job_of_which_nothing_is_known_hears_why_and_is_not_kept_for_ever(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = failed(study, "a", "killed")
    looks: list[float] = []

    def alive() -> bool:
        if len(looks) == 2:  # what trains needs no word of Slurm
            run.metrics_file.write_text('{"step": 5}\n')
        raise SubmissionError("Slurm does not answer")

    monkeypatch.setattr(follow, "ASK_SLURM_EVERY_S", 0.0)
    monkeypatch.setattr(time, "sleep", looks.append)
    with pytest.raises(SubmissionError, match=r"no longer watching: .* status a looks"):
        follow.follow(run, 1, alive, requeues=True)
    assert len(looks) == 2 + follow.UNKNOWN_AT_MOST
    assert "Slurm does not answer" in capsys.readouterr().out
