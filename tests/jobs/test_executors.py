import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flowjobs.config import RunConfig, SlurmConfig
from flowjobs.errors import ConfigError, SubmissionError
from flowjobs.field_values import KeyValues
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


def test_a_script_of_plain_sbatch_ends_its_ranks_as_a_batch_file_does(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    srun = workplace / "srun"
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o700)
    monkeypatch.setenv("PATH", f"{workplace}:{os.environ['PATH']}")
    command = [sys.executable, "-m", "flowjobs.cli.batch_script", "--epochs", "1"]
    given = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--kill-on-bad-exit --wait=0 " in given
    assert "--kill-on-bad-exit --wait=0 " in RECORDED.read_text()


def test_the_batch_file_names_the_signal_that_jobs_listen_to(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a process that has SUBMITIT_PREEMPT_SIGNAL=USR1.
    monkeypatch.setattr("submitit.core.job_environment.JobEnvironment.USR_SIG", "USR1")
    run = Run(study, "a")
    run.create(RunConfig())
    assert "#SBATCH --signal=USR2@90\n" in executors.slurm_executor(run, SlurmConfig()).batch_file()


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


# As scontrol says it where there is no slurm.conf: the controller is looked for in the DNS.
NO_SERVER = """scontrol: error: resolve_ctls_from_dns_srv: res_nsearch error: {}
scontrol: error: fetch_config: DNS SRV lookup failed
scontrol: error: _establish_config_source: failed to fetch config
scontrol: fatal: Could not establish a configuration source"""
SERVER_AWAY = """scontrol: error: _fetch_child: failed to fetch remote configs: \
Unable to contact slurm controller (connect failure)
scontrol: error: _establish_config_source: failed to fetch config
scontrol: fatal: Could not establish a configuration source"""


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Slurmctld(primary) at a is DOWN; Slurmctld(backup) at b is UP", "slurm"),
        ("GROUP: Slurmctld(primary) at a is DOWN", "--cluster local"),
        (NO_SERVER.format("Unknown host"), "local"),
        (NO_SERVER.format("No address associated with name"), "local"),
        (NO_SERVER.format("Host name lookup failure"), "--cluster local"),
        (SERVER_AWAY, "--cluster local"),
        ("SLURM_CONF: " + NO_SERVER.format("Unknown host"), "--cluster local"),
        ("fatal: Unable to process configuration file", "--cluster local"),
        ("not for users of this cluster", "--cluster local"),
    ],
)
def test_a_run_for_a_cluster_is_not_trained_here_while_the_controller_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, expected: str
) -> None:
    for command in ("sbatch", "scontrol"):
        code = 0 if "is UP" in said else 1
        (tmp_path / command).write_text(f"#!/bin/sh\necho '{said}'; exit {code}\n")
        (tmp_path / command).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    if said.startswith("SLURM_CONF"):  # there is a cluster, whose settings cannot be read now
        monkeypatch.setenv("SLURM_CONF", "/nonexistent/slurm.conf")
    if expected in ("slurm", "local"):
        assert executors.choose_cluster("auto")[0] == expected
    else:
        with pytest.raises(SubmissionError, match=expected):
            executors.choose_cluster("auto")


def test_this_machine_has_one_node_and_so_many_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert executors.check_local(SlurmConfig(gpus_per_node=2)) == ["2", "3"]
    with pytest.raises(ConfigError, match="--gpus-per-node: found 3, this machine has 2"):
        executors.check_local(SlurmConfig(gpus_per_node=3))
    with pytest.raises(ConfigError, match="--nodes: found 2"):
        executors.check_local(SlurmConfig(nodes=2))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    assert executors.check_local(SlurmConfig()) == ["MIG-a"]
    with pytest.raises(ConfigError, match="sees one MIG instance only"):
        executors.check_local(SlurmConfig(gpus_per_node=2))


@pytest.mark.parametrize(
    ("named", "seen"),
    [
        ("0, 1", ["0", "1"]),
        ("1,-1,0", ["1"]),
        ("-1", []),
        ("", []),
        ("NoDevFiles", []),
        ("MIG-GPU-5f/1/0", ["MIG-GPU-5f/1/0"]),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,1", None),
    ],
)
def test_gpus_are_those_that_cuda_would_see(
    monkeypatch: pytest.MonkeyPatch, named: str, seen: list[str] | None
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert executors.visible_gpus() == (named.split(",") if seen is None else seen)


def test_gpus_are_found_where_a_container_has_their_devices_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("flowjobs.slots.GPUS_OF_NVIDIA", tmp_path / "gpus")
    monkeypatch.setattr("flowjobs.slots.DEVICES", tmp_path)
    for name in ("nvidia0", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr("flowjobs.slots._has_driver", lambda: False)
    assert executors.visible_gpus() == []  # the devices are left of one that is gone
    monkeypatch.setattr("flowjobs.slots._has_driver", lambda: True)
    assert executors.visible_gpus() == ["0", "1"]  # CUDA counts those that are there
    (tmp_path / "gpus/0000:01:00.0").mkdir(parents=True)
    assert executors.visible_gpus() == ["0"]


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_a_job_on_this_machine_gets_its_gpus_by_their_names(
    study: Path, monkeypatch: pytest.MonkeyPatch, asked: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937-d72c,GPU-1f0d3c6e-aaaa,GPU-3")
    run = Run(study, "a")
    run.create(RunConfig())
    executor = executors.here_executor("local", run, SlurmConfig(gpus_per_node=asked))
    job = executor.submit(os.getenv, "CUDA_VISIBLE_DEVICES")
    expected = ",".join(["GPU-8932f937-d72c", "GPU-1f0d3c6e-aaaa"][:asked])
    assert job.results() == [expected] * max(1, asked)


def test_a_short_time_limit_leaves_time_to_save() -> None:
    assert SlurmConfig(timeout_min=1).signal_before_end_s == 30
    assert SlurmConfig(timeout_min=60).signal_before_end_s == 90
    assert SlurmConfig().signal_before_end_s == 90
