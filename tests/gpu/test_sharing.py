"""Runs that share one GPU: what ends one of them there leaves the others their bits."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from flowjobs.config import RestartConfig, RunConfig, SlurmConfig, TrackingConfig, TrainingConfig
from flowjobs.errors import ConfigError
from flowjobs.field_values import KeyValues
from flowjobs.jobs.mps import PIPE_FOLDER, mps_daemon
from flowjobs.jobs.submit import SubmittedJob, submit
from flowjobs.jobs.tasks import task_of
from flowjobs.runs.pack import Pack, new_pack
from flowjobs.runs.run import Run
from flowjobs.training.checkpoint import read_checkpoint
from tests.cluster.waiting import wait_until
from tests.jobs.disturbed import REPOSITORY, assert_equal_to
from tests.jobs.test_packing import attempts_of, explain, status_of, tell

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

# A client of MPS may hang where another one was killed: the test ends then, and says so.
WITHIN_S = 90.0


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of this machine find the tests' models and what is installed, and see one GPU."""
    paths = [str(REPOSITORY), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def made(study: Path, name: str, retries: int = 0, *, mps: bool = False) -> Run:
    """A run with a file of its own that says what its model does; see HeldModel."""
    training = TrainingConfig(
        arch="tests.gpu.held_model:HeldModel",
        epochs=4,
        batch_size=128,
        arch_args=KeyValues(control=f"control-{name}"),
        deterministic=True,
        evaluate=False,
        cuda_graph=False,  # a step that is replayed calls no model
    )
    run = Run(study, name)
    tracking = TrackingConfig(wandb_mode="disabled")
    run.create(RunConfig(training, SlurmConfig(mps=mps), tracking, RestartConfig(retries=retries)))
    return run


@contextmanager
def trained_alone(study: Path) -> Iterator[Run]:
    """The run that shares nothing and that nothing happens to; it has ended as the block does."""
    run = made(study, "alone")
    tell(run, "go on")
    with (study / "alone.log").open("wb") as log:
        command = [sys.executable, "-m", "flowjobs.jobs", str(run.folder)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield run
        assert process.wait(WITHIN_S) == 0, (study / "alone.log").read_text()
    finally:
        process.kill()
        process.wait()


def submitted(runs: list[Run]) -> tuple[Pack, SubmittedJob]:
    """A job of this machine that trains all of them at once."""
    pack = new_pack(runs[0].study, "pack", runs, len(runs), runs[0].asked())
    return pack, submit(pack, "local", task_of(pack))


def wait_for(reached: Callable[[], bool], what: str, pack: Pack) -> None:
    wait_until(reached, what, WITHIN_S, explain(pack), at_least_s=0)


def wait_until_held(pack: Pack, *runs: Run) -> None:
    """Waits until each of them is held in its step, and computes there."""

    def reached() -> bool:
        return all(Path(f"control-{run.name}-there").exists() for run in runs)

    wait_for(reached, "the runs to train", pack)


def wait_until_dead(pack: Pack, run: Run) -> None:
    def reached() -> bool:
        return status_of(run).attempts[0].ended is not None

    wait_for(reached, f"{run.name} to be dead", pack)


def computed_on(run: Run) -> str:
    return str(read_checkpoint(run.last)["computed_with"]["device"])


def test_each_death_on_a_shared_gpu_is_told_apart_and_the_others_keep_their_bits(
    study: Path,
) -> None:
    with trained_alone(study) as alone:
        deaths = {"raise": 1, "kill": 0, "memory": 1, "index": 1}
        dead = {how: made(study, how, retries) for how, retries in deaths.items()}
        others = [made(study, name) for name in ("a", "b")]
        pack, job = submitted([*dead.values(), *others])
        wait_until_held(pack, *dead.values(), *others)
        for how, run in dead.items():
            tell(run, how)
            wait_until_dead(pack, run)
            if how == "memory":
                tell(run, "go on")  # when it starts again
        for run in others:
            assert status_of(run).state == "running", explain(pack)()
            tell(run, "go on")
        wait_for(lambda: not job.alive(pack), "the job to end", pack)
    words = explain(pack)()
    assert computed_on(alone) == torch.cuda.get_device_name(), words
    for run in others:
        assert attempts_of(run) == [("finished", "")], words
        assert_equal_to(alone, run)
    # The one that ran out of memory is the only one that its --retries started again.
    assert attempts_of(dead["memory"]) == [("preempted", "out of memory"), ("finished", "")], words
    assert_equal_to(alone, dead["memory"])
    assert attempts_of(dead["raise"]) == [("failed", "exception")], words
    assert status_of(dead["raise"]).reason.startswith("ValueError"), words
    assert attempts_of(dead["kill"]) == [("failed", "killed")], words
    assert attempts_of(dead["index"]) == [("failed", "exception")], words
    assert "device-side assert" in status_of(dead["index"]).reason, words


@pytest.fixture
def mps() -> None:
    """Skips where the machine has no MPS, or it does not serve here."""
    try:
        with mps_daemon() as variables:
            serves = Path(variables[PIPE_FOLDER], "server.log").exists()
    except ConfigError as error:
        pytest.skip(str(error))
    if not serves:
        pytest.skip("MPS: its daemon starts no server, and its clients compute without")


@pytest.mark.usefixtures("mps")
def test_by_mps_whom_a_death_takes_along_starts_again_and_ends_with_its_bits(study: Path) -> None:
    with trained_alone(study) as alone:
        kinds = {"index": "exception", "kill": "killed"}
        for how, kind in kinds.items():  # in turns: one daemon at a time
            # With retries left, only its kind says that a mistake is not tried again.
            dead = made(study, how, retries=2 if how == "index" else 0, mps=True)
            others = [made(study, f"{name}-{how}", retries=2, mps=True) for name in ("a", "b")]
            pack, job = submitted([dead, *others])
            wait_until_held(pack, dead, *others)
            pid = status_of(dead).attempts[-1].job.pid
            assert PIPE_FOLDER in Path(f"/proc/{pid}/environ").read_text(), explain(pack)()
            tell(dead, how)
            wait_until_dead(pack, dead)
            for run in (dead, *others):
                tell(run, "go on")
            wait_for(lambda job=job, pack=pack: not job.alive(pack), "the job to end", pack)
            words = explain(pack)()
            for run in others:
                *interrupted, last = attempts_of(run)
                print(f"{run.name}: {interrupted or 'not interrupted'}, {last}")
                assert set(interrupted) <= {("preempted", "lost GPU")}, words
                assert last == ("finished", ""), words
            assert attempts_of(dead) == [("failed", kind)], words
    for how in kinds:
        for name in ("a", "b"):
            assert_equal_to(alone, Run(study, f"{name}-{how}"))
