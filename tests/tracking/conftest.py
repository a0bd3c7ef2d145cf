"""A W&B server of its own for each test that asks for one."""

from collections.abc import Iterator

import pytest

from tests.tracking.backend import Backend


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """A server that is up, and an environment in which wandb talks to it."""
    server = Backend()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.go_down()
