from pathlib import Path

import pytest

from flowjobs.cli.defaults import load_defaults
from flowjobs.cli.submit import Submit
from flowjobs.config import SlurmConfig, TrainingConfig
from flowjobs.errors import ConfigError


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_nearer_file_wins_and_variables_win_over_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = write(
        tmp_path / "home/config/flowjobs/flowjobs.toml",
        'partition = "home"\naccount = "home"\nqos = "home"\n',
    )
    project = write(tmp_path / "flowjobs.toml", 'partition = "project"\naccount = "project"\n')
    monkeypatch.setenv("SBATCH_PARTITION", "variable")
    defaults = load_defaults()
    slurm = defaults.fill(SlurmConfig)
    assert (slurm.partition, slurm.account, slurm.qos) == ("variable", "project", "home")
    assert defaults.source_of(slurm, "partition") == "SBATCH_PARTITION"
    assert defaults.source_of(slurm, "account") == str(project)
    assert defaults.source_of(slurm, "qos") == str(home)
    assert defaults.source_of(slurm, "nodes") == "default"
    assert defaults.source_of(SlurmConfig(partition="flag"), "partition") == "--partition"


def test_a_file_may_set_what_submit_takes(tmp_path: Path) -> None:
    write(
        tmp_path / "flowjobs.toml",
        'study = "../scratch"\ncluster = "slurm"\nbatch-size = 8\nlr = 1\n'
        'sbatch = {reservation = "course"}\n[arch]\nwide = "models:Wide"\n',
    )
    defaults = load_defaults()
    submit = defaults.fill(Submit)
    assert submit.study == tmp_path / "../scratch"
    assert submit.cluster == "slurm"
    assert (submit.training.batch_size, submit.training.lr) == (8, 1.0)
    assert submit.slurm.sbatch == {"reservation": "course"}
    assert defaults.resolve_arch(TrainingConfig(arch="wide")).arch == "wide=models:Wide"
    assert defaults.resolve_arch(TrainingConfig()).arch == "mlp"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partition = ", "Invalid value"),
        ("partitoin = 'gpu'", "partitoin is no option; expected one of account, arch"),
        ("nodes = 'two'", "nodes = 'two', expected int"),
        ("partition = 3", "partition = 3, expected str"),
        ("cluster = 'cloud'", "cluster = 'cloud', expected auto, slurm, local, debug"),
        ("batch_size = 0", "--batch-size: found 0, expected at least 1 .from .*flowjobs.toml"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path / "flowjobs.toml", text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_defaults().fill(Submit)
    assert "flowjobs.toml" in str(caught.value)


def test_a_time_limit_in_sbatchs_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_TIMELIMIT", "1-12")
    assert load_defaults().fill(SlurmConfig).timeout_min == 2160
    # What is no number of minutes is left for sbatch itself to read, or to refuse.
    for limit in ("UNLIMITED", "0", "-1", "1:2:3:4"):
        monkeypatch.setenv("SBATCH_TIMELIMIT", limit)
        assert load_defaults().fill(SlurmConfig).timeout_min is None


def test_a_data_file_is_looked_up_from_the_config_file(tmp_path: Path) -> None:
    write(tmp_path / "flowjobs.toml", 'dataset = "data/x.npy"\n')
    assert load_defaults().fill(TrainingConfig).dataset == str(tmp_path / "data/x.npy")
