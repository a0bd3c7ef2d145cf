"""Bad input: one clear error, exit code 2, no traceback, nothing written."""

import errno
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowjobs.cli.main import _exit_code_of, exit_with
from flowjobs.cli.main import run as run_command
from flowjobs.config import RunConfig, TrackingConfig, TrainingConfig
from flowjobs.errors import FlowjobsError
from flowjobs.runs.run import Run
from flowjobs.tracking.page import our_lines
from tests.conftest import Command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["submit", "--arch", "mpl"],
            "--arch: found 'mpl', expected .*; did you mean mlp?",
        ),
        (["submit", "--arch", "nowhere:Net"], "no module nowhere in"),
        (["submit", "--dataset", "5k"], "--dataset 5k: no .*; there are "),
        (["submit", "--dataset", "x.npy"], "--dataset: no file .*x.npy"),
        (["submit", "--dataset", __file__], "--dataset: found .*, expected a .pt or .npy file"),
        (["submit", "--batch-size", "0"], "--batch-size: found 0, expected at least 1"),
        (["submit", "--name", "a/b"], "--name: found 'a/b'"),
        (["submit", "--follow", "--no-follow"], "found both, expected one"),
        (["submit", "--cluster", "local", "--nodes", "2"], "--nodes: found 2; without Slurm"),
        (["submit", "--lr", "fast"], "found 'fast', expected a number"),
        (["submit", "--timeout-min", "1h"], "found '1h', expected a whole number without a unit"),
        (["sweep", "--seed", "0,1"], "found '0,1', .*separated by spaces: 0 1"),
        (["sweep", "--flow", "icfm,otcfm"], "separated by spaces: icfm otcfm"),
        (["sweep", "--arch", "mlp,unet"], "separated by spaces: mlp unet"),
        (["sweep", "--arch", "mlp", "unet", "--zip"], "--zip: found no field, .* values: arch"),
        (["submit", "--flow", "icmf"], "expected one of icfm, otcfm, .*; did you mean icfm?"),
        (["submit", "--lrr", "1"], "Unrecognized options: --lrr"),
        (["sumbit"], "expected a command: submit, .*; did you mean submit?"),
        ([], "Expected one of {submit, sweep, resume"),
        (
            ["train", "--resume", "none.pt", "--wandb-mode", "disabled"],
            "--resume: found no file none.pt",
        ),
        (["logs", "no-run"], "no run, sweep or group no-run in .*there are no runs yet"),
        (["status", "no-run"], "no run, sweep or group no-run in"),
        (["data", "split", "none.npy"], "none.npy: no such file"),
        (["data", "split", __file__], r"cannot be read as a .py file: expected a .pt file"),
        (
            ["train", "--arch", "no_dim:Net"],
            "takes no argument that the data's width",
        ),
        (["data", "split", "none.npy", "--sizes", "many"], "--sizes: found 'many'"),
        (
            ["data", "split", "none.npy", "--sizes", "0.8"],
            "--sizes: found '0.8', expected a number",
        ),
        (["data", "split", "none.npy", "--sizes"], "--sizes: found no value, expected one or more"),
        (["retry", "a", "--with"], "--with: found no value, expected KEY=VALUE"),
        (["submit", "--seed", "99999999999999999999"], "--seed: found 9+, expected less than"),
        (["submit", "--mem-gb", "inf"], "--mem-gb: found inf, expected a finite number"),
        (["submit", "--study", "/dev/null", "--cluster", "local"], "--study /dev/null"),
        (
            ["train", "--arch-args", "width=big", "--wandb-mode", "disabled"],
            "--arch-args width: found 'big', expected int",
        ),
        (["submit", "--mem-gb", "0.0001"], "--mem-gb: found 0.0001, expected at least"),
        (["cancel"], "cancel: name runs, groups or sweeps"),
        (["cancel", "x", "--study", "/dev/null"], "/dev/null"),
        (["train", "--cluster", "debug"], "Unrecognized options: --cluster"),
        (["submit", "--partition", "a\nb"], r"--partition: found 'a\\nb' with a control character"),
        (["submit", "--sbatch", "reservation=a\tb"], r"--sbatch reservation: found 'a\\tb' with a"),
        (["sweep", "--group", "g\udcff", "--seed", "0", "--name", "s"], "s.toml: found bytes that"),
        (["sweep", "--dataset", "d\udcff.npy", "--seed", "0"], "found bytes that are not UTF-8"),
    ],
)
def test_bad_input(flowjobs: Command, workplace: Path, arguments: list[str], said: str) -> None:
    (workplace / "no_dim.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n    def __init__(self): super().__init__()\n"
    )
    done = flowjobs(*arguments)
    text = re.sub(r"[│╭╰╮╯─\s]+", " ", done.stderr)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(said, text), text
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("retry x --parallel -1", "--parallel: found -1, expected at least 1"),
        ("retry x --parallel 0", "--parallel: found 0, expected at least 1"),
        ("retry x --with oops", "--with: found 'oops', expected key=value"),
        ("sweep --seed 0 1 --first 0", "--first: found 0, expected at least 1"),
        ("sweep --dataset --seed 0 1 --one-at-a-time", "--dataset: found no value"),
        ("sweep --arch-args --seed 0 1", "--arch-args: found no value"),
        ("sweep --arch-args width", "--arch-args: found 'width', expected key=value"),
        ("sweep --init-from '' --seed 0 1", "--init-from .*Is a directory"),
        ("sweep ''", "no sweep '' in"),
        ("sweep pipe.toml", "pipe.toml: found no file, expected the path of one"),
        ("submit --name ''", "--name: found ''"),
        ("train --name ''", "--name: found ''"),
        ("sync --watch --every-s nan", "--every-s: found nan, expected a number of seconds"),
        ("sync --watch --every-s 1e300", "--every-s: found 1e.300, expected a number of seconds"),
        ("bench --seconds inf", "--seconds: found inf, expected a number of seconds"),
        ("report --html pipe.toml", "--html .*pipe.toml: found no file"),
        (f"sample a --out x.npy --steps {10**20}", f"--steps: found {10**20}, expected 1 to"),
        ("sample a --out pipe.npy", "--out pipe.npy: found no file"),
    ],
)
@pytest.mark.usefixtures("workplace")
def test_what_an_option_cannot_mean(study: Path, line: str, said: str) -> None:
    Run(study, "a").create(RunConfig())
    for pipe in ("pipe.toml", "pipe.npy"):
        os.mkfifo(pipe)
    with pytest.raises(FlowjobsError, match=said) as caught:
        run_command(shlex.split(line))
    assert caught.value.exit_code == 2
    assert all(Path(pipe).is_fifo() for pipe in ("pipe.toml", "pipe.npy"))


@pytest.mark.parametrize("line", ["status --study ''", "report --html ''", "data split ''"])
def test_an_empty_path_is_a_variable_that_is_not_set(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_command(shlex.split(line))
    assert "found '', expected a path" in capsys.readouterr().err


def test_ctrl_c_while_the_command_line_loads_is_no_traceback(workplace: Path) -> None:
    (workplace / "tyro.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run(
        [sys.executable, "-m", "flowjobs", "status"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "")


def test_bad_input_leaves_nothing_behind(flowjobs: Command, workplace: Path) -> None:
    flowjobs("submit", "--dataset", "5k")
    flowjobs("submit", "--name", "a/b")
    assert list(workplace.iterdir()) == []


@pytest.mark.parametrize("url", ["nonsense", "http://host:port"])
def test_what_is_wrong_with_wandbs_own_settings_is_said(
    flowjobs: Command, workplace: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    Run(workplace / "study", "tracked").create(RunConfig(TrainingConfig()))
    monkeypatch.setenv("WANDB_BASE_URL", url)
    done = flowjobs("sync")
    assert done.returncode == 2
    assert f"error: WANDB_BASE_URL: found '{url}', expected an address as https://" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_checkpoint_that_is_not_there_does_not_fail_a_finished_run(
    flowjobs: Command, study: Path
) -> None:
    options = ("--epochs", "1", "--name", "a", "--wandb-mode", "disabled")
    assert flowjobs("train", *options).returncode == 0
    run = Run(study, "a")
    before = run.status_file.read_bytes()
    done = flowjobs("train", *options, "--resume", "none.pt")
    assert (done.returncode, "--resume: found no file none.pt" in done.stderr) == (2, True)
    assert run.status_file.read_bytes() == before


def test_files_of_a_finished_run_that_are_gone_are_named(flowjobs: Command, study: Path) -> None:
    options = ("--epochs", "1", "--name", "a", "--wandb-mode", "disabled")
    assert flowjobs("train", *options).returncode == 0
    run = Run(study, "a")
    run.samples_picture.unlink()
    for command in ("train", "submit"):
        done = flowjobs(command, *options)
        assert done.returncode == 0
        assert f"; there is no {run.samples_picture}" in done.stdout + done.stderr
    before = run.status_file.read_bytes()
    run.best.unlink()
    # From last.pt it could go on, but what it ended with is gone.
    for command in ("train", "submit"):
        done = flowjobs(command, *options)
        assert done.returncode == 2
        assert f"a is finished, but {run.best} is gone; of its checkpoints only last" in done.stderr
    for file in run.checkpoints.iterdir():
        file.unlink()
    done = flowjobs("submit", *options, "--epochs", "2")
    assert done.returncode == 2
    assert "It does not start again from nothing by itself" in done.stderr
    assert run.status_file.read_bytes() == before
    assert run.config().training.epochs == 1


def test_a_tensor_that_asks_for_gradients_is_data_and_a_sparse_one_is_not(
    flowjobs: Command, workplace: Path
) -> None:
    torch.save(torch.randn(80, 4, requires_grad=True), "grad.pt")
    options = ("--epochs", "1", "--wandb-mode", "disabled")
    done = flowjobs("train", "--dataset", "grad.pt", *options)
    assert done.returncode == 0, done.stderr
    torch.save(torch.eye(50).to_sparse(), "sparse.pt")
    done = flowjobs("train", "--dataset", "sparse.pt", *options)
    assert done.returncode == 2
    assert "expected a dense one" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unreadable_dataset_is_refused_by_train(flowjobs: Command, workplace: Path) -> None:
    data = torch.randn(50, 4)
    data[7, 2] = float("nan")
    torch.save(data, "mine.pt")
    done = flowjobs("train", "--dataset", "mine.pt", "--wandb-mode", "disabled")
    assert done.returncode == 2
    assert "mine.pt: row 7 has a value that is NaN or infinite" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_same_name_with_another_config(flowjobs: Command, study: Path) -> None:
    run = Run(study, "mlp-icfm-digits-none")
    run.create(RunConfig(TrainingConfig()))
    run.last.touch()  # it has work to lose
    done = flowjobs("submit", "--lr", "0.5")
    assert done.returncode == 2
    assert "--lr: 0.001 there, 0.5 asked for" in done.stderr
    assert "--name mlp-icfm-digits-none-lr0.5" in done.stderr


def test_a_submission_that_cannot_be_written_is_refused_and_leaves_the_run_alone(
    study: Path,
) -> None:
    run = Run(study, "a")
    run.create(RunConfig())
    before = run.config_file.read_bytes()
    limited = 'ulimit -f 0; exec "$0" -m flowjobs "$@" --cluster local --name a --patience 99'
    done = subprocess.run(
        ["sh", "-c", limited, sys.executable, "submit"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    said = f"error: {run.config_file}: File too large; raise the limit of a file's size"
    assert done.stderr.startswith(said)
    assert run.config_file.read_bytes() == before


def test_a_mistyped_flag_does_not_take_the_name(
    flowjobs: Command, study: Path, workplace: Path
) -> None:
    (workplace / "picky.py").write_text(
        "from flowjobs.models.mlp import MLP\n"
        "class Net(MLP):\n"
        "    def __init__(self, dim: int, width: int = 64) -> None:\n"
        "        if width % 8:\n"
        "            raise ValueError('not a multiple of 8')\n"
        "        super().__init__(dim, width)\n"
    )
    quick = ("--arch", "picky:Net", "--name", "picky", "--epochs", "1")
    untracked = ("--wandb-mode", "disabled")
    mistyped = flowjobs("train", *quick, *untracked, "--arch-args", "width=7")
    assert "not a multiple of 8" in mistyped.stderr
    done = flowjobs("train", *quick, *untracked, "--arch-args", "width=8")
    assert done.returncode == 0, done.stderr
    assert "had not trained a step" in done.stdout
    assert Run(study, "picky").config().training.arch_args == {"width": 8}


def test_a_model_of_another_shape_is_refused_before_training(
    flowjobs: Command, workplace: Path
) -> None:
    (workplace / "narrow.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, dim): super().__init__(); self.a = torch.nn.Linear(dim, 1)\n"
        "    def forward(self, x, t): return self.a(x)\n"
    )
    done = flowjobs("train", "--arch", "narrow:Net", "--wandb-mode", "disabled")
    assert done.returncode == 2
    assert "forward returns (64, 1), expected a velocity of shape (64, 64)" in done.stderr


def test_a_bug_gets_its_traceback(flowjobs: Command, workplace: Path) -> None:
    text = "from no_such_package_here import Module\nclass Net(Module): ...\n"
    (workplace / "buggy.py").write_text(text)
    done = flowjobs("train", "--arch", "buggy:Net", "--wandb-mode", "disabled")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "no_such_package_here" in done.stderr


@pytest.mark.parametrize("code", [None, 0, 75, "text"])
def test_exit_in_the_users_code_is_a_bug(
    code: int | str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        exit_with(lambda: sys.exit(code))
    assert "line, in <lambda>): exit(" in re.sub(r"line \d+", "line", capsys.readouterr().err)


def test_a_file_server_that_is_away_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    evicted, refused = errno.ESHUTDOWN, errno.ECONNREFUSED
    assert _exit_code_of(OSError(evicted, os.strerror(evicted), "study/runs")) == 2
    said = "error: study/runs: Cannot send after transport endpoint shutdown; the file system was "
    assert capsys.readouterr().err.startswith(said)
    assert _exit_code_of(OSError(refused, os.strerror(refused))) == 1  # of a socket


def test_a_working_directory_that_is_gone_is_said_and_keeps_no_end_from_being_recorded(
    study: Path,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Run(study, "a")
    run.create(RunConfig(tracking=TrackingConfig(wandb_mode="disabled")))
    gone = workplace / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(SystemExit, match="2"):
        exit_with(lambda: run_command(["status", "--study", str(study)]))
    said = "error: the working directory is gone: go to one that is there\n"
    assert capsys.readouterr().err == said
    # As the last line of the batch script of a job that runs there.
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("FLOWJOBS_JOB", "7")
    of_script = ["reconcile", "a", "--study", str(study), "--exit-code", "137"]
    with pytest.raises(SystemExit, match="0"):
        exit_with(lambda: run_command(of_script))
    host = socket.gethostname().partition(".")[0]
    said = rf"job 7 ended before the run could start on {host}.*: it has no log"
    assert re.fullmatch(said, run.status().reason)


def test_a_failing_model_is_told_by_its_file_and_line(
    flowjobs: Command, study: Path, workplace: Path
) -> None:
    (workplace / "mine").mkdir()
    (workplace / "mine/nets.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, dim, sizes=(1, 1)):\n"
        "        super().__init__()\n"
        "        self.a = torch.nn.Linear(dim, dim)\n"
        "        torch.zeros(sizes[0]) + torch.zeros(sizes[1])\n"
        "    def forward(self, x, t):\n"
        "        return self.a(torch.cat([x, x], 1))\n"
    )
    (workplace / "mine/torn.py").write_text("import torch\nclass Net(\n")
    options = ("--wandb-mode", "disabled", "--arch")
    done = flowjobs("train", *options, "mine.nets:Net", "--name", "forward")
    in_forward = "RuntimeError (mine/nets.py, line 8, in forward): mat1 and mat2 shapes"
    assert in_forward in done.stderr.splitlines()[-1]
    status = Run(study, "forward").status()
    assert in_forward in "\n".join(our_lines(status.outcome, status))
    done = flowjobs(
        *("submit", "--cluster", "local", "--name", "init"),
        *(*options, "mine.nets:Net", "--arch-args", "sizes=(2,3)"),
    )
    assert done.returncode == 1
    *_, hint, last = done.stderr.splitlines()
    assert last.startswith("failed: RuntimeError (mine/nets.py, line 6, in __init__): The size")
    assert hint.endswith("flowjobs logs init")
    assert "nets.py, line 6" in flowjobs("status", "init").stdout
    done = flowjobs("train", *options, "mine.torn:Net")
    assert "mine/torn.py:2: '(' was never closed" in done.stderr.splitlines()[-1]
