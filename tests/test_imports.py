"""The command line's start loads neither torch nor wandb, and this test can fail."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "wandb", "numpy", "scipy", "sklearn")


def modules_loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after running `code`."""
    report = "import sys; print('\\n'.join({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"],
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return set(done.stdout.split())


def command(*arguments: str) -> str:
    return (
        "from flowjobs.cli import main\n"
        f"try:\n    main({list(arguments)!r})\nexcept SystemExit:\n    pass"
    )


@pytest.mark.parametrize(
    "code",
    [
        "import flowjobs",
        "import flowjobs.training",
        command("--help"),
        command("submit", "--help"),
        command("train", "--help"),
        command("sync", "--help"),
        command("drill", "--help"),
        command("sweep", "--help"),
        command("sample", "no-such-run", "--out", "x.npy"),
        command("status"),
        command("report"),
        command("show", "no-such-run"),
        command("logs", "no-such-run"),
        command("submit", "--arch", "nonsense"),
    ],
)
def test_start_loads_nothing_heavy(code: str) -> None:
    assert not modules_loaded_by(code) & set(HEAVY)


def test_submitting_loads_neither_torch_nor_wandb(workplace: object) -> None:
    # submitit itself loads numpy where it is installed.
    for name in ("submit", "sweep"):
        seed = ("--seed", "0") if name == "submit" else ("--seed", "0", "1")
        loaded = modules_loaded_by(command(name, *seed, "--cluster", "local", "--dry-run"))
        assert "submitit" in loaded
        assert not loaded & {"torch", "wandb"}


def test_the_test_above_can_fail() -> None:
    assert "torch" in modules_loaded_by("from flowjobs.training import EMAModel")


def test_public_names_of_training_are_there() -> None:
    import flowjobs.training

    for name in flowjobs.training.__all__:
        assert getattr(flowjobs.training, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'FlowTrainr'"):
        _ = flowjobs.training.FlowTrainr
