"""`status` over many runs, `show` and `logs`: what is seen of a study, which stays as it is."""

import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from flowjobs.cli.defaults import Defaults
from flowjobs.cli.main import run as run_command
from flowjobs.cli.output import NewLines
from flowjobs.cli.overview import UNKNOWN_AT_MOST
from flowjobs.cli.status import Status
from flowjobs.errors import ConfigError, RunNotFoundError
from flowjobs.field_values import KeyValues
from flowjobs.jobs.run_stages import overview, silence
from flowjobs.runs.goodput import time_spent
from flowjobs.runs.listing import cache_folder, glances
from flowjobs.runs.run import Run
from flowjobs.runs.status import AttemptRecord, JobInfo, RunStatus
from tests.conftest import Command
from tests.report.made_up import made_run


def many(study: Path, count: int = 210) -> None:
    """Finished runs of two groups, two that failed, one damaged, one that was never submitted."""
    for number in range(count):
        group = "widths" if number % 3 else "flows"
        made_run(study, [1.0] * 3, name=f"{group}-{number:03}", group=group)
    for number in range(2):
        made_run(study, [1.0], "failed", name=f"bad-{number}", group="flows")
    made_run(study, [1.0] * 3, name="torn", group="flows").status_file.write_text("{")
    made_run(study, name="new", group="widths")


def here(run: Run, pid: int) -> None:
    """Have a process of this machine train the run."""
    status = json.loads(run.status_file.read_text())
    job = {"cluster": "local", "job_id": str(pid), "host": socket.gethostname(), "pid": pid}
    status["attempts"][0]["job"] |= job
    status["updated"] = "2025-01-01T00:02:00+00:00"
    run.status_file.write_text(json.dumps(status))


def test_a_dead_run_is_shown_as_dead_and_a_living_one_with_its_time_left(
    flowjobs: Command, study: Path
) -> None:
    for number in range(20):
        made_run(study, [1.0] * 3, name=f"done-{number}", group="old")
    here(made_run(study, [1.0], "running", name="alive", epochs=2), os.getpid())
    here(made_run(study, [1.0], "running", name="dead"), 2**22 - 1)
    before = tree(study)
    head, ablation, old, *trouble = flowjobs("status").stdout.splitlines()
    assert head.split()[2:] == ["finished", "running", "waiting", "failed", "left"]
    # Two epochs took four minutes, and one is left to do.
    assert ablation.split() == ["ablation", "━" * 8 + "─" * 12, "2", "1", "1", "about", "2", "min"]
    assert old.split()[2:] == ["20", "20"]
    assert len(trouble) == 1
    assert trouble[0].startswith("dead failed: ")
    assert tree(study) == before


def test_a_run_that_hangs_is_told_of_and_its_speed_is_not(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long_ago = time.time() - 4 * 3600 - 600
    hangs, lives, draws, patient = (
        made_run(study, losses, "running", name=name)
        for name, losses in {
            "hangs": [1.0],
            "lives": [1.0],
            "draws": [1.0] * 3,  # of three epochs
            "patient": [0.5, 1.0],  # and to no avail
        }.items()
    )
    status = patient.status()
    status.patience = 1
    status.write(patient.status_file)
    for run in (hangs, draws, patient):
        here(run, os.getpid())  # with a status of long ago
        os.utime(run.metrics_file, (long_ago, long_ago))
    here(lives, os.getpid())
    assert run_command(["status", "--json"]) == 0
    found = {run["run"]: run for run in json.loads(capsys.readouterr().out)}
    assert {name for name, run in found.items() if run["silent"]} == {"hangs"}
    assert (found["hangs"]["steps_per_s"], found["hangs"]["left_s"]) == (None, None)
    assert found["lives"]["left_s"] is not None
    assert run_command(["status", "hangs"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^hangs: nothing heard of it for 4 h 10 min, on \S+$", said, re.MULTILINE)
    by_name = {each.glance.name: each for each in overview(study, glances(study), {})[0].standings}
    assert {name for name, each in by_name.items() if each.needs_action} == {"hangs"}
    assert "nothing heard" in by_name["hangs"].why
    # Slurm may take such a job from its node; the one of a pack, others with it.
    slurm = JobInfo("slurm", "6", "6.out", "n7", 1)
    for job, told in ((slurm, True), (replace(slurm, packed=True), False)):
        status = hangs.status()
        status.attempts[0].job, status.updated = job, "2025-01-01T00:02:00+00:00"
        words = silence(hangs, status)
        assert "logs hangs" in words
        assert ("`scontrol requeue 6` starts it" in words) == told


@pytest.mark.parametrize("command", [("status",), ("show", "a"), ("report",)])
def test_what_is_no_number_is_null_in_json(
    study: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    made_run(study, [math.nan], name="a", arch_args=KeyValues(most=math.inf))
    assert run_command([*command, "--json"]) == 0
    json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


@pytest.mark.parametrize("text", [b"\xff\xfe", None])
def test_a_sweep_whose_list_of_runs_cannot_be_read_hides_no_other(
    flowjobs: Command, study: Path, text: bytes | None
) -> None:
    for name in "abc":
        made_run(study, [1.0] * 3, name=name)
    (study / "sweeps").mkdir()
    (study / "sweeps/whole.runs").write_text("a\nb\n")
    damaged = study / "sweeps/damaged.runs"
    damaged.mkdir() if text is None else damaged.write_bytes(text)
    done = flowjobs("status")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[1:3]] == ["whole", "ablation"]
    assert f"{damaged} cannot be read" in done.stderr
    named = flowjobs("status", "damaged")
    assert (named.returncode, named.stderr.startswith("error: ")) == (2, True), named.stderr
    assert f"{damaged} cannot be read" in named.stderr


def test_a_run_that_cannot_be_looked_at_is_unknown_and_hides_no_other(
    flowjobs: Command, study: Path
) -> None:
    made_run(study, [1.0] * 3, name="a")
    # Any error of the file system but "there is none": as of a server that is away.
    (study / "runs/away").symlink_to("away")
    # On a scratch that is not mounted here, or was purged.
    (study / "runs/purged").symlink_to("/no-scratch/purged")
    (study / "runs/empty").mkdir()
    (study / "runs/a-file").touch()
    (study / "sweeps").mkdir()
    (study / "sweeps/all.runs").write_text("a\naway\npurged\n")
    assert {glance.name: glance.state for glance in glances(study)} == {
        "a": "finished",
        "away": "unknown",
        "purged": "unknown",
    }
    done = flowjobs("status", "all")
    assert (done.returncode, done.stderr.count("away: [Errno ")) == (0, 1), done.stderr
    said = f"error: purged: {study}/runs/purged is a link to /no-scratch/purged, which is not there"
    assert done.stderr.count(said) == 1, done.stderr
    lines = [line.split()[:2] for line in done.stdout.splitlines()]
    unknown = [["away", "unknown"], ["purged", "unknown"]]
    assert lines == [["run", "state"], ["a", "finished"], *unknown]
    named = flowjobs("show", "away")
    assert (named.returncode, "Too many levels of symbolic links" in named.stderr) == (2, True)


@pytest.mark.parametrize("command", ["status", "status --json", "status a", "sync", "reconcile"])
def test_a_study_behind_a_link_that_leads_nowhere_is_not_one_without_runs(
    study: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for link in (study / "runs", study):
        study.mkdir(exist_ok=True)
        if link == study:
            study.rmdir()
        link.symlink_to("/no-scratch/me")
        with pytest.raises(ConfigError, match=f"^{link} is a link to /no-scratch/me, which is not"):
            run_command(command.split())
        link.unlink()
    if command != "status a":
        run_command(command.split())
        assert capsys.readouterr().err == f"there are no runs in {study}\n"


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_many_runs_are_a_line_a_group_and_what_needs_action(flowjobs: Command, study: Path) -> None:
    many(study)
    before = tree(study)
    done = flowjobs("status")
    head, flows, widths, *trouble = done.stdout.splitlines()
    assert head.split() == [
        "group",
        "of",
        "finished",
        "running",
        "waiting",
        "new",
        *head.split()[6:],
    ]
    assert head.split()[6:] == ["failed", "unknown"]
    assert flows.split() == ["flows", "━" * 19 + "─", "73", "70", "2", "1"]
    assert widths.split()[2:] == ["141", "140", "1"]
    reason = "failed: out of memory: 1.5 of 1.5 GiB"
    assert trouble[:2] == [f"bad-0 {reason}", f"bad-1 {reason}"]
    assert trouble[2] == "new new: never submitted"
    assert trouble[3].startswith("torn unknown: ")
    assert str(study / "runs/torn") in trouble[3]
    assert done.returncode == 0
    assert tree(study) == before  # looking changes nothing
    assert len(flowjobs("status", "--runs").stdout.splitlines()) > 210
    few = flowjobs("status", "group=flows").stdout.splitlines()
    assert few[0].startswith("run ")


def test_a_sweep_has_a_line_with_what_is_not_made_yet(study: Path) -> None:
    many(study, count=3)
    (study / "sweeps").mkdir()
    (study / "sweeps/first.runs").write_text("widths-001\nbad-1\nlater\n")
    groups = {group.name: group for group in overview(study, glances(study), {})}
    first = groups["first"]
    assert (first.total, first.missing) == (3, 1)
    assert dict(first.counts) == {"finished": 1, "failed": 1}
    assert first.progress == pytest.approx((1 + 1 / 3) / 3)
    assert [len(groups[name].standings) for name in ("flows", "widths")] == [3, 2]


def test_the_index_is_a_cache(study: Path, tmp_path: Path) -> None:
    many(study)
    for file in study.glob("runs/*/*.json*"):
        os.utime(file, (1_700_000_000, 1_700_000_000))  # else they are too new to be trusted
    first = glances(study)
    [index] = cache_folder().glob("index-*.json")
    assert str(cache_folder()).startswith(str(tmp_path))
    assert glances(study) == first
    # What could not be read may be readable again, and no file tells: it is looked at each time.
    assert {*json.loads(index.read_text())["runs"]} == {g.name for g in first} - {"torn"}
    # It is used: what it says of an unchanged run is what is seen.
    index.write_text(index.read_text().replace("1.5 of 1.5 GiB", "told by the index"))
    assert next(glance.reason for glance in glances(study)) == "out of memory: told by the index"
    # A run that has changed is read again, one that is gone is forgotten.
    run = Run(study, "bad-0")
    status = json.loads(run.status_file.read_text())
    run.status_file.write_text(json.dumps({**status, "state": "finished", "epoch": 3}))
    assert {g.name: g.state for g in glances(study)}["bad-0"] == "finished"
    for content in ("{", '{"version": 0}', "[]", "null"):
        index.write_text(content)
        assert len(glances(study)) == len(first)
    index.unlink()
    cache_folder().rmdir()
    cache_folder().touch()  # no folder can be made there
    assert len(glances(study)) == len(first)


def test_watching_ends_with_the_runs_and_repeats_no_line(flowjobs: Command, study: Path) -> None:
    made_run(study, [1.0] * 3, name="a")
    made_run(study, [1.0], "failed", name="b")
    assert flowjobs("status", "--watch").stdout == flowjobs("status").stdout
    # Nothing starts these by itself: two were interrupted, one was never submitted.
    made_run(study, [1.0], "preempted", name="stopped")
    left = made_run(study, [1.0], "preempted", name="left")
    here(left, 2**22 - 1)
    left.add_submission(str(2**22 - 1), "local", None)
    made_run(study, name="new")
    assert flowjobs("status", "--watch", timeout_s=240).stdout == flowjobs("status").stdout
    assert flowjobs("status", "stopped", "--watch", timeout_s=240).returncode == 0
    done = flowjobs("status", "--watch", "--json")
    assert (done.returncode, "expected one of them" in done.stderr) == (2, True)


def test_watching_ends_with_a_word_where_it_stays_unknown_what_runs(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_run(study, [1.0] * 3, name="a").status_file.write_text("{")
    looks: list[float] = []
    monkeypatch.setattr(time, "sleep", looks.append)
    assert Status(("a*",), watch=True, study=study).run(Defaults()) == 0
    assert len(looks) == UNKNOWN_AT_MOST - 1
    broken, said = capsys.readouterr().err.splitlines()  # not at each look
    assert broken.startswith("error: a: ")
    assert said.startswith("no longer watching: nothing runs or waits, but for 6 looks it has been")
    assert said.endswith("flowjobs status 'a*' --watch looks again"), said


def test_a_watching_sync_says_what_cannot_be_read_when_that_is_new_and_looks_again(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    run = made_run(study, [1.0] * 3, name="a")
    run.config_file.write_text("{")
    looks: list[float] = []

    def between(pause_s: float) -> None:
        looks.append(pause_s)
        match len(looks):
            case 2:  # the file server is away, for two looks
                (study / "runs").rename(study / "away")
                (study / "runs").symlink_to("nowhere")
            case 4:
                (study / "runs").unlink()
                (study / "away").rename(study / "runs")
            case 6:
                raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", between)
    assert run_command(["sync", "--watch"]) == 0
    assert len(looks) == 6
    broken, away, again = capsys.readouterr().err.splitlines()
    assert broken.startswith(f"error: a: {run.config_file} ")
    assert away.startswith(f"error: {study}/runs is a link to {study}/nowhere, which is not there")
    assert again == broken  # it had been out of sight
    with pytest.raises(RunNotFoundError):  # at the first look it is a mistake
        run_command(["sync", "--watch", "b"])


def test_the_keys_of_json_are_kept(flowjobs: Command, study: Path) -> None:
    made_run(study, [1.0, 0.5], name="a", lr=0.1)
    keys = (
        "run state reason step total_steps epoch epochs patience best_val_loss exit_code traceback "
        "extensions model model_code parameters flops_per_sample diverged_after updated attempts "
        "state_in_words latest steps_per_s left_s jobs waits unknown silent wandb folder "
        "checkpoints"
    )
    assert list(json.loads(flowjobs("status", "--json").stdout)[0]) == keys.split()
    shown = json.loads(flowjobs("show", "a", "--json").stdout)
    assert list(shown) == [*keys.split(), "config", "time", "files"]
    assert shown["config"] == {"lr": 0.1, "epochs": 3}
    assert shown["time"]["goodput"] == 1.0


def test_show_says_what_is_not_the_default_and_where_the_time_went(
    flowjobs: Command, study: Path
) -> None:
    run = made_run(study, [1.0], name="a", lr=0.1)
    job = JobInfo("slurm", "7", None, "n1", 1)

    def attempt(number: int, times: str, steps: tuple[int, int], state: str) -> AttemptRecord:
        started, trains, ended = (f"2025-01-01T{time}:00+00:00" for time in times.split())
        record = AttemptRecord(number, job, started, *steps, ended, "failed")
        record.trains, record.state, record.reason = trains, state, ""  # type: ignore[assignment]
        return record

    status = RunStatus("finished", step=200, total_steps=200, epoch=3, epochs=3)
    status.parameters, status.flops_per_sample = 619_200, 1_228_800
    status.attempts = [
        attempt(1, "01:00 01:06 02:06", (0, 108), "preempted"),  # 27 of its 108 steps are lost
        attempt(2, "02:36 02:39 03:39", (81, 200), "finished"),
    ]
    status.attempts[0].saving_s = 360.0
    status.write(run.status_file)
    run.add_submission("7", "slurm", None)
    entry = json.loads(run.jobs_file.read_text()) | {"submitted": "2025-01-01T00:50:00+00:00"}
    run.jobs_file.write_text(json.dumps(entry) + "\n")
    spent = time_spent(status, run.submissions())
    minutes = [spent.waiting_s / 60, spent.starting_s / 60, spent.repeated_s / 60]
    assert minutes == pytest.approx([10 + 30, 6 + 3, 54 / 4])
    assert spent.saving_s == 360
    assert spent.goodput == pytest.approx((54 * 3 / 4 + 60) / (66 + 63))
    shown = flowjobs("show", "a").stdout
    assert shown.startswith("a: finished\n  --epochs 3\n  --lr 0.1\n")
    assert "model: 619k parameters, 1.23M FLOPs a sample (forward)" in shown
    assert "starting 9 min, saving 6 min, steps that were lost and repeated 14 min" in shown
    assert "goodput 78% of the time that it held its GPUs" in shown
    assert f"metrics    {run.metrics_file}" in shown


def test_logs_of_the_newest_failure_an_attempt_and_a_rank(flowjobs: Command, study: Path) -> None:
    for name, updated in (("old", "2025-01-01"), ("newest", "2025-02-01"), ("fine", "2025-03-01")):
        run = made_run(study, [1.0], "finished" if name == "fine" else "failed", name=name)
        status = json.loads(run.status_file.read_text())
        logs = []
        for job in (1, 2):
            log = run.logs / f"{job}_0_log.out"
            log.write_text(f"{name} {job}\n")
            logs.append(status["attempts"][0] | {"number": job})
            # As the study was called before it was moved.
            logs[-1]["job"] = logs[-1]["job"] | {"log": f"/old/runs/{name}/logs/{log.name}"}
        (run.logs / "2_1_log.out").write_text(f"{name} rank 1\n")
        status |= {"updated": f"{updated}T00:00:00+00:00", "attempts": logs}
        run.status_file.write_text(json.dumps(status))
    done = flowjobs("logs", "--failed")
    assert (done.stdout, done.stderr.split()[0]) == ("newest 2\n", "newest")
    assert flowjobs("logs", "--failed", "o*").stdout == "old 2\n"
    assert flowjobs("logs", "old", "--attempt", "1").stdout == "old 1\n"
    assert flowjobs("logs", "old", "--rank", "1").stdout == "old rank 1\n"
    for words, said in (
        (["--failed", "fine"], "no run of 1"),
        (["old", "--attempt", "3"], "--attempt: found 3, and old has 2"),
        (["old", "--rank", "7"], "no such log"),
        ([], "found 0 names, expected one, or --failed"),
    ):
        done = flowjobs("logs", *words)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr


def test_a_shell_completes_commands_flags_and_runs(flowjobs: Command, study: Path) -> None:
    made_run(study, [1.0], name="wide-one")
    made_run(study, [1.0], name="wide-two")
    (study / "sweeps").mkdir()
    (study / "sweeps/wider.runs").touch()
    (study / "sweeps/wider.toml").touch()
    for hostile in ("wide$(touch ran)", "wide`touch ran`", "wide ${x:=$(touch ran)}"):
        (study / "runs" / hostile).mkdir()
        (study / f"sweeps/{hostile}.runs").touch()
    Path("script").write_text(flowjobs("completion", "bash").stdout)
    Path("elsewhere/study/runs/wide-three").mkdir(parents=True)
    # As in a person's own shell.
    settings = (
        "shopt -s expand_aliases; alias ls='ls -F --color=always' grep='grep --color=always' "
        "sed='sed -i' cd='cd -e'; CDPATH=elsewhere"
    )

    def completed(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in words)
        code = (
            f"{settings}; source ./script; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
            '_flowjobs; echo "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("flowjobs", "re") == ["resume", "report", "retry", "reconcile"]
    assert completed("flowjobs", "status", "wide-t") == ["wide-two"]
    assert completed("flowjobs", "sweep", "wider") == ["wider"]
    assert completed("flowjobs", "report", "--la") == ["--latex"]
    assert completed("flowjobs", "submit", "--weight") == ["--weight-decay"]
    assert "--study" in completed("flowjobs", "logs", "-")
    assert completed("flowjobs", "submit", "--no-f") == ["--no-follow"]
    assert completed("flowjobs", "retry", "--no-") == ["--no-snapshot"]
    assert completed("flowjobs", "status", "wide") == ["wide-one", "wide-two", "wider"]
    assert not Path("ran").exists()


def test_every_command_leaves_a_study_as_it_is(flowjobs: Command, study: Path) -> None:
    made_run(study, [1.0], "failed", name="a")
    before = tree(study)
    for words in (["status"], ["status", "a"], ["show", "a"], ["report"], ["status", "lr=0.001"]):
        assert flowjobs(*words).returncode == 0
    assert re.search("a +failed", flowjobs("status").stdout)
    assert tree(study) == before


def test_an_error_of_a_look_is_said_at_once_and_once(capsys: pytest.CaptureFixture[str]) -> None:
    before: set[str] = set()
    for said in ("squeue has not answered yet\n", ""):
        errors = NewLines(sys.stdout, before)
        print("error: a is ", end="", file=errors)
        print("broken\nsqueue has not answered yet", file=errors)
        assert capsys.readouterr().out == (f"error: a is broken\n{said}" if said else "")
        before = errors.lines
