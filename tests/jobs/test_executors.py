import re
import sys
from pathlib import Path

import pytest

from flowjobs.config import KeyValues, RunConfig, SlurmConfig
from flowjobs.errors import ConfigError, SubmissionError
from flowjobs.jobs import executors
from flowjobs.runs.run import Run

RECORDED = Path(__file__).with_name("batch_file.sh")


def test_the_batch_file_is_the_recorded_one(study: Path) -> None:
    run = Run(study, "mlp-icfm-digits-none")
    run.create(RunConfig())
    asked = SlurmConfig(
        partition="preempt",
        account="lab",
        qos="low",
        constraint="a100|h100",
        exclude="n1,n7",
        nodes=2,
        gpus_per_node=4,
        cpus_per_task=8,
        mem_gb=1.5,
        timeout_min=90,
        signal_delay_s=120,
        comment="two words",
        sbatch=KeyValues({"reservation": "course", "exclusive": True}),
    )
    text = executors.slurm_executor(run, asked).batch_file()
    text = text.replace(str(study), "STUDY").replace(sys.executable, "PYTHON")
    assert text == RECORDED.read_text()


def test_what_is_not_asked_for_is_left_to_the_cluster(study: Path) -> None:
    run = Run(study, "a")
    run.create(RunConfig())
    text = executors.slurm_executor(run, SlurmConfig(gpus_per_node=0)).batch_file()
    options = set(re.findall(r"^#SBATCH --([a-z-]+)", text, flags=re.MULTILINE))
    assert options == {
        "job-name",
        "nodes",
        "ntasks-per-node",
        "open-mode",
        "output",
        "requeue",
        "signal",
    }


def test_requeue_can_be_forbidden(study: Path) -> None:
    run = Run(study, "a")
    run.create(RunConfig())
    asked = SlurmConfig(sbatch=KeyValues({"no-requeue": True}))
    text = executors.slurm_executor(run, asked).batch_file()
    assert "--no-requeue" in text
    assert "#SBATCH --requeue" not in text


def test_a_gpu_type_goes_with_the_number(study: Path) -> None:
    run = Run(study, "a")
    run.create(RunConfig())
    text = executors.slurm_executor(run, SlurmConfig(gpus_per_node=2, gpu_type="a100")).batch_file()
    assert "#SBATCH --gpus-per-node=a100:2" in text
    on_cpu = SlurmConfig(gpus_per_node=0, gpu_type="a100")
    assert "--gpus" not in executors.slurm_executor(run, on_cpu).batch_file()


def test_without_sbatch_auto_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert executors.choose_cluster("auto") == ("local", "sbatch is not on PATH")
    with pytest.raises(SubmissionError, match="sbatch is not on PATH; submit from a login node"):
        executors.choose_cluster("slurm")


def test_this_machine_has_one_node_and_so_many_gpus(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    run = Run(study, "a")
    run.create(RunConfig())
    executor = executors.make_executor("local", run, SlurmConfig(gpus_per_node=2))
    assert executor.parameters["visible_gpus"] == [2, 3]
    with pytest.raises(ConfigError, match="--gpus-per-node: found 3, this machine has 2"):
        executors.make_executor("local", run, SlurmConfig(gpus_per_node=3))
    with pytest.raises(ConfigError, match="--nodes: found 2"):
        executors.make_executor("local", run, SlurmConfig(nodes=2))


def test_a_short_time_limit_leaves_time_to_save() -> None:
    assert SlurmConfig(timeout_min=1).signal_before_end_s == 30
    assert SlurmConfig(timeout_min=60).signal_before_end_s == 90
    assert SlurmConfig().signal_before_end_s == 90
