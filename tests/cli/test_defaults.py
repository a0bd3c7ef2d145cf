import dataclasses
from pathlib import Path

import pytest

from flowjobs.cli.defaults import load_defaults
from flowjobs.cli.main import parse
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
        "aug-strength = 0.3\n"  # for whoever adds --aug noise
        'sbatch = {reservation = "course"}\n[arch]\nwide = "models:Wide"\n',
    )
    defaults = load_defaults()
    submit = defaults.fill(Submit)
    assert submit.study == tmp_path.parent / "scratch"
    assert submit.cluster == "slurm"
    training = submit.training
    assert (training.batch_size, training.lr, training.aug_strength) == (8, 1.0, 0.3)
    assert submit.slurm.sbatch == {"reservation": "course"}
    assert defaults.resolve_arch(TrainingConfig(arch="wide")).arch == "wide=models:Wide"
    assert defaults.resolve_arch(TrainingConfig()).arch == "mlp"


@pytest.mark.parametrize("words", ["resume a", "retry a b", "submit", "sweep --seed 0"])
def test_the_cluster_of_a_file_is_that_of_each_command_that_starts_runs(
    tmp_path: Path, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "flowjobs.toml", 'study = "there"\ncluster = "local"\n')
    monkeypatch.setenv("FLOWJOBS_STUDY", "")  # as where it is exported and empty
    command, _ = parse(words.split())
    assert (command.cluster, command.study) == ("local", tmp_path / "there")
    assert parse([*words.split(), "--cluster", "auto"])[0].cluster == "auto"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partition = ", "Invalid value"),
        ("nodes = 1\npartition = preempt", 'line 2: text needs quotes: partition = "preempt"'),
        ("partitoin = 'gpu'", "partitoin is no option; did you mean partition"),
        ("nodes = 'two'", "nodes = 'two', expected int"),
        ("partition = 3", "partition = 3, expected str"),
        ("cluster = 'cloud'", "cluster = 'cloud', expected auto, slurm, local, debug"),
        ("[arch]\nwide = 3", r"\[arch\] wide = 3, expected an import path"),
        ("batch_size = 0", "--batch-size: found 0, expected at least 1 .from .*flowjobs.toml"),
        ("sbatch.begin = 2026-12-01T08:00:00", "sbatch = begin = 2026-12-01 08:00:00, expected t"),
        ("arch_args.at.noon = [12:00:00]", "arch_args = at = noon = 12:00:00, expected text"),
        ("arch_args.x = " + "[" * 3000, "recursion"),
        ('comment = """a\nb"""', "--comment: found 'a.nb' with a control character.*.from .*flow"),
        ('sbatch.licenses = "a\\rb"', "--sbatch licenses: found 'a.rb' with a control character"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path / "flowjobs.toml", text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_defaults().fill(Submit)
    assert "flowjobs.toml" in str(caught.value)


def test_a_file_may_begin_with_the_byte_order_mark_of_an_editor(tmp_path: Path) -> None:
    write(tmp_path / "flowjobs.toml", '\ufeffpartition = "gpu"\n')
    assert load_defaults().values == {"partition": "gpu"}


def test_a_bad_file_keeps_nobody_from_looking(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "flowjobs.toml", "partition = preempt")
    parse(["status"])
    assert "warning: " in capsys.readouterr().err
    with pytest.raises(ConfigError, match="text needs quotes"):
        parse(["cancel", "a"])


def test_a_bad_file_stops_nothing_that_would_take_the_study_from_it_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "flowjobs.toml", "partition = preempt")
    parse(["reconcile", "a", "--study", "there", "--exit-code", "137"])
    parse(["cancel", "a", "--study=there"])
    monkeypatch.setenv("FLOWJOBS_STUDY", "there")
    parse(["wait", "a"])
    monkeypatch.delenv("FLOWJOBS_STUDY")
    parse(["completion", "bash"])
    assert capsys.readouterr().err.count("warning: ") == 4
    # As a batch script does, whose log it would be in.
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("FLOWJOBS_JOB", "7")
    parse(["reconcile", "a", "--study", "there", "--exit-code", "137"])
    assert capsys.readouterr().err == ""
    for words in (["submit", "--study", "there"], ["retry", "a", "--study", "there"]):
        with pytest.raises(ConfigError, match="text needs quotes"):
            parse(words)


def test_a_time_limit_in_sbatchs_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_TIMELIMIT", "1-12")
    assert load_defaults().fill(SlurmConfig).timeout_min == 2160
    # What is no number of minutes is left for sbatch itself to read, or to refuse.
    for limit in ("UNLIMITED", "0", "-1", "1:2:3:4"):
        monkeypatch.setenv("SBATCH_TIMELIMIT", limit)
        assert load_defaults().fill(SlurmConfig).timeout_min is None


def test_a_variable_wins_over_a_file_and_a_flag_over_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "flowjobs.toml", "gpus_per_node = 4\nmem_gb = 8\n")
    monkeypatch.setenv("SBATCH_GPUS_PER_NODE", "2")
    monkeypatch.setenv("SBATCH_MEM_PER_NODE", "0")
    defaults = load_defaults(arguments=["submit", "--gpus-per-node=2"])
    slurm = defaults.fill(SlurmConfig)
    # All of a node's memory is no number of GB: the file's gives way, sbatch reads the variable.
    assert (slurm.gpus_per_node, slurm.mem_gb) == (2, None)
    assert defaults.source_of(slurm, "mem_gb") == "SBATCH_MEM_PER_NODE=0, which sbatch reads"
    assert defaults.source_of(slurm, "gpus_per_node") == "--gpus-per-node"
    assert load_defaults().source_of(slurm, "gpus_per_node") == "SBATCH_GPUS_PER_NODE"
    defaults.check_sbatch(slurm)


def test_a_files_sbatch_option_gives_way_to_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "flowjobs.toml", "sbatch = {reservation = 'file', exclusive = true}\n")
    monkeypatch.setenv("SBATCH_RESERVATION", "variable")
    assert load_defaults().fill(SlurmConfig).sbatch == {"exclusive": True}


@pytest.mark.parametrize(
    ("variable", "text", "flag", "said"),
    [
        ("SBATCH_SIGNAL", "soon, please", "--signal-delay-s", "cannot be read as a value of"),
        ("SBATCH_GPUS_PER_NODE", "two", "--gpus-per-node", "SBATCH_GPUS_PER_NODE=two cannot"),
        ("SBATCH_GPUS", "4", "--gpus-per-node", "counts the GPUs of all 2 nodes together"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named_unless_a_flag_wins(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, flag: str, said: str
) -> None:
    monkeypatch.setenv(variable, text)
    slurm = dataclasses.replace(load_defaults().fill(SlurmConfig), nodes=2)
    with pytest.raises(ConfigError, match=said):
        load_defaults().check_sbatch(slurm)
    # Even with the value that it has anyway.
    load_defaults(arguments=["submit", flag, "1"]).check_sbatch(slurm)


def test_a_data_file_is_looked_up_from_the_config_file(tmp_path: Path) -> None:
    write(tmp_path / "flowjobs.toml", 'dataset = "data/x.npy"\n')
    assert load_defaults().fill(TrainingConfig).dataset == str(tmp_path / "data/x.npy")


@pytest.mark.parametrize(
    ("option", "use"),
    [
        ("gres=gpu:a100:2", "--gpus-per-node and --gpu-type"),
        ("gres=lustre:1,gpu", "--gpus-per-node and --gpu-type"),
        ("gpus-per-node=2", "--gpus-per-node and --gpu-type"),
        ("cpus-per-task=8", "--cpus-per-task"),
        ("signal=USR1@300", "--signal-delay-s"),
        ("ntasks=2", "there is one process per GPU"),
        ("nodes=2", "--nodes"),
    ],
)
def test_what_the_batch_file_would_ask_for_twice_is_refused(option: str, use: str) -> None:
    command, defaults = parse(["submit", "--sbatch", "gres=lustre:1", option])
    with pytest.raises(ConfigError, match=f"--sbatch {option.partition('=')[0]}: .*{use}"):
        defaults.check_sbatch(command.slurm)
    command, defaults = parse(["submit", "--sbatch", "gres=lustre:1", "reservation=gpu"])
    defaults.check_sbatch(command.slurm)


def test_an_option_of_sbatch_does_not_overrule_a_field_in_silence(tmp_path: Path) -> None:
    write(tmp_path / "flowjobs.toml", 'sbatch = {mem = "32G", time = "UNLIMITED"}\n')
    command, defaults = parse(["submit", "--timeout-min", "60"])
    said = "--sbatch time: found UNLIMITED beside --timeout-min 60, expected one of them"
    with pytest.raises(ConfigError, match=said):
        defaults.check_sbatch(command.slurm)
    command, defaults = parse(["submit", "--qos", "long"])
    defaults.check_sbatch(command.slurm)
