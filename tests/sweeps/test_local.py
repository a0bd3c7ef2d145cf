"""A sweep on this machine."""

from pathlib import Path

import pytest

from flowjobs.config import RunConfig, SlurmConfig, TrackingConfig, TrainingConfig
from flowjobs.errors import ConfigError
from flowjobs.jobs.run_stages import Member, Stage
from flowjobs.jobs.snapshot import CodePlan
from flowjobs.runs.run import Run
from flowjobs.sweeps.grid import Sweep
from flowjobs.sweeps.local import Event, gpus_of_slot, run_here, slots_here
from flowjobs.sweeps.saved import save_sweep
from tests.cluster.waiting import wait_until
from tests.conftest import Command


def test_each_run_has_gpus_of_its_own_while_there_are_as_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-11,GPU-12,3,4")
    two = SlurmConfig(gpus_per_node=2)
    assert slots_here(two) == 2
    assert [gpus_of_slot(two, slot) for slot in range(3)] == [
        *(["0", "GPU-11"], ["GPU-12", "3"], ["0", "GPU-11"])
    ]
    assert slots_here(SlurmConfig()) == 5
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert (slots_here(SlurmConfig()), gpus_of_slot(SlurmConfig(), 1)) == (1, [])
    with pytest.raises(ConfigError, match="--gpus-per-node: found 2, this machine has 0"):
        slots_here(two)


@pytest.mark.parametrize("stage", ["to resume", "cancelled"])
def test_what_is_cancelled_while_it_waits_for_a_slot_is_left_alone(
    study: Path, stage: Stage
) -> None:
    runs, config = [Run(study, name) for name in "ab"], RunConfig(TrainingConfig())
    for run in runs:
        run.create(config)
    if stage == "cancelled":
        runs[1].request_cancel()
    (runs[0].folder / ".config.lock").unlink(missing_ok=True)
    (runs[0].folder / ".config.lock").mkdir()  # nobody can lock it
    members = [Member(run, config, stage) for run in runs]
    sweep = run_here(members, [CodePlan(run) for run in runs], 1)
    refused = next(sweep)
    assert refused is not None
    assert refused.what == "not started"
    runs[1].request_cancel()
    assert next(sweep) == Event(runs[1], "left alone", "it was cancelled meanwhile")
    assert runs[1].cancel_requested()


def test_what_fails_here_is_said_and_the_others_are_trained(
    flowjobs: Command, workplace: Path
) -> None:
    (workplace / "nets.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, dim, fails):\n"
        "        super().__init__()\n"
        "        self.fails, self.layer = fails, torch.nn.Linear(dim, dim)\n"
        "    def forward(self, x, t):\n"
        "        if self.fails:\n"
        "            raise ValueError('as it was told')\n"
        "        return self.layer(x)\n"
    )
    sweep = ("sweep", "--arch", "nets:Net", "--arch-args", "fails=True", "fails=False")
    sweep += ("--epochs", "1", "--wandb-mode", "disabled", "--cluster", "local", "--parallel", "2")
    done = flowjobs(*sweep)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Net-icfm-digits-none-failsFalse finished" in done.stdout
    assert "Net-icfm-digits-none-failsTrue failed: ValueError (nets.py, line 8" in done.stdout
    planned = flowjobs("sweep", "ablation", "--cluster", "local")
    assert planned.returncode == 0
    assert "failed     1: 1 exception (Net-icfm-digits-none-failsTrue);" in planned.stdout
    assert "flowjobs retry ablation --cluster local starts them again" in planned.stdout

    # It had not trained a step, so it is begun with the code as it is now; the other one keeps its.
    net = workplace / "nets.py"
    net.write_text(net.read_text().replace("if self.fails", "if False"))
    assert flowjobs("retry", "ablation", "--cluster", "local").returncode == 0
    grown = flowjobs(*sweep, "--seed", "0", "1", "--dry-run")
    assert "finished   2\nnew        2\n" in grown.stdout, grown.stdout + grown.stderr
    assert "other code than the new ones: Net-icfm-digits-none-failsFalse\n" in grown.stdout


# submitit keeps no hold of the process that it starts: a job outlives who submits it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_error_of_the_file_system_at_one_run_ends_neither_the_sweep_nor_another_run(
    study: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = TrackingConfig(wandb_mode="disabled")
    config = RunConfig(TrainingConfig(epochs=1), SlurmConfig(gpus_per_node=0), tracking)
    runs = [Run(study, name) for name in ("a", "b", "c")]
    (runs[0].folder / ".config.lock").mkdir(parents=True)  # nobody can lock it
    members = [Member(run, config, "new") for run in runs]
    sweep = run_here(members, [CodePlan(run) for run in runs], parallel=2)
    refused, *started = next(sweep), next(sweep), next(sweep)
    assert refused is not None
    assert (refused.run, refused.what) == (runs[0], "not started")
    assert "Is a directory" in refused.why
    assert started == [Event(run, "started") for run in runs[1:]]
    for run in runs[1:]:
        run.jobs_file.rename(workplace / run.name)
        run.jobs_file.symlink_to(run.jobs_file)  # it cannot be read, as of a server that is away
    assert [next(sweep), next(sweep)] == [None, None]
    (workplace / "b").replace(runs[1].jobs_file)
    monkeypatch.setattr("flowjobs.sweeps.local.AWAY_AT_MOST_S", 0.0)
    events = {event.run: event for event in filter(None, sweep)}
    unknown, ended = events[runs[2]], events[runs[1]]
    assert (unknown.run, unknown.what) == (runs[2], "unknown")
    assert "whether it still trains cannot be read ([Errno 40]" in unknown.why
    wait_until(runs[2].finished, "the run that is unknown to end", 60)
    assert (ended.run, ended.what) == (runs[1], "ended")
    assert ended.status is not None
    assert ended.status.state == "finished"


def test_a_name_means_a_sweep_or_a_run_and_not_both(flowjobs: Command, study: Path) -> None:
    options = ("--cluster", "local", "--wandb-mode", "disabled", "--dry-run")
    Run(study, "mine").create(RunConfig())
    save_sweep(study, "ablation", Sweep(), ["mine"])
    for words, said in (
        (["sweep", "--seed", "0", "--name", "mine"], "found mine, which a run in"),
        (["sweep", "--seed", "0", "--name", "mlp-icfm-digits-none"], "one of its runs"),
        (["sweep", "--seed", "0", "1", "--name", ""], "the sweep's name: --name: found ''"),
        (["sweep", "--seed", "0", "1", "--mps"], "--mps: expected --runs-per-gpu 2 or more"),
        (["submit", "--name", "ablation"], "found ablation, which a sweep in"),
    ):
        done = flowjobs(*words, *options)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    done = flowjobs("sweep", "--seed", "0", "1", "--no-evaluate", "--name", "other", *options)
    assert "new        2\n" in done.stdout, done.stderr
