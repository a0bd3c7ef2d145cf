"""An attempt reaches its own run in W&B, whatever was copied, deleted, or left by others."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flowjobs.cli.defaults import load_defaults
from flowjobs.config import TrackingConfig
from flowjobs.errors import ServerError
from flowjobs.runs.metrics import read_rows
from flowjobs.runs.run import Run
from flowjobs.tracking.mode import check_server_answers, entity_here
from flowjobs.tracking.process import mirror_environment, upload_limit_s
from flowjobs.tracking.record import read_uploaded
from flowjobs.tracking.sync import sync_run
from tests.cluster.waiting import wait_until
from tests.conftest import Command
from tests.tracking import attempts
from tests.tracking.attempts import make_run
from tests.tracking.backend import Backend
from tests.tracking.conftest import MakeRun
from tests.tracking.history import (
    assert_history_is_exact,
    finish_and_tell,
    is_quiet,
    on_server,
    run_to_the_end,
    wait_until_open,
    without_picture,
)
from tests.tracking.leet import history

LEFT_OVER = {
    "WANDB_SWEEP_ID": "someone/other/k3j2h1",
    "WANDB_FORK_FROM": "another?_step=3",
    "WANDB_RESUME_FROM": "another?_step=3",
    "WANDB_RUN_ID": "another",
    "WANDB_RESUME": "never",
    "WANDB_ENTITY": "another-lab",
    "WANDB_PROJECT": "another-project",
    "WANDB_RUN_GROUP": "another-group",
    "WANDB_DIR": "/proc/nowhere",
    "WANDB_SERVICE": "3-1-unix-/tmp/no-such-socket",
    "WANDB_MODE": "",
    "WANDB_DISABLED": "true",
    "WANDB_START_METHOD": "fork",
    "WANDB_X_OFFLINE": "true",
    "_WANDB_STARTUP_DEBUG": "true",
    "WANDB_OF_THE_NEXT_VERSION": "?",
}


# As `wandb init` writes it here, and what else a person may have put there and into their own.
SETTINGS_HERE = "[default]\nentity = my-team\nproject = mine\nsweep_id = k3j2h1\nmode = disabled\n"
SETTINGS_OF_USER = "[default]\nentity = my-lab\nfork_from = another?_step=3\nbase_url = {url}\n"


def write_settings(workplace: Path, url: str) -> None:
    """Both of W&B's settings files."""
    for folder, text in (
        (workplace / "wandb", SETTINGS_HERE),
        (Path.home() / ".config/wandb", SETTINGS_OF_USER.format(url=url)),
    ):
        folder.mkdir(parents=True)
        (folder / "settings").write_text(text)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_what_another_run_left_in_the_environment_leads_nowhere(
    tracked_run: MakeRun, mode: str, monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> None:
    run, backend = tracked_run(mode)
    for name, text in LEFT_OVER.items():
        monkeypatch.setenv(name, text)
    write_settings(workplace, os.environ.get("WANDB_BASE_URL", "https://nowhere.test"))
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):  # as they come out of files
        monkeypatch.setenv(name, f"{os.environ.get(name, '')} \n")
    run_to_the_end(run, 300)
    assert_history_is_exact(run, backend)
    assert len(list(run.folder.glob(f"wandb/*run-*/run-{run.tracking_id()}.wandb"))) == 1
    if backend is not None:
        assert backend.runs() == [run.tracking_id()]
        # Nor does a sync from elsewhere lead to another one, which finds its server by the file.
        monkeypatch.delenv("WANDB_BASE_URL")
        monkeypatch.chdir("/")
        assert sync_run(run, ask=True).state == "complete"
        assert backend.runs() == [run.tracking_id()]
        found = on_server(run, backend)
        assert (found.entity, found.project) == ("someone", "flow-matching-study")
        assert found.group == run.config().training.group


def test_the_entity_of_wandbs_settings_is_read_as_a_run_is_made(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> tuple[str | None, str]:
        defaults = load_defaults()
        return defaults.fill(TrackingConfig).wandb_entity, defaults.sources["wandb_entity"]

    write_settings(workplace, "https://nowhere.test")
    assert found() == ("my-team", "wandb/settings")
    monkeypatch.chdir("/")
    assert found() == ("my-lab", str(Path.home() / ".config/wandb/settings"))
    monkeypatch.chdir(workplace)
    Path("flowjobs.toml").write_text('wandb_entity = "the-lab"')
    assert found() == ("the-lab", str(workplace / "flowjobs.toml"))
    monkeypatch.setenv("WANDB_ENTITY", "another-lab")
    assert found() == (entity_here(), "WANDB_ENTITY")


def test_server_and_mode_of_wandbs_settings_are_read_as_a_run_is_made(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made() -> tuple[str | None, str]:
        tracking = load_defaults().fill(TrackingConfig)
        return tracking.wandb_base_url, tracking.wandb_mode

    assert made() == (None, "auto")
    write_settings(workplace, "https://wandb.lab.test")
    assert made() == ("https://wandb.lab.test", "disabled")
    monkeypatch.setenv("WANDB_BASE_URL", "https://another.test\n")
    settings = workplace / "wandb/settings"
    for written, mode in (("offline", "offline"), ("dryrun", "offline"), ("shared", "auto")):
        settings.write_text(f"[default]\nmode = {written}\n")
        assert made() == ("https://another.test", mode)
    Path("flowjobs.toml").write_text('wandb_mode = "online"')
    assert made() == ("https://another.test", "online")
    for written, mode in ((" dryrun", "offline"), ("Disabled", "disabled"), ("shared", "online")):
        monkeypatch.setenv("WANDB_MODE", written)
        assert made() == ("https://another.test", mode)


def test_where_a_run_goes_and_what_says_so_is_shown(
    flowjobs: Command, study: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workplace / "wandb").mkdir()  # as an old `wandb init` left it
    settings = "[default]\nentity = old-lab\nproject = old\nmode = offline\n"
    (workplace / "wandb/settings").write_text(settings)
    place = "old-lab/flow-matching-study"
    is_not_used = "is not used: see --wandb-project"
    options = ("--cluster", "local", "--epochs", "1", "--arch-args", "width=32", "depth=1")
    plan = flowjobs("sweep", *options, "--seed", "0", "1", "--wandb-mode", "online", "--dry-run")
    assert f"tracking   W&B online: {place} (--wandb-mode online)" in plan.stdout
    assert f"project old of wandb/settings {is_not_used}" in plan.stdout

    monkeypatch.setenv("WANDB_PROJECT", "thesis")
    rows = [
        f"tracking   W&B offline: {place} (mode of wandb/settings)",
        f"           project thesis of WANDB_PROJECT {is_not_used}",
    ]
    done = flowjobs("submit", *options)
    assert "\n".join(rows) in done.stdout
    assert max(map(len, rows)) <= 80
    run = Run(study, "mlp-icfm-digits-none")
    assert f"W&B offline: {place} (mode of the run's config)\n" in flowjobs("logs", run.name).stdout
    assert f"\nW&B        {place}\n" in flowjobs("show", run.name).stdout
    run.wandb_page_file.write_text("https://wandb.test/page\n")
    assert "\nW&B        https://wandb.test/page\n" in flowjobs("show", run.name).stdout

    chosen = TrackingConfig(wandb_project="mine", wandb_entity="old-lab")
    for mode, said in (("disabled", "disabled"), ("offline", "offline: old-lab/mine")):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert load_defaults().tracking_in_words(chosen) == f"W&B {said} (WANDB_MODE={mode})"


def test_what_says_who_one_is_and_how_long_to_wait_reaches_wandb(
    monkeypatch: pytest.MonkeyPatch, study: Path
) -> None:
    run = make_run(study, "online")
    monkeypatch.delenv("WANDB_INIT_TIMEOUT")
    limit_s = upload_limit_s(run)
    assert mirror_environment("online")["WANDB_INIT_TIMEOUT"] == "20"
    given = {
        "WANDB_USERNAME": "me",
        "WANDB_USER_EMAIL": "me@lab.test",
        "WANDB__SERVICE_WAIT": "300",
        "WANDB_INIT_TIMEOUT": "90",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert mirror_environment("online").items() >= given.items()
    assert upload_limit_s(run) == limit_s + 90


def test_a_proxy_of_wandbs_settings_counts_for_whether_the_server_can_be_reached() -> None:
    server = "http://127.0.0.1:1"
    with pytest.raises(ServerError):
        check_server_answers(server)
    settings = Path.home() / ".config/wandb/settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nhttp_proxy = http://proxy.lab.test:3128\n")
    check_server_answers(server)
    assert mirror_environment("online")["WANDB_HTTP_PROXY"] == "http://proxy.lab.test:3128"


def test_paths_in_the_environment_mean_the_same_to_the_mirror(
    monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> None:
    for name in ("WANDB_CACHE_DIR", "WANDB_IDENTITY_TOKEN_FILE", "SSL_CERT_FILE", "NETRC"):
        monkeypatch.setenv(name, "mine")
        assert mirror_environment("online")[name] == str(workplace / "mine")


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_copied_study_is_a_run_of_its_own_with_all_rows(
    tracked_run: MakeRun, mode: str, workplace: Path
) -> None:
    run, backend = tracked_run(mode)
    attempts.hold(run, 500)
    process = attempts.start(run, 5000, pace_s=0.02)
    attempts.mirror_and_core(process.pid)
    attempts.wait_for_rows(run, 30)
    process.terminate()
    attempts.finish(process)
    attempts.let_go(run)
    copy = Run(workplace / "copy", run.name)
    shutil.copytree(run.study, copy.study)

    run_to_the_end(copy, 5000)
    run_to_the_end(run, 6000)
    assert copy.tracking_id() != run.tracking_id()
    assert_history_is_exact(run, backend)
    if backend is not None:
        assert_history_is_exact(copy, backend)
        return
    # A plain `wandb sync` of the copy leaves what belongs to the original to that.
    folders = [path.parent for path in copy.folder.glob("wandb/offline-run-*/*.wandb")]
    left = [folder for folder in folders if not list(folder.glob("*.synced"))]
    assert [folder.name.endswith(copy.tracking_id()) for folder in left] == [True]
    own = Path(left[0]) / f"run-{copy.tracking_id()}.wandb"
    assert without_picture(history(own)) == list(read_rows(copy.metrics_file))


def test_a_run_that_was_deleted_on_disk_starts_anew_in_wandb(
    tracked_run: MakeRun, backend: Backend
) -> None:
    run, _ = tracked_run("online")
    run_to_the_end(run, 500)
    before = on_server(run, backend)
    shutil.rmtree(run.folder)
    make_run(run.study, "online")
    run_to_the_end(run, 200)
    assert_history_is_exact(run, backend)
    assert backend.run(before.id) == before


def test_a_run_that_is_deleted_in_the_page_says_what_to_do_and_is_not_tried_for_ever(
    tracked_run: MakeRun,
    backend: Backend,
    flowjobs: Command,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, _ = tracked_run("online")
    process = attempts.start(run, 10**6, pace_s=0.02)
    attempts.wait_for_rows(run, 20)
    wait_until_open(run, backend)
    deleted = run.tracking_id()
    backend.delete(deleted)
    process.terminate()
    said = finish_and_tell(run, process, 75)
    remedy = f"flowjobs sync {run.name} --as-new"
    assert remedy in said + caplog.text
    assert "undelete it there within 7 days" in said + caplog.text
    shown = flowjobs("status").stdout
    assert remedy in shown
    assert "tries again" not in shown

    sessions = backend.requests.count("RunResumeStatus")
    flowjobs("reconcile")
    done = flowjobs("sync")
    assert (done.returncode, remedy in done.stderr) == (1, True)
    assert backend.requests.count("RunResumeStatus") == sessions

    backend.undelete(deleted)  # as the text says, too
    done = flowjobs("sync", run.name, "--as-new")
    assert (done.returncode, is_quiet(done.stderr)) == (0, True)
    assert backend.runs() == [run.tracking_id()] == [deleted]
    assert "W&B" not in flowjobs("status").stdout

    backend.delete(deleted)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "10")  # how long wandb asks for a deleted one
    done = flowjobs("sync", run.name, "--as-new")
    assert (done.returncode, is_quiet(done.stderr)) == (0, True)
    assert run.tracking_id() != deleted
    assert_history_is_exact(run, backend)
    assert on_server(run, backend).state == "preempted"
    assert "W&B" not in flowjobs("status").stdout
    # Interrupted and repeated it makes no third one.
    new = run.tracking_id()
    assert (sync_run(run, as_new=True).state, run.tracking_id()) == ("complete", new)


@pytest.mark.parametrize(
    ("refusal", "what_to_do"),
    [
        ((403, "permission denied"), "see whether you may write to flow-matching-study there"),
        ((404, "project not found"), "see whether you may write to flow-matching-study there"),
        ((404, "entity a-lab not found"), "or mend what it names in"),
        ((401, "user is not logged in"), "wandb login --relogin`"),
    ],
)
def test_what_wandb_refuses_is_said_once_with_what_to_do(
    tracked_run: MakeRun,
    backend: Backend,
    flowjobs: Command,
    refusal: tuple[int, str],
    what_to_do: str,
) -> None:
    run, _ = tracked_run("online")
    backend.refuse_with = refusal
    attempts.hold(run, 490)
    process = attempts.start(run, 500, pace_s=0.05)
    wait_until(lambda: read_uploaded(run).refusal, "the refusal", 600)
    attempts.let_go(run)
    code, said = attempts.finish(process)
    assert code == 0, said
    assert what_to_do in said
    assert backend.requests.count("UpsertBucket") == 1
    done = flowjobs("status", run.name)
    assert what_to_do in done.stdout
    assert backend.requests.count("UpsertBucket") == 1

    backend.refuse_with = None  # somebody has done it
    done = flowjobs("sync", run.name)
    assert (done.returncode, is_quiet(done.stderr)) == (0, True)
    assert_history_is_exact(run, backend)
    assert "W&B" not in flowjobs("status", run.name).stdout


def test_a_copy_does_not_reach_the_run_of_its_original_by_sync(
    study: Path, backend: Backend, flowjobs: Command
) -> None:
    run = make_run(study, "offline")
    run_to_the_end(run, 200)
    copy = Run(study, "copy")
    shutil.copytree(run.folder, copy.folder)
    environment = {**os.environ, "WANDB_RUN_ID": "another", "WANDB_SWEEP_ID": "a/b/c"}
    command = [sys.executable, "-m", "flowjobs", "sync"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert set(backend.runs()) == {run.tracking_id(), copy.tracking_id()}
    assert len(backend.runs()) == 2
    for each in (run, copy):
        assert_history_is_exact(each, backend)
