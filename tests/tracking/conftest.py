"""A W&B server of its own for each test that asks for one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from flowjobs.config import WandbMode
from flowjobs.runs.run import Run
from tests.tracking.attempts import make_run
from tests.tracking.backend import Backend


@pytest.fixture(autouse=True)
def patient(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wandb that takes minutes to start, on a machine that is busy with other things, may."""
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "240")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "240")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """A server that is up, and an environment in which wandb talks to it."""
    server = Backend()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.go_down()


MakeRun = Callable[[str], tuple[Run, Backend | None]]


@pytest.fixture
def tracked_run(study: Path, request: pytest.FixtureRequest) -> MakeRun:
    """Makes a run that is tracked "online", with its server, or "offline", with none."""

    def make(mode: str) -> tuple[Run, Backend | None]:
        server = request.getfixturevalue("backend") if mode == "online" else None
        return make_run(study, cast(WandbMode, mode)), server

    return make
