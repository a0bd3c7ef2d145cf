"""What `--help` prints is recorded, so that a change of it is seen.

To record it anew: COLUMNS=100 python -m flowjobs submit --help > tests/cli/help_submit.txt
"""

from pathlib import Path

import pytest

from tests.conftest import Command

HERE = Path(__file__).parent


@pytest.mark.parametrize("command", [(), ("submit",), ("train",)])
def test_help_is_the_recorded_one(
    flowjobs: Command, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    done = flowjobs(*command, "--help")
    assert done.returncode == 0
    assert done.stdout == (HERE / f"{'_'.join(('help', *command))}.txt").read_text()
