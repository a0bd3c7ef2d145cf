"""File systems without locks: `flock` fails in every process that is started with the fixture."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(params=["ENOSYS", "ENOLCK"])
def no_flock(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Processes started in the test have no `flock`: not implemented, or no lock daemon."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is not on PATH")
    library = tmp_path_factory.mktemp("no-flock") / "no_flock.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("TEST_FLOCK_ERRNO", str(getattr(errno, request.param)))
    assert os.environ["LD_PRELOAD"]
