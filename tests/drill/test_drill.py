"""`flowjobs drill` on the real Slurm and on this machine: what it finds, and what it says of it."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from flowjobs.cli.defaults import load_defaults
from flowjobs.cli.drill import Drill
from flowjobs.config import (
    BUILT_IN_ARCHS,
    BUILT_IN_FLOWS,
    Augmentation,
    RunConfig,
    SlurmConfig,
    TrainingConfig,
)
from flowjobs.drill.facts import ClusterFacts, shortfalls
from flowjobs.drill.probe import NodeAnswer
from flowjobs.drill.run import Queued
from flowjobs.drill.run import drill as drill_runs
from flowjobs.errors import SubmissionUnknownError
from flowjobs.field_values import KeyValues
from flowjobs.slurm.controller import JobRow
from flowjobs.training.same_bits import equal_to_the_bit
from tests.cluster.slurm import SlurmCluster
from tests.cluster.waiting import wait_until
from tests.conftest import Command

REPOSITORY = Path(__file__).parents[2]
STEPS = ("--steps", "1000")
LOCAL = ("--cluster", "local", "--gpus-per-node", "0")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


def drill(flowjobs: Command, *options: str) -> tuple[int, dict[str, Any]]:
    done = flowjobs("drill", "--json", *options, timeout_s=3500)
    assert done.returncode in (0, 1), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, found


def test_on_slurm_every_interruption_ends_in_the_same_bits(
    slurm: SlurmCluster, flowjobs: Command, study: Path
) -> None:
    what = ("--flow", "vpcfm", "--arch", "dit", "--aug", "noise")
    code, found = drill(flowjobs, "--partition", "preempt", *what, *STEPS)
    assert code == 0, found
    rows = {row["way"]: row for row in found["rows"]}
    assert {way: (row["signal"], row["resumed_as"]) for way, row in rows.items()} == {
        "user signal": ("SIGUSR2", "same job"),
        "TERM": ("SIGTERM", "same job"),
        "requeue": ("SIGTERM", "same job"),
        "SIGKILL": ("SIGKILL", "same job"),
    }
    assert all(row["same_bits"] for row in rows.values())
    assert [rows[way]["steps_lost"] for way in ("user signal", "TERM", "requeue")] == [0, 0, 0]
    facts = found["facts"]
    assert facts["scheduler"].startswith("Slurm ")
    assert (facts["partition"], facts["preempt_mode"]) == ("preempt", "REQUEUE")
    assert (facts["grace_s"], facts["kill_wait_s"]) == (20, 20)
    assert facts["user_signal"] is facts["requeue"] is facts["accounting"] is True
    node = facts["node"]
    assert node["commands"] is node["sees_our_lock"] is node["we_see_its_lock"] is True
    assert found["shortfalls"] == []
    assert slurm.run("squeue", "-h") == ""
    assert list(study.iterdir()) == []


@pytest.mark.long
def test_where_requeuing_is_forbidden_it_says_that_runs_get_new_jobs(
    slurm: SlurmCluster, flowjobs: Command
) -> None:
    options = ("--sbatch", "no-requeue=True", "--flow", "fm", "--aug", "dropout")
    code, found = drill(flowjobs, "--partition", "preempt-nograce", *options, *STEPS)
    assert code == 0, found
    assert [row["way"] for row in found["rows"]] == ["user signal", "TERM", "SIGKILL"]
    assert all(row["resumed_as"].startswith("new job ") for row in found["rows"])
    assert all(row["same_bits"] for row in found["rows"])
    no_grace, forbidden = (shortfall["what"] for shortfall in found["shortfalls"])
    assert no_grace.startswith("GraceTime 0")
    assert forbidden.startswith("requeuing is forbidden")


@pytest.mark.long
def test_on_this_machine_it_drills_the_local_executor(flowjobs: Command, study: Path) -> None:
    what = ("--flow", "otcfm", "--arch", "unet", "--aug", "mixup")
    done = flowjobs("drill", *LOCAL, *what, *STEPS, timeout_s=3500)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(
        r"^ (.*?)  +(SIG\w+)  +(.*?)  +\d+ .* yes +$", done.stdout, flags=re.MULTILINE
    )
    assert rows == [
        ("user signal", "SIGUSR2", "same job"),
        ("TERM", "SIGTERM", "submitted again"),
        ("SIGKILL", "SIGKILL", "submitted again"),
    ]
    assert done.stdout.endswith("as promised\n")
    assert list(study.iterdir()) == []


@pytest.mark.long
@pytest.mark.parametrize("flow", [name for name in BUILT_IN_FLOWS if name != "reflow"])
@pytest.mark.parametrize("arch", BUILT_IN_ARCHS)
@pytest.mark.parametrize("aug", get_args(Augmentation))
def test_each_combination_ends_in_the_same_bits(
    flowjobs: Command, flow: str, arch: str, aug: str
) -> None:
    what = ("--flow", flow, "--arch", arch, "--aug", aug)
    steps = {"mlp": "700", "unet": "500", "dit": "250"}[arch]  # a few seconds
    code, found = drill(flowjobs, *LOCAL, *what, "--steps", steps)
    assert code == 0, found


@pytest.mark.long
@pytest.mark.parametrize(
    ("flow", "arch", "aug", "steps"),
    [
        ("sbcfm", "mlp", "mixup", "1200"),  # each step solves an entropic plan
        ("otcfm", "unet", "dropout", "8000"),
        ("fm", "dit", "noise", "8000"),
    ],
)
def test_on_slurm_a_time_limit_too(
    slurm: SlurmCluster, flowjobs: Command, flow: str, arch: str, aug: str, steps: str
) -> None:
    what = ("--flow", flow, "--arch", arch, "--aug", aug)
    options = ("--partition", "preempt", "--timeout-min", "1", "--time-limit", "--steps", steps)
    code, found = drill(flowjobs, *options, *what)
    assert code == 0, found
    assert "time limit" in {row["way"] for row in found["rows"]}


@pytest.mark.long
def test_a_run_that_ends_with_other_bits_fails_the_drill(flowjobs: Command) -> None:
    code, found = drill(flowjobs, *LOCAL, *STEPS, "--arch", "tests.jobs.clock_model:ClockModel")
    assert code == 1
    assert [row["same_bits"] for row in found["rows"]] == [False] * 3
    assert "last.pt: model_state_dict" in found["rows"][0]["problem"]
    assert Path(found["folder"]).is_dir()


@pytest.mark.long
def test_a_run_that_ends_before_it_is_interrupted_fails_the_drill(flowjobs: Command) -> None:
    done = flowjobs("drill", *LOCAL, "--steps", "20")
    assert done.returncode == 1
    assert "TERM: finished before it was interrupted: give it more --steps" in done.stdout
    assert "not as promised; runs and logs are in " in done.stdout


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(other, marks=pytest.mark.long) for other in (signal.SIGHUP, signal.SIGINT)),
    ],
)
def test_what_ends_it_leaves_no_jobs_behind(
    slurm: SlurmCluster, study: Path, number: signal.Signals
) -> None:
    patient = "from flowjobs.drill import run; run.CANCEL_WAIT_S = 600.0"
    command = "from flowjobs.cli import main; main(['drill'])"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{patient}; {command}"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: len(slurm.run("squeue", "-h").splitlines()) >= 3, "its jobs", 240)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 130
    # Also where nothing is redrawn. The steps of runs that train are no news.
    lines = said.splitlines()
    assert lines[0] == "submitting"
    assert [line.partition(" ")[0] for line in lines[1:-2]] == ["undisturbed"] * (len(lines) - 3)
    assert lines[-2:] == ["ending the drill's jobs, up to 600 s", "cancelled the drill's jobs"]
    assert slurm.run("squeue", "-h") == ""


def test_a_job_that_is_held_as_it_was_requeued_waits_for_what_never_comes() -> None:
    row = JobRow("7", "SPECIAL_EXIT", 0, "", "", 0.0, reason="job requeued in held state")
    queued = Queued()
    queued.look([row])
    assert queued.waits is not None
    assert queued.waits.stuck
    queued.look([replace(row, state="RUNNING", reason="None")])
    assert (queued.waits, queued.never_starts) == (None, False)


def test_jobs_that_can_never_start_end_it_and_if_not_known_to_be_cancelled_keep_their_folder(
    slurm: SlurmCluster,
    study: Path,
    site: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flowjobs.drill.run.CANCEL_WAIT_S", 0.5)
    monkeypatch.setattr("flowjobs.drill.run.ASK_SLURM_EVERY_S", 0.1)
    site("scancel", "exit 1")
    held = RunConfig(TrainingConfig(), SlurmConfig(sbatch=KeyValues({"hold": True})))

    shown: list[str] = []

    def say(state: str, words: str) -> None:
        shown.append(words)
        if words.startswith("undisturbed waits held") and "a node waits held" in words:
            monkeypatch.setattr("flowjobs.drill.run.STUCK_S", 0.0)  # its user has read it

    study.mkdir()
    with pytest.raises(SubmissionUnknownError, match="not known to have") as said:
        drill_runs(study / "drill-1", "slurm", held, time_limit=False, say=say)
    assert "ended (a job of the drill waits held by its user: `scontrol" in str(said.value)
    jobs = sorted(slurm.run("squeue", "-h", "-o", "%i").split(), key=int)
    assert f": scancel {' '.join(jobs)}; then remove {study}/drill-1" in str(said.value)
    waits, ending = shown[-2:]
    assert waits.startswith("undisturbed waits held by its user: `scontrol release ")
    assert "the probe of a node waits held by its user" in waits
    assert ending == "ending the drill's jobs, up to 0 s"


def test_bad_input_leaves_nothing(slurm: SlurmCluster, flowjobs: Command, study: Path) -> None:
    done = flowjobs("drill", *LOCAL, "--time-limit")
    assert (done.returncode, study.exists()) == (2, False)
    assert done.stderr == "error: --time-limit: expected Slurm, found this machine\n"
    done = flowjobs("drill", "--steps", "0")
    assert (done.returncode, study.exists()) == (2, False)
    assert done.stderr == "error: --steps: found 0, expected at least 1\n"
    done = flowjobs("drill", "--partition", "nowhere")
    assert (done.returncode, list(study.iterdir())) == (2, [])
    assert "--partition nowhere is not one of gpu, preempt" in done.stderr


def test_of_trainings_defaults_the_drill_takes_only_what_decides_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("flowjobs.toml").write_text(
        'partition = "preempt"\ncluster = "debug"\nepochs = 1\narch_args = { width = 4096 }\n'
    )
    monkeypatch.setenv("SBATCH_ACCOUNT", "lab")
    drill = Drill.with_defaults(load_defaults())
    assert (drill.slurm.partition, drill.slurm.account) == ("preempt", "lab")
    assert (drill.cluster, drill.steps, drill.arch_args) == ("auto", None, {})
    assert not drill.deterministic  # exact bits are drilled as the runs will compute, not better
    assert (drill.precision, drill.compile) == ("fp32", False)
    decide_bits = 'deterministic = true\nprecision = "bf16"\ncompile = true\n'
    Path("flowjobs.toml").write_text(decide_bits)
    drilled = Drill.with_defaults(load_defaults())._training(load_defaults())
    assert (drilled.deterministic, drilled.precision, drilled.compile) == (True, "bf16", True)


NODE = NodeAnswer("n1", True, "the controller answers", sees_our_lock=True, we_see_its_lock=True)
GOOD = ClusterFacts(
    scheduler="Slurm 24.05",
    study="/scratch/study",
    here="login",
    partition="gpu",
    preempt_type="preempt/partition_prio",
    preempt_mode="REQUEUE",
    grace_s=30.0,
    kill_wait_s=30.0,
    user_signal=True,
    job_requeue=True,
    requeue=True,
    accounting=True,
    node=NODE,
)


@pytest.mark.parametrize(
    ("facts", "said", "breaks"),
    [
        (replace(GOOD, grace_s=0.0), "GraceTime 0.* --checkpoint-every-s 30", False),
        (replace(GOOD, preempt_mode="CANCEL"), "PreemptMode CANCEL.* as a new job", False),
        (replace(GOOD, requeue=False), "forbidden.* new job ids.* --sbatch no-requeue", False),
        (replace(GOOD, accounting=False), "no accounting.* from the log", False),
        (replace(GOOD, node=None), "could not write to /scratch/study.*--study", True),
        (
            replace(GOOD, node=replace(NODE, commands=False, why="sbatch is not on PATH")),
            r"cannot be asked from n1 \(sbatch is not on PATH\).* time limit.* administrators",
            True,
        ),
        (
            replace(GOOD, node=replace(NODE, sees_our_lock=False)),
            "file locks do not hold between login and n1",
            True,
        ),
        (
            replace(GOOD, node=replace(NODE, we_see_its_lock=False)),
            "file locks do not hold between login and n1",
            True,
        ),
    ],
)
def test_for_each_bad_fact_it_says_what_to_set(
    facts: ClusterFacts, said: str, breaks: bool
) -> None:
    (shortfall,) = shortfalls(facts)
    assert re.search(said, shortfall.what)
    assert shortfall.breaks is breaks


@pytest.mark.parametrize(
    "facts",
    [
        GOOD,
        replace(GOOD, preempt_mode="OFF", grace_s=0.0),
        ClusterFacts("Slurm of unknown version", "/scratch/study", "login", node=NODE),
    ],
)
def test_nothing_is_said_of_what_is_good_or_unknown(facts: ClusterFacts) -> None:
    assert shortfalls(facts) == []


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta")
def test_one_bit_is_a_difference() -> None:
    one = {"a": [torch.tensor([0.0, 1.0])], "step": 3}
    assert equal_to_the_bit(one, {"a": [torch.tensor([0.0, 1.0])], "step": 3})
    assert not equal_to_the_bit(one, {"a": [torch.tensor([-0.0, 1.0])], "step": 3})
    assert not equal_to_the_bit(one, {"a": [torch.tensor([0.0, 1.0]).double()], "step": 3})
    assert not equal_to_the_bit(one, {"a": [torch.tensor([0.0, 1.0])], "step": 4})
    nan = torch.tensor(float("nan"))
    assert equal_to_the_bit(nan, nan.clone())
    dense = torch.eye(4)
    other = dense.clone()
    other[1, 1] = torch.nextafter(other[1, 1], torch.tensor(2.0))
    for layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc):
        sparse = dense.to_sparse(layout=layout)
        assert equal_to_the_bit(sparse, dense.to_sparse(layout=layout))
        assert not equal_to_the_bit(sparse, other.to_sparse(layout=layout))
        assert not equal_to_the_bit(sparse, dense)
        assert not equal_to_the_bit(sparse, dense.roll(1, 0).to_sparse(layout=layout))
