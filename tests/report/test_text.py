"""The table in each form, for a terminal, a paper and another program."""

import csv
import io
import itertools
import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from flowjobs.cli.evaluation_table import FIRST_OF_ALL, in_a_line
from flowjobs.cli.main import parse
from flowjobs.cli.main import run as run_command
from flowjobs.config import RestartConfig, RunConfig, SlurmConfig, TrackingConfig, TrainingConfig
from flowjobs.field_values import KeyValues
from flowjobs.report import text
from flowjobs.report.comparison import compare
from flowjobs.report.origin import command_of, commit_of
from flowjobs.report.page import html_page
from flowjobs.report.results import read_result
from flowjobs.runs.run import Run, run_names
from flowjobs.sweeps.grid import Sweep, run_names_of
from flowjobs.sweeps.saved import save_sweep
from tests.conftest import Command
from tests.report.made_up import made_run

MARKDOWN = """\
| lr | best val loss |
| --- | --- |
| 0.001 | 2.00 ± 0.10 (n=3) |
| 0.1 | **1.00 ± 0.14 (2/3 seeds, 1 failed)** |
| 0.2 | 1 running |

best val loss: mean ± standard deviation over n seeds; lower is better; in bold the best, and what \
a paired t-test over common seeds (95 %) cannot tell from it
"""
TABULAR = r"""\begin{tabular}{lc}
\toprule
lr & best val loss \\
\midrule
0.001 & $2.00 \pm 0.10$ \\
0.1 & $\mathbf{1.00 \pm 0.14}$ {\small (2/3 seeds, 1 failed)} \\
0.2 & 1 running \\
\bottomrule
\end{tabular}
"""


@pytest.fixture
def ablation(study: Path) -> Path:
    for seed in range(3):
        made_run(study, [1.9 + seed / 10], seed=seed)
    made_run(study, [0.9], lr=0.1, seed=0)
    made_run(study, [1.1], lr=0.1, seed=1)
    made_run(study, [0.1], "failed", lr=0.1, seed=2)
    made_run(study, [0.1], "running", lr=0.2, seed=0)
    return study


def test_each_form_has_the_same_table(flowjobs: Command, ablation: Path) -> None:
    end = ("--at-step", "end")
    markdown = flowjobs("report", "--markdown", *end).stdout
    assert markdown == MARKDOWN
    latex = flowjobs("report", "--latex", *end)
    assert latex.stdout.endswith(TABULAR)
    rows = list(csv.DictReader(io.StringIO(flowjobs("report", "--csv", *end).stdout)))
    assert [(row["lr"], row["n"], row["best"]) for row in rows] == [
        ("0.001", "3", "0"),
        ("0.1", "2", "1"),
        ("0.2", "0", "0"),
    ]
    assert float(rows[1]["mean"]) == 1.0
    cells = json.loads(flowjobs("report", "--json", *end).stdout)["cells"]
    assert cells[1]["others"] == {"failed": 1}
    shown = flowjobs("report", *end)
    assert "0.1    1.00 ± 0.14* (2/3 seeds, 1 failed)" in shown.stdout
    assert shown.returncode == 0
    if shutil.which("pdflatex"):
        document = (
            r"\documentclass{article}\usepackage{booktabs}\begin{document}"
            f"{latex.stdout}\\end{{document}}"
        )
        Path("table.tex").write_text(document)
        command = ["pdflatex", "-interaction=batchmode", "-halt-on-error", "table.tex"]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        assert done.returncode == 0, Path("table.log").read_text()


@pytest.mark.parametrize(
    ("unit", "shown"),
    [
        (1e-9, "1.10e-09 ± 1.00e-10"),
        (1e-3, "0.00110 ± 0.00010"),
        (1.0, "1.10 ± 0.10"),
        (1e9, "1100000000 ± 100000000"),
    ],
)
def test_values_of_any_unit_are_told_apart(study: Path, unit: float, shown: str) -> None:
    for seed in range(3):
        measures = {"frechet": unit * (1 + seed / 10)}
        run = made_run(study, [1.0], measures=measures, seed=seed)
    found = compare([read_result(Run(study, name)) for name in run_names(study)])
    assert f"{shown} (n=3)" in text.markdown(found)
    if "e" in shown:
        assert r"$1.10 \times 10^{-9} \pm 1.00 \times 10^{-10}$" in text.latex(found)
        assert shown in html_page(found, "", "")
    of = {name: {"value": unit, "floor": 0.0} for name in FIRST_OF_ALL}
    run.evaluation_file.write_text(json.dumps({"measures": of}))
    assert float(in_a_line(run).partition("coverage ")[2].partition(" (")[0]) == unit


@pytest.mark.parametrize(
    ("cells", "shown"),
    [
        # One has diverged.
        (([0.695, 0.705, 0.7], [22, 52, 82]), ["0.7000 ± 0.0050", "52.0000 ± 30.0000"]),
        # Most have.
        (([0.695, 0.705, 0.7], [22, 52, 82], [220, 520, 820]), ["0.7000 ± 0.0050"]),
        # And of the one that has not there is one seed, or all have the same value.
        (([0.695], [22, 52, 82]), ["0.695 (n=1)"]),
        (([0.695] * 3, [22, 52, 82]), ["0.695 ± 0.000"]),
        # A deviation that is small by chance makes no digits that nobody reads.
        (([0.693, 0.693 + 1e-9], [0.71, 0.73], [0.72, 0.75]), ["0.6930 ± 0.0000"]),
        # Nor does a value near 0 whose deviation is not.
        (([0.1, -0.1 + 2e-6], [0.4, 0.5], [0.4, 0.6]), ["0.000 ± 0.141", "0.450 ± 0.071"]),
    ],
)
def test_a_cell_of_another_scale_hides_no_digits_of_the_others(
    study: Path, cells: tuple[list[float], ...], shown: list[str]
) -> None:
    for number, values in enumerate(cells):
        for seed, value in enumerate(values):
            made_run(study, [value], lr=10.0**number, seed=seed)
    found = compare([read_result(Run(study, name)) for name in run_names(study)])
    assert [words for words in shown if words not in text.markdown(found)] == []


def test_names_are_printed_as_they_stand(flowjobs: Command, study: Path) -> None:
    varied = itertools.product(
        ("/d/data[raw].npy", "/d/data[norm].npy"), (("x[/y]", [64, 64]), (":dog:", "*<|>"))
    )
    for number, (dataset, (group, sizes)) in enumerate(varied):
        arguments = KeyValues(sizes=sizes)
        name = f"n{number}"
        made_run(study, [1.0], name=name, dataset=dataset, group=group, arch_args=arguments)
    head = flowjobs("report", "--rows", "group", "--columns", "dataset").stdout.splitlines()[0]
    assert head.split() == ["group", "data[norm]", "data[raw]"]
    head = flowjobs("report", "--rows", "dataset", "--columns", "group").stdout.splitlines()[0]
    assert head.split() == ["dataset", ":dog:", "x[/y]"]
    table = flowjobs("report", "--latex", "--rows", "sizes", "--columns", "dataset").stdout
    # After a row's end and a rule a bracket or a star would be theirs.
    rows = table.partition("\\midrule\n")[2].splitlines()
    assert rows[0].startswith(r"{*}\textless{}\textbar{}\textgreater{} & ")
    assert rows[1].startswith("{[}64, 64] & ")


def test_what_cannot_be_read_is_said_and_the_rest_reported(
    flowjobs: Command, ablation: Path
) -> None:
    run = next(ablation.glob("runs/*lr0.001-seed0"))
    for damage in (lambda file: file.write_text("{"), lambda file: (file.unlink(), file.mkdir())):
        damage(run / "evaluation.json")
        done = flowjobs("report", "--csv")
        assert (done.returncode, f"error: {run.name}: " in done.stderr) == (2, True)
        assert len(done.stdout.splitlines()) == 4


def test_runs_that_a_sweep_has_not_made_are_in_each_form(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(study / "my data.npy")  # a run's name has it as my_data
    grid = {"lr": [1e-3, 1e-2], "seed": [0, 1, 2]}
    # Their epochs were a default, which has changed since.
    sweep = Sweep(base={"dataset": data}, grid=grid)
    configs = [TrainingConfig(**point) for point in sweep.points()]
    names = run_names_of(configs)
    save_sweep(study, "s", sweep, names)
    for name, config in zip(names[:2], configs[:2], strict=True):
        made_run(study, [1.0 + config.seed], name=name, dataset=data, seed=config.seed)

    def printed(*words: str) -> str:
        assert run_command(["report", *words]) == 0
        return capsys.readouterr().out

    table = printed("s", "--markdown")
    assert "| 0.001 | 1.50 ± 0.71 (2/3 seeds, 1 not submitted) |" in table
    assert "| 0.01 | 3 not submitted |" in table
    assert r"{\small (2/3 seeds, 1 not submitted)}" in printed("s", "--latex")
    rows = [*csv.DictReader(io.StringIO(printed("s", "--csv")))]
    assert [(of["lr"], of["n"], of["expected"], of["others"]) for of in rows] == [
        ("0.001", "2", "3", "not submitted:1"),
        ("0.01", "0", "3", "not submitted:3"),
    ]
    assert "3 not submitted" in (printed("s", "--html", "x.html"), Path("x.html").read_text())[1]
    made = printed("s", "seed=0", "seed=1", "lr=0.001")
    assert "(n=2)" in made
    assert "not in the study" not in made  # what is was not asked for
    assert f"of the sweep, not in the study: {names[2]}; run it again" in printed("s", "lr=0.001")
    for file in ("s.toml", "s.runs"):
        (study / "sweeps" / file).write_text("no sweep")
    assert "(n=2)" in printed("lr=0.001")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--csv", "--latex"], "found --csv and --latex, expected one of them"),
        (["--html", "none/x.html"], "found no folder"),
        (["--html", "x\udcff.html"], "found bytes that are not UTF-8, expected a path without"),
        (["flow=otcfm"], "no run has flow=otcfm"),
    ],
)
def test_bad_input(flowjobs: Command, ablation: Path, arguments: list[str], said: str) -> None:
    done = flowjobs("report", *arguments)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr


def test_the_command_of_a_run_is_that_run(study: Path) -> None:
    config = RunConfig(
        TrainingConfig(
            arch="wide=my nets:Wide",
            arch_args=KeyValues(
                width=512, norm="layer", name="1", sizes=[1, 2], key="{[1]}", deep="-" * 3000 + "1"
            ),
            lr=3e-4,
            compile=True,
            epochs=7,
        ),
        SlurmConfig(partition="gpu", sbatch=KeyValues(exclusive=True)),
        TrackingConfig(wandb_mode="disabled"),
        RestartConfig(retries=2),
    )
    run = Run(study, "it-s1")
    run.create(config)
    submit, _ = parse(shlex.split(command_of(run))[1:])
    assert submit.name == "it-s1"
    assert submit.training == config.training
    assert (submit.slurm, submit.tracking) == (config.slurm, config.tracking)
    assert submit.restarts == config.restarts
    assert commit_of(run) == ""
