"""What a run's config in W&B holds, so that an ablation can be reproduced."""

import subprocess
from pathlib import Path

import pytest

from flowjobs.runs.surroundings import git_commit, gpu_names, note_surroundings
from flowjobs.tracking.page import config_for_wandb
from tests.tracking.attempts import make_run


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


def test_the_commit_and_whether_a_tracked_file_differs(workplace: Path) -> None:
    assert git_commit(workplace) == (None, None)
    git(workplace, "init")
    (workplace / "model.py").write_text("a = 1\n")
    git(workplace, "add", "model.py")
    git(workplace, "commit", "-m", "first")
    clean = git_commit(workplace)
    assert clean[0] is not None
    assert len(clean[0]) == 40
    assert clean[1] is False
    (workplace / "notes.txt").write_text("not tracked")
    assert git_commit(workplace) == clean
    (workplace / "model.py").write_text("a = 2\n")
    assert git_commit(workplace) == (clean[0], True)


def test_the_config_is_the_training_config_and_where_it_ran(study: Path, workplace: Path) -> None:
    run = make_run(study, "offline")
    assert "host" not in config_for_wandb(run)
    note_surroundings(run, workplace)
    found = config_for_wandb(run)
    assert found.items() >= run.config().training.to_dict().items()
    assert found["git_commit"] is None
    assert found["signature"] == run.config().training.signature
    for version in ("flowjobs", "torch", "python"):
        assert found[f"{version}_version"]
    assert found["host"]
    assert found["attempts"] == []


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB"]),
        ("1", ["NVIDIA A100-SXM4-40GB"]),
        ("GPU-aa", ["NVIDIA H100 PCIe"]),
        ("", []),
    ],
)
def test_gpus_are_those_that_the_job_may_use(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, names: list[str]
) -> None:
    fake = workplace / "nvidia-smi"
    fake.write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA H100 PCIe (UUID: GPU-aa)'\n"
        "echo 'GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-bb)'\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(workplace), prepend=":")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_names() == names
