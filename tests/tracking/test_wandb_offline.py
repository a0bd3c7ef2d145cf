"""What the real client leaves on disk, read back with its own reader."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from wandb.sdk.lib.wbauth import read_netrc_auth

from flowjobs.config import RunConfig, TrackingConfig, TrainingConfig
from flowjobs.data.dataset import load_datasets
from flowjobs.errors import RunInterrupted
from flowjobs.field_values import KeyValues
from flowjobs.models.build import build_model
from flowjobs.runs.metrics import read_rows
from flowjobs.runs.recorder import recording
from flowjobs.runs.run import Run
from flowjobs.runs.status import JobInfo
from flowjobs.tracking.mode import DEFAULT_HOSTS, has_login, resolve_mode
from flowjobs.tracking.tracker import tracked
from flowjobs.training.trainer import Trainer
from tests.tracking.backend import KEY
from tests.tracking.leet import Inspected, history, inspect, records, session_files

CONFIG = TrainingConfig(
    epochs=2, group="flow-methods", arch_args=KeyValues(width=16, depth=1), lr=2e-3
)

LOGIN = f"machine {DEFAULT_HOSTS[0]} login user password {KEY}\n"
OF_BEFORE = f"machine {DEFAULT_HOSTS[1]} login user password {KEY}\n"
OF_GIT = "machine github.com login user password token\n"


@pytest.fixture(autouse=True)
def patient_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run has one session: what W&B was told too late would be in another."""
    for limit in ("SHORT_FINISH_S", "LONG_FINISH_S"):
        monkeypatch.setattr(f"flowjobs.tracking.tracker.{limit}", 600.0)


def record_of(run: Run) -> Path:
    """The one offline file of a run."""
    (found,) = session_files(run)
    return found


def summary_of(run: Run) -> Inspected:
    """Config, summary, tags, notes and state."""
    return inspect(record_of(run))


def records_of(run: Run, kind: str) -> list[dict[str, Any]]:
    """The records of one kind, in order."""
    return [record[kind] for record in records(record_of(run)) if record["type"] == kind]


def train(study: Path, *, break_with: Exception | None = None) -> Run:
    run = Run(study, "tracked")
    run.create(RunConfig(CONFIG, tracking=TrackingConfig(wandb_mode="offline")))
    train_dataset, val_dataset = load_datasets("digits", study)

    def stop_reason() -> str | None:
        if break_with is not None:
            raise break_with
        return None

    with recording(run, JobInfo.in_foreground(), track=tracked) as recorder:
        Trainer(
            build_model(CONFIG, 64),
            CONFIG,
            train_dataset,
            val_dataset,
            torch.device("cpu"),
            run=run,
            recorder=recorder,
            stop_reason=stop_reason,
        ).train()
    return run


def test_a_finished_run_has_what_the_seed_lists(study: Path) -> None:
    run = train(study)
    record = records_of(run, "run")[-1]  # each replaces the one before
    assert record["project"] == "flow-matching-study"
    assert record["run_group"] == "flow-methods"
    assert record["display_name"] == "tracked"
    assert record["run_id"] == run.tracking_id()
    metrics = {record["name"]: record.get("summary") for record in records_of(run, "metric")}
    assert metrics == {"train/loss": {"min": True}, "val/loss": {"min": True}}

    found = summary_of(run)
    assert found.config["lr"] == 2e-3
    assert found.config["arch_args"] == {"width": 16, "depth": 1}
    rows = list(read_rows(run.metrics_file))
    losses = [row["val/loss"] for row in rows if "val/loss" in row]
    assert found.summary["final_epoch"] == 1
    assert found.summary["best_val_loss"] == min(losses)
    assert found.summary["checkpoint_path"] == str(run.best)
    assert found.summary["val/loss"]["min"] == min(losses)
    assert found.exit_code == 0


def test_the_history_is_the_rows_of_the_metrics_file(study: Path) -> None:
    run = train(study)
    assert history(record_of(run)) == list(read_rows(run.metrics_file))


def test_an_exception_tags_the_run_failed(study: Path) -> None:
    with pytest.raises(ValueError, match="the bug"):
        train(study, break_with=ValueError("the bug"))
    found = summary_of(Run(study, "tracked"))
    assert found.exit_code == 1
    assert found.tags == ["flowjobs", "failed"]
    assert found.notes.startswith("flowjobs: failed: ValueError (")
    assert "): the bug\n> attempt 1, " in found.notes
    assert "> Traceback (most recent call last)" in found.notes


def test_a_preemption_does_not_mark_the_run_failed(study: Path) -> None:
    run = Run(study, "tracked")
    with pytest.raises(RunInterrupted):
        train(study, break_with=RunInterrupted("preempted", 3))
    found = summary_of(run)
    assert found.tags == ["flowjobs"]
    assert (found.state, found.exit_code) == ("preempted", 75)
    assert records_of(run, "preempting")


def test_disabled_leaves_wandb_out_altogether(study: Path) -> None:
    code = (
        "import sys\nfrom flowjobs.cli import main\ntry:\n"
        "    main(['train', '--epochs', '1', '--wandb-mode', 'disabled'])\n"
        "finally:\n    print('wandb' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert not (Run(study, "mlp-icfm-digits-none").folder / "wandb").exists()


def test_a_tracker_that_cannot_start_does_not_stop_training(
    study: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(study, "tracked")
    run.folder.mkdir(parents=True)
    (run.folder / "wandb").write_text("a file where the folder should be")
    train(study)
    status = run.status()
    assert status.state == "finished"
    said = [text for text in caplog.messages if "W&B gets nothing" in text]
    assert len(said) == 1
    assert "File exists" in said[0]


@pytest.mark.parametrize(
    ("asked", "environment", "mode"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "x"}, "online"),
        ("auto", {"WANDB_API_KEY": "x", "WANDB_MODE": "offline"}, "offline"),
        ("online", {"WANDB_MODE": "disabled"}, "disabled"),
        ("disabled", {}, "disabled"),
    ],
)
def test_the_mode_is_online_where_there_is_a_login(
    monkeypatch: pytest.MonkeyPatch, asked: Any, environment: dict[str, str], mode: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert resolve_mode(TrackingConfig(wandb_mode=asked))[0] == mode


def test_a_login_in_the_netrc_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine wandb.example.org login user password key\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert resolve_mode(TrackingConfig())[0] == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert resolve_mode(TrackingConfig())[0] == "online"
    monkeypatch.delenv("WANDB_BASE_URL")
    settings = Path.home() / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = https://wandb.example.org\n")  # wandb login --host
    assert resolve_mode(TrackingConfig())[0] == "online"
    for file in (netrc, settings):
        file.write_bytes(b"# Gr\xfc\xdfe\n" + file.read_bytes())  # no UTF-8
    assert resolve_mode(TrackingConfig())[0] == "offline"


@pytest.mark.parametrize(
    ("variable", "files", "expected"),
    [
        ("~/mine", {"mine": LOGIN}, KEY),  # as a crontab has it: no shell has read it
        ("~/mine", {"mine": OF_GIT, ".netrc": LOGIN}, None),
        ("~/gone", {".netrc": LOGIN}, None),
        ("", {"_netrc": LOGIN}, KEY),
        ("", {".netrc": OF_GIT, "_netrc": LOGIN}, None),
        ("", {".netrc": f"machine {DEFAULT_HOSTS[0]} login user\n"}, None),
        ("", {".netrc": f"machine {DEFAULT_HOSTS[0]} login user\n{OF_BEFORE}"}, None),
    ],
)
def test_a_login_is_looked_up_in_the_file_that_wandb_reads(
    monkeypatch: pytest.MonkeyPatch, variable: str, files: dict[str, str], expected: str | None
) -> None:
    Path.home().mkdir()
    monkeypatch.setenv("NETRC", variable)
    for name, text in files.items():
        (Path.home() / name).write_text(text)
    server = f"https://{DEFAULT_HOSTS[0]}"
    assert has_login(server) == (expected is not None)
    assert read_netrc_auth(host=server) == expected


def test_a_login_from_before_the_server_had_another_name_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password key\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert resolve_mode(TrackingConfig())[0] == "online"
    assert wandb.Settings().base_url == f"https://{DEFAULT_HOSTS[0]}"
