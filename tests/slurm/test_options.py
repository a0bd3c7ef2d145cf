"""What flowjobs makes of sbatch's own environment variables."""

from typing import Any

import pytest

from flowjobs.config import SlurmConfig
from flowjobs.field_values import KeyValues
from flowjobs.slurm.options import (
    environment_for_sbatch,
    fields_from,
    gigabytes,
    minutes,
    seconds_before_end,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        ("1:30", 2),
        ("1:30:00", 90),
        ("2-12", 3600),
        ("1-0:30", 1470),
        ("1-1:1:1", 1502),
    ],
)
def test_sbatchs_time_limits(text: str, expected: int) -> None:
    assert minutes(text) == expected


def test_a_surrounding_job_does_not_leak_into_sbatch() -> None:
    kept = environment_for_sbatch(
        {
            "PATH": "/bin",
            "SLURM_CONF": "/etc/slurm.conf",
            "SLURM_JOB_ID": "7",
            "SLURM_MEM_PER_NODE": "1",
            "SUBMITIT_EXECUTOR": "slurm",
            "SBATCH_RESERVATION": "course",
            "SBATCH_PARTITION": "in the batch file",
            "SBATCH_QOS": "not in the batch file",
            "SBATCH_OUTPUT": "elsewhere",
        },
        SlurmConfig(partition="gpu"),
    )
    assert set(kept) == {"PATH", "SLURM_CONF", "SBATCH_RESERVATION", "SBATCH_QOS"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4000M", 4000 / 1024), ("4000", 4000 / 1024), ("2G", 2), ("2g", 2), ("1T", 1024)],
)
def test_sbatchs_sizes(text: str, expected: float) -> None:
    assert gigabytes(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("USR2@60", 60), ("B:USR2@120", 120), ("USR2", 60), ("SIGTERM@30", 30), ("12@5", 5)],
)
def test_only_the_time_of_a_signal_is_taken_over(text: str, expected: int) -> None:
    assert seconds_before_end(text) == expected


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SBATCH_GPUS_PER_NODE": "2"}, {"gpus_per_node": 2}),
        ({"SBATCH_GPUS_PER_NODE": "a100:2"}, {"gpus_per_node": 2, "gpu_type": "a100"}),
        ({"SBATCH_GRES": "lustre:1,gpu:a100:2"}, {"gpus_per_node": 2, "gpu_type": "a100"}),
        ({"SBATCH_GRES": "gpu:a100"}, {"gpus_per_node": 1, "gpu_type": "a100"}),
        ({"SBATCH_GRES": "gpu"}, {"gpus_per_node": 1}),
        ({"SBATCH_GRES": "lustre:1"}, {}),
        ({"SBATCH_GPUS": "4", "SBATCH_GPUS_PER_NODE": "2"}, {"gpus_per_node": 2}),
        ({"SBATCH_GPUS": "4"}, {"gpus_per_node": 4}),
        ({"SBATCH_CPUS_PER_GPU": "8"}, {"cpus_per_task": 8}),
        ({"SBATCH_MEM_PER_NODE": "2G"}, {"mem_gb": 2.0}),
        ({"SBATCH_SIGNAL": "B:USR2@60"}, {"signal_delay_s": 60}),
        # Not understood, so that no file's value takes its place.
        ({"SBATCH_MEM_PER_NODE": "0"}, {"mem_gb": None}),
        ({"SBATCH_MEM_PER_CPU": "1G"}, {"mem_gb": None}),
        ({"SBATCH_TIMELIMIT": "UNLIMITED"}, {"timeout_min": None}),
        ({"SBATCH_GRES": "gpu:a100:1,gpu:h100:1"}, {"gpus_per_node": None}),
        ({"SBATCH_SIGNAL": "soon, please"}, {"signal_delay_s": None}),
        ({"SBATCH_CPUS_PER_GPU": "0"}, {"cpus_per_task": None}),
    ],
)
def test_a_variable_means_a_field(variables: dict[str, str], expected: dict[str, Any]) -> None:
    assert {name: value for name, (_, value) in fields_from(variables).items()} == expected


def left_for_sbatch(variables: dict[str, str], **asked: Any) -> dict[str, str]:
    return environment_for_sbatch(variables, SlurmConfig(**asked))


def test_what_the_batch_file_always_says_is_hidden() -> None:
    names = ("GPUS_PER_NODE", "GPUS", "SIGNAL", "JOB_NAME", "GPUS_PER_TASK", "WAIT")
    variables = {f"SBATCH_{name}": "1" for name in names}
    assert left_for_sbatch(variables) == {}
    assert left_for_sbatch(variables, gpus_per_node=0) == {}


def test_memory_is_asked_for_in_one_way() -> None:
    variables = {"SBATCH_MEM_PER_NODE": "0", "SBATCH_MEM_PER_CPU": "1G", "SBATCH_MEM_PER_GPU": "9"}
    assert left_for_sbatch(variables) == variables
    assert left_for_sbatch(variables, mem_gb=4) == {}


def test_resources_beside_gpus_stay() -> None:
    assert left_for_sbatch({"SBATCH_GRES": "gpu:2,lustre:1"}) == {"SBATCH_GRES": "lustre:1"}
    assert left_for_sbatch({"SBATCH_GRES": "gpu:2"}) == {}


def test_an_option_that_is_passed_through_wins_over_its_variable() -> None:
    variables = {"SBATCH_RESERVATION": "a", "SBATCH_NO_REQUEUE": "", "SBATCH_EXCLUSIVE": "user"}
    assert left_for_sbatch(variables) == variables
    options = KeyValues({"reservation": "b", "requeue": True})
    assert left_for_sbatch(variables, sbatch=options) == {"SBATCH_EXCLUSIVE": "user"}
