"""What words on the command line come to."""

import dataclasses
import re
import shlex
import sys
from typing import Any

import pytest

from flowjobs.cli.main import main, parse
from flowjobs.cli.runs_named import check_named
from flowjobs.errors import ConfigError
from flowjobs.runs.hint import program


@pytest.mark.parametrize(
    ("twice", "once"),
    [
        (
            "submit --sbatch reservation=a --sbatch hold=True",
            "submit --sbatch reservation=a hold=True",
        ),
        ("sweep --seed 0 --lr 1 2 --seed=1 2 --lr 3", "sweep --seed 0 1 2 --lr 1 2 3"),
        ("sweep --arch-args width=8 --arch_args depth=1", "sweep --arch-args width=8 depth=1"),
        ("sweep --dry-run my.toml --seed -1 --seed 1", "sweep my.toml --seed -1 1 --dry-run"),
        ("sweep --zip lr --no-evaluate --zip seed", "sweep --zip lr seed --evaluate False"),
        (
            "retry a --with mem_gb=1 --new-code --with qos=b",
            "retry a --with mem_gb=1 qos=b --new-code",
        ),
        ("report a --rows lr --rows flow", "report a --rows lr flow"),
        ("sample --out a.npy -n 5 --out b.npy a", "sample a --out a.npy b.npy -n 5"),
        ("data split a.npy --sizes 1k --sizes 2k", "data split a.npy --sizes 1k 2k"),
        ("sample --out a.npy --out b.npy -- a", "sample a --out a.npy b.npy"),
        ("submit --epochs 1 --epochs 2", "submit --epochs 2"),
    ],
)
def test_the_values_of_an_option_that_is_given_twice_are_joined(twice: str, once: str) -> None:
    def values(line: str) -> dict[str, Any]:
        return dataclasses.asdict(parse(shlex.split(line))[0])

    assert values(twice) == values(once)


def test_what_the_parser_exits_with_is_no_users_code(monkeypatch: pytest.MonkeyPatch) -> None:
    # As where tyro lies in a folder of the user's own (pip install --target).
    module = sys.modules["flowjobs.cli.main"]
    monkeypatch.setattr(module, "user_place", lambda *_, **__: "deps/tyro.py, line 1")
    for arguments, code in ((["submit", "--help"], 0), (["submit", "--epohcs", "3"], 2)):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == code


@pytest.mark.parametrize("words", [["-V"], ["--study", "x", "status"], []])
def test_a_line_to_type_after_a_mistake_works_outside_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("COLUMNS", "300")
    called = program("flowjobs")
    assert called != "flowjobs"
    with pytest.raises(SystemExit, match="2"):
        parse(words)
    assert f"run {called} --help" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=re.escape(f"({called} cancel NAME)")):
        check_named("cancel", [])


def test_the_value_of_an_option_of_sbatch_is_as_it_is_typed() -> None:
    typed = ("reservation=2024_11_05", "licenses=1e5", "nodelist=0x10", "begin=1e400", "gres=[1,2]")
    command, _ = parse(["submit", "--sbatch", *typed, "nice=-5", "hold=true", "wckey='1e5'"])
    as_text = dict(option.split("=") for option in typed)
    assert command.slurm.sbatch == {**as_text, "nice": -5, "hold": True, "wckey": "1e5"}
    # A model's own argument is a number.
    command, _ = parse(["submit", "--arch-args", "rate=1e-4", "width=1_024"])
    assert command.training.arch_args == {"rate": 1e-4, "width": 1024}
