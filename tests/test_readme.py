"""What the README shows is what happens. Its two long commands are run by .ci/run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flowjobs.cli.defaults import load_defaults
from flowjobs.cli.submit import Submit
from flowjobs.config import TrainingConfig

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [
    line.partition("  #")[0].strip()
    for block in blocks("bash")
    for line in block.splitlines()
    if line.startswith("flowjobs ")
]


FEWER = "otcfm --seed 0 1"


def test_there_are_commands_to_test() -> None:
    assert len(COMMANDS) >= 7


def test_the_commands_work_one_after_another(workplace: Path) -> None:
    np.save("embeddings.npy", np.random.default_rng(0).normal(size=(12_000, 4)))
    np.save("mixture.npy", np.random.default_rng(1).normal(size=(400, 8)))
    Path("my_models.py").write_text(blocks("python")[0])
    # A person's own defaults, so that each run takes a second here.
    Path("flowjobs.toml").write_text('cluster = "local"\nepochs = 1\nwandb_mode = "disabled"\n')
    scripts = Path(sys.executable).parent
    for shown in COMMANDS:
        # Of the sweeps four runs, for 27 take a quarter of an hour.
        command = shown.replace("mlp unet dit", "mlp").replace("otcfm vpcfm --seed 0 1 2", FEWER)
        done = subprocess.run(
            shlex.split(command),
            env={**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def test_the_example_in_python_trains_and_resumes(workplace: Path) -> None:
    for part, n in (("train", 320), ("val", 80)):
        np.save(f"{part}.npy", np.random.default_rng(n).normal(size=(n, 4)).astype(np.float32))
    model, example = blocks("python")
    model += "model = WideNet(4, width=16)\n"
    command = [sys.executable, "-c", model + example.replace("epochs=20", "epochs=2")]
    environment = {**os.environ, "WANDB_MODE": "disabled"}
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) > 0


def test_the_example_of_a_config_file_is_valid(workplace: Path) -> None:
    (example,) = blocks("toml")
    (workplace / "flowjobs.toml").write_text(example)
    defaults = load_defaults()
    submit = defaults.fill(Submit)
    assert submit.slurm.partition == "preempt"
    assert defaults.resolve_arch(TrainingConfig(arch="wide")).arch_path == "my_models:WideNet"


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", TEXT))
def test_links_lead_somewhere(link: str) -> None:
    assert (README.parent / link).exists()


def test_paths_named_in_the_text_exist() -> None:
    named = set(re.findall(r"`((?:sbatch|jobs|training)/[a-z_]+\.(?:sh|py))`", TEXT))
    assert len(named) >= 4
    for name in named:
        assert (README.parent / name).exists() or (README.parent / "flowjobs" / name).exists()
