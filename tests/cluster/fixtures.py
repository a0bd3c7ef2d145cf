"""Pytest fixtures for tests that need a real Slurm: `slurm`, and below it `slurm_cluster`."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.requirements import missing_requirement
from tests.cluster.slurm import SlurmCluster, default_root
from tests.cluster.waiting import ClusterError


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """The cluster, booted. One that was up before stays up; one booted here is shut down.

    Where tests run side by side each worker has a cluster of its own. Where it cannot be booted the
    test is skipped, but fails if CI=true: there, a test that never runs is a mistake.
    """
    if missing := missing_requirement():
        if os.environ.get("CI") == "true":
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    root = default_root()
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.with_name(f"{root.name}-{worker}")
    cluster = SlurmCluster(root)
    with cluster.reserved():
        was_up = any(cluster.daemons().values())
        cluster.up()
        cluster.reset()
        yield cluster
        if not was_up:
            cluster.down()


@pytest.fixture
def slurm(slurm_cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """The cluster without jobs and with all nodes idle; reset again after the test.

    In the test, Slurm's commands talk to it, called by code under test as well.
    """
    # If the tests run inside a Slurm job, that job's variables are none of theirs.
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    for name, value in slurm_cluster.env.items():
        monkeypatch.setenv(name, value)
    yield slurm_cluster
    try:
        slurm_cluster.reset()
    except ClusterError:
        # The test that leaves it beyond repair fails, and no other.
        slurm_cluster.down()
        slurm_cluster.up()
        raise


@pytest.fixture
def site(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, str], None]]:
    """Varies what one of Slurm's commands does, as sites do: by a script of that name on PATH.

    `site("sbatch", 'echo "Welcome!"; $real "$@"')`: in the script, `$real` is the command itself.
    """
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def vary(command: str, script: str) -> None:
        path = os.environ["PATH"].removeprefix(f"{folder}:")
        wrapper = folder / command
        wrapper.write_text(f"#!/bin/bash\nreal={shutil.which(command, path=path)}\n{script}\n")
        wrapper.chmod(0o755)

    yield vary
    shutil.rmtree(folder)  # the cluster's own reset needs the commands as they are
