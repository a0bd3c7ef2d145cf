"""Whatever an option of a command is given: an answer in words, and never a traceback."""

import re
from pathlib import Path

import pytest

from flowjobs.cli.commands import COMMANDS
from flowjobs.cli.main import main
from tests.conftest import Command

TRAIN = ("--epochs", "1", "--width", "16", "--depth", "1", "--wandb-mode", "disabled")
# Each on one finished run, and so that nothing is submitted or trained.
LINES: dict[str, tuple[str, ...]] = {
    "submit": ("--dry-run",),
    "sweep": ("--name", "s", "--dry-run"),
    "resume": ("a", "--no-follow"),
    "train": ("--dataset", "none.npy"),
    "status": (),
    "show": ("a",),
    "report": (),
    "logs": ("a",),
    "cancel": ("a",),
    "retry": ("a", "--dry-run"),
    "wait": ("a",),
    "rm": ("a",),
    "reconcile": (),
    "sync": ("a",),
    "sample": ("a", "-n", "2", "--out", "x.npy"),
    "evaluate": ("a",),
    "data": ("split", "none.npy"),
    "checkpoint": ("inspect", "study/checkpoints/a/best.pt"),
    "bench": ("--arch", "none:Net"),
    "drill": ("--arch", "none:Net"),
    "completion": ("bash",),
}
ODD = (
    *("", "nan", "inf", "-inf", "-1", "0", "0.5", "1e400", "99999999999999999999", "ü", "a b"),
    *("../x", "/", "a/b", "a\nb", "%", "--", "None", "true", "a=b", "=", "{}", "~", "*", ".", ":y"),
)
# They may be as many as one likes, and would be drawn.
COUNTS = ("--repeats", "--n-projections", "--seconds")


@pytest.mark.long
@pytest.mark.parametrize("command", LINES)
def test_no_value_of_an_option_ends_in_a_traceback(
    flowjobs: Command, workplace: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flowjobs("train", "--name", "a", *TRAIN).returncode == 0

    def call(*arguments: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as ended:
            main([command, *arguments])
        return ended.value.code, "".join(capsys.readouterr())

    _, said = call("--help")
    options = {*re.findall(r"--[a-z][a-z0-9-]+", said)} - {"--help"}
    for option in sorted(options):
        for value in ODD:
            if option in COUNTS and value.isdigit():
                continue
            code, said = call(*LINES[command], option, value)
            assert (code in (0, 2), "Traceback" in said) == (True, False), (option, value, said)


def test_every_command_is_tried() -> None:
    assert LINES.keys() == COMMANDS.keys()
