import contextlib
import dataclasses
import json
import os
import re
import resource
import signal
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from flowjobs.config import RunConfig, SlurmConfig, TrackingConfig, TrainingConfig
from flowjobs.errors import (
    ConfigError,
    RunBusyError,
    RunInterrupted,
    RunMismatchError,
    RunNotFoundError,
)
from flowjobs.field_values import KeyValues
from flowjobs.runs.attempt import Attempt
from flowjobs.runs.goodput import time_spent
from flowjobs.runs.hint import hint
from flowjobs.runs.metrics import MetricsFile, latest_values, read_rows
from flowjobs.runs.run import Run, absolute, run_names, undone_if_refused
from flowjobs.runs.status import AttemptRecord, JobInfo, Outcome, RunStatus, outcome_of, utc

JOB = JobInfo.in_foreground()


@contextlib.contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """What a full disk does to a write, here: it is short, and the next one fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def created(study: Path, **training: object) -> Run:
    run = Run(study, "a")
    run.create(RunConfig(dataclasses.replace(TrainingConfig(), **training)))
    return run


def test_the_paths_are_the_seeds(study: Path) -> None:
    run = Run(study, "mlp-icfm-5k-none")
    assert run.best == study / "checkpoints/mlp-icfm-5k-none/best.pt"
    assert run.last == study / "checkpoints/mlp-icfm-5k-none/last.pt"
    assert Run.at(run.folder) == run


def test_creating_again_is_the_same_run(study: Path) -> None:
    run = created(study)
    before = run.tracking_id()
    assert run.create(RunConfig(slurm=SlurmConfig(partition="other"))) == ""
    assert run.tracking_id() == before
    assert run.config().slurm.partition == "other"


def test_a_changed_config_under_the_same_name_lists_the_differences(study: Path) -> None:
    run = created(study, lr=1e-3)
    run.last.touch()
    asked = RunConfig(TrainingConfig(lr=3e-4, seed=2))
    with pytest.raises(RunMismatchError) as caught:
        run.create(asked)
    assert str(caught.value).splitlines()[1:] == [
        "  --lr: 0.001 there, 0.0003 asked for",
        "  --seed: 0 there, 2 asked for",
        "give this one a name of its own (--name a-lr0.0003-seed2), or ask for the values there to "
        "resume that run",
    ]


def test_a_number_that_is_written_in_another_way_is_the_same(study: Path) -> None:
    run = created(study, weight_decay=0, arch_args={"dropout": 0.0, "ratio": 4})
    run.last.touch()
    before = run.config_file.read_bytes()
    same = TrainingConfig(weight_decay=0.0, arch_args=KeyValues(dropout=0, ratio=4.0))
    assert run.create(RunConfig(same)) == ""
    assert run.config_file.read_bytes() == before  # what its model was built with


def test_a_config_that_never_trained_a_step_is_replaced(study: Path) -> None:
    run = created(study, lr=1e-3)
    before = run.tracking_id()
    asked = RunConfig(TrainingConfig(lr=3e-4))
    with pytest.raises(RunMismatchError):
        run.create(asked, in_use=True)
    assert "had not trained a step" in run.create(asked)
    assert run.config().training.lr == 3e-4
    assert run.tracking_id() == before


def test_a_run_that_has_trained_stays_where_it_is_in_wandb(study: Path) -> None:
    run = created(study)
    place = TrackingConfig("mine", "my-lab", "https://wandb.test")
    assert run.create(RunConfig(tracking=place)) == ""  # a typo is mended before it trains
    assert run.config().tracking == place
    other = RunConfig(tracking=TrackingConfig("mine", "my-lba", wandb_mode="disabled"))
    stays = "a stays in W&B's my-lab/mine at https://wandb.test"
    assert run.create(other, in_use=True) == stays
    run.last.touch()
    assert run.create(other) == stays
    assert run.config().tracking == dataclasses.replace(place, wandb_mode="disabled")
    assert run.create(RunConfig(tracking=TrackingConfig("mine"))) == ""  # none is asked for
    assert run.config().tracking.wandb_entity == "my-lab"


def test_a_link_to_where_nothing_is_any_more_is_named(study: Path, tmp_path: Path) -> None:
    run = created(study)
    run.checkpoints.rmdir()
    run.checkpoints.symlink_to(tmp_path / "purged/a")
    with pytest.raises(ConfigError) as caught:
        run.create(RunConfig())
    link, target = run.checkpoints, tmp_path / "purged/a"
    assert str(caught.value) == (
        f"{link} is a link to {target}, which is not there: if it was removed, make it anew "
        f"(mkdir -p {target}); if it is not mounted here, go to where it is"
    )
    run.checkpoints.unlink()
    run.checkpoints.parent.rmdir()
    run.checkpoints.parent.symlink_to("../../purged")
    for name in ("a", "new"):
        with pytest.raises(ConfigError, match=rf"^{study}/checkpoints is a link to .*/purged, whi"):
            Run(study, name).create(RunConfig())
    run.checkpoints.parent.unlink()
    run.checkpoints.parent.touch()
    with pytest.raises(ConfigError, match=r"^--study .*: Not a directory: .*checkpoints/a$"):
        run.create(RunConfig())


def test_a_damaged_status_is_written_anew(study: Path) -> None:
    run = created(study)
    for content in ("", "{", "[]", '{"attempts": [{}]}'):
        run.status_file.write_text(content)
        assert run.status() == RunStatus()
    with Attempt(run, JOB):
        pass
    found = json.loads(run.status_file.read_text())
    for text in ("", "yesterday", "2026-11-25T10:00:00"):
        of_attempt = {**found["attempts"][0], "started": text}
        for damaged in ({"updated": text}, {"attempts": [of_attempt]}):
            run.status_file.write_text(json.dumps(found | damaged))
            assert run.status() == RunStatus()
    run.status_file.write_text(json.dumps({**found, "of a newer version": 1}))
    status = run.status()
    assert status.state == "finished"


def test_more_epochs_extend_and_fewer_change_nothing(study: Path) -> None:
    run = created(study, epochs=10)
    shorter = RunConfig(TrainingConfig(epochs=8))
    assert "had not trained a step; it takes over this config" in run.create(shorter)
    assert run.config().training.epochs == 8
    run.last.touch()
    assert "extends a from 8 to 20 epochs" in run.create(RunConfig(TrainingConfig(epochs=20)))
    assert "keeps its epochs of 20 (--epochs 5" in run.create(RunConfig(TrainingConfig(epochs=5)))
    assert run.config().training.epochs == 20
    patient = RunConfig(TrainingConfig(epochs=20, patience=60))
    assert "raises the patience of a from 50 to 60" in run.create(patient)


@pytest.mark.parametrize("name", ["", "..", "a/b", "-a", "a b", "x" * 101])
def test_a_name_that_cannot_be_a_folder_is_refused(study: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="--name"):
        Run(study, name).create(RunConfig())


def test_a_run_that_is_not_there_names_those_that_may_be_meant(study: Path) -> None:
    created(study)
    assert run_names(study) == ["a"]
    with pytest.raises(RunNotFoundError, match=r"no run b in .*: there is only a"):
        Run(study, "b").config()
    for number in range(70):
        Run(study, f"mlp-icfm-{number}").create(RunConfig())
    with pytest.raises(RunNotFoundError, match=r"did you mean mlp-icfm-12 or .*71 runs") as caught:
        Run(study, "mpl-icfm-12").config()
    assert len(str(caught.value)) < 200
    with pytest.raises(RunNotFoundError, match=r"there are 71 runs, none of that name"):
        Run(study, "xyz").config()


def test_checkpoints_may_be_a_link_to_scratch(study: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (study / "checkpoints").mkdir(parents=True)
    (study / "checkpoints/a").symlink_to(scratch)
    run = created(study)
    assert run.checkpoints.resolve() == scratch


@pytest.mark.parametrize(
    ("error", "state", "exit_code", "reason"),
    [
        (None, "finished", 0, ""),
        (RunInterrupted("preempted", 7), "preempted", 75, "preempted; saved at step 7"),
        (ConfigError("bad"), "failed", 2, "bad"),
        (ValueError("bug"), "failed", 1, "ValueError (test_run.py, in test): bug"),
    ],
)
def test_an_attempt_writes_down_how_it_ended(
    study: Path, error: Exception | None, state: str, exit_code: int, reason: str
) -> None:
    run = created(study)
    attempt = Attempt(run, JOB)
    if error is None:
        with attempt:
            pass
    else:
        with pytest.raises(type(error)), attempt:
            raise error
    status = run.status()
    said = re.sub(r"\(.*/(test_run.py), line \d+, in test\w+\)", r"(\1, in test)", status.reason)
    assert (status.state, status.exit_code, said) == (state, exit_code, reason)
    assert status.attempts[0].ended is not None
    assert json.loads(run.status_file.read_text())["attempts"][0]["job"]["pid"] == JOB.pid


def test_an_attempt_that_could_not_say_it_ended_when_it_was_last_heard_of(study: Path) -> None:
    run = created(study)
    dead = AttemptRecord(1, JOB, utc(10_000), 0, 20, trains=utc(10_100))
    RunStatus("running", step=20, attempts=[dead]).write(run.status_file)
    found = json.loads(run.status_file.read_text())
    run.status_file.write_text(json.dumps({**found, "updated": utc(13_000)}))
    run.metrics_file.write_text('{"step": 20, "train/loss": 1.0}\n')
    os.utime(run.metrics_file, (13_600, 13_600))
    with Attempt(run, JOB):
        pass
    status = run.status()
    assert status.attempts[0].ended == utc(13_600)  # and not now
    spent = time_spent(dataclasses.replace(status, attempts=status.attempts[:1]), [])
    assert (spent.starting_s, spent.progress_s) == (100, 3500)

    # Where it is known when its job ended, that counts; no clock makes it later than now.
    before = time.time()
    for told, noted in (13_800, 13_800), (1, 10_000), (2**33, None):
        status.attempts = [dataclasses.replace(dead)]
        status.record_outcome_of_dead(Outcome("failed", 1, ended=utc(told)), run.metrics_file)
        ended = datetime.fromisoformat(status.attempts[0].ended or "").timestamp()
        assert (noted or before) - 1 <= ended <= (noted or time.time()) + 1


def test_a_second_attempt_is_refused_with_who_holds_the_run(study: Path) -> None:
    run = created(study)
    with Attempt(run, JOB):
        with pytest.raises(RunBusyError, match=f"process {JOB.pid}"), Attempt(run, JOB):
            pass
        status = run.status()
        assert len(status.attempts) == 1
    with Attempt(run, JOB):
        pass  # free again


def test_a_run_is_finished_until_it_is_given_more_epochs(study: Path) -> None:
    run = created(study, epochs=2)
    assert not run.finished()
    with Attempt(run, JOB):
        pass
    assert run.finished()
    run.create(RunConfig(TrainingConfig(epochs=3)))
    assert not run.finished()


def test_metrics_keep_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, after_step=0)
    for step in (10, 20, 30):
        metrics.append({"step": step, "x": step / 3})
    metrics.close()
    path.write_text(path.read_text() + '{"step": 40, "x"')
    metrics = MetricsFile(path, after_step=20)
    metrics.append({"step": 30, "x": 10.0})
    metrics.close()
    assert [row["step"] for row in read_rows(path)] == [10, 20, 30]
    assert latest_values(path) == {"step": 30, "x": 10.0}


def test_rows_of_an_attempt_that_lost_the_run_reach_nobody(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lost = MetricsFile(path, after_step=0)
    lost.append({"step": 10})
    holder = MetricsFile(path, after_step=10)
    for step in (20, 30):
        lost.append({"step": step})
        holder.append({"step": step})
    lost.close()
    holder.close()
    assert [row["step"] for row in read_rows(path)] == [10, 20, 30]


def test_rows_that_a_full_disk_does_not_take_come_later_and_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, after_step=0)
    metrics.append({"step": 10})
    with no_file_larger_than(path.stat().st_size + 7):
        metrics.append({"step": 20})
        metrics.append({"step": 30})
        assert len(caplog.records) == 1
        assert [row["step"] for row in read_rows(path)] == [10]
        with pytest.raises(OSError, match="File too large"):
            metrics.flush()
    metrics.append({"step": 40})
    metrics.flush()
    metrics.close()
    assert path.read_text() == "".join(f'{{"step": {step}}}\n' for step in (10, 20, 30, 40))


def test_metrics_that_are_not_there_are_empty(tmp_path: Path) -> None:
    assert list(read_rows(tmp_path / "none.jsonl")) == []
    assert latest_values(tmp_path / "none.jsonl") == {}


def test_the_reason_of_an_error_is_one_line_that_a_terminal_can_show() -> None:
    outcome = outcome_of(RuntimeError("in loading:\n\tsize \x1b[31mmismatch" + " x" * 1000))
    assert outcome.reason.startswith("RuntimeError: in loading: size [31mmismatch x x")
    assert outcome.reason.isprintable()
    assert len(outcome.reason) < 600
    assert "in loading:\n\tsize" in outcome.traceback


@pytest.mark.parametrize("file", ["/nets.py", "nets.py"])
def test_an_error_is_told_where_the_working_directory_was_removed(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    gone = workplace / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ZeroDivisionError) as raised:
        exec(compile("1 / 0", file, "exec"))
    said = f"ZeroDivisionError ({file}, line 1): division by zero"
    assert outcome_of(raised.value).reason == said


def test_a_submission_that_a_full_disk_refuses_leaves_the_run_as_it_was_or_whole(
    study: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = created(study)
    run.request_cancel()
    files = (run.config_file, run.cancel_file)
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    more = RunConfig(slurm=SlurmConfig(partition="other"))
    refused = pytest.raises(OSError, match="File too large")
    with refused, no_file_larger_than(0), undone_if_refused([run]):
        run.create(more)
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files} == before
    assert caplog.records == []
    # Full only when the config has been written already: it cannot be put back, and is whole.
    refused = pytest.raises(OSError, match="File too large")
    with contextlib.ExitStack() as full, refused, undone_if_refused([run]):
        run.create(more)
        full.enter_context(no_file_larger_than(0))
        run.request_cancel()
    assert run.config() == more
    assert run.cancel_requested()
    assert "a is not put back as it was" in caplog.text


def test_a_job_that_a_full_disk_does_not_note_damages_no_other(study: Path) -> None:
    run = created(study)
    run.add_submission("1", "slurm", None)
    refused = pytest.raises(OSError, match=r"File too large: .*jobs\.jsonl")
    with refused, no_file_larger_than(run.jobs_file.stat().st_size + 20):
        run.add_submission("2", "slurm", None)
    run.add_submission("3", "slurm", None)
    assert [entry.job_id for entry in run.submissions()] == ["1", "3"]


def test_what_is_damaged_of_a_job_is_not_known(study: Path) -> None:
    run = created(study)
    run.add_submission("1", "slurm", None, identity={"mark": "ab"}, again=["sbatch", "a.sh"])
    whole = json.loads(run.jobs_file.read_text())
    wrong = {"uid": "0", "mark": 7, "handed_over": None, "pack": [], "again": "sbatch", "new": 1}
    lines = [whole | wrong, whole | {"log": None}, {}, [], "job_id", 1, None]
    run.jobs_file.write_text("".join(json.dumps(line) + "\n" for line in lines) + "[" * 100_000)
    (known,) = run.submissions()
    assert (known.job_id, known.log, known.host) == ("1", "", whole["host"])
    unknown = (known.uid, known.mark, known.handed_over, known.pack, known.again)
    assert unknown == (None, "", 0.0, "", [])


def test_a_job_of_another_cluster_is_another_job(study: Path) -> None:
    run = created(study)
    for cluster in ("one", "", "other"):
        run.add_submission("7", "slurm", Path(cluster), identity={"slurm_cluster": cluster})
    run.add_submission("8", "slurm", None, identity={"slurm_cluster": "other"})
    found = [run.submission("7", cluster) for cluster in ("", "one", "other", "third")]
    assert [entry and entry.slurm_cluster for entry in found] == ["other", "", "other", ""]
    assert run.submission("8", "one") is None
    # Noted by itself first, where a node may not ask for its mark, and then by who submitted it.
    run.add_submission("8", "slurm", None, identity={"slurm_cluster": "one", "mark": "ab"})
    run.add_submission("8", "slurm", None, identity={"slurm_cluster": "other", "mark": "cd"})
    assert [entry.mark for entry in run.submissions()[3:]] == ["ab", "cd"]


@pytest.mark.parametrize("name", ["new\nline", "latin-1 \udcff"])
def test_a_path_that_no_batch_script_can_hold_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(name).mkdir()
    with pytest.raises(ConfigError, match="expected a path without"):
        absolute(Path(name))
    monkeypatch.chdir(name)
    with pytest.raises(ConfigError, match="expected a path without"):
        absolute(Path("study"))
    # A study elsewhere is used from there.
    assert hint("status", study=tmp_path).endswith(f"status --study {tmp_path}")
