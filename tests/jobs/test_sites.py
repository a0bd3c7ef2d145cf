"""What sites change in the environment of jobs, on the real Slurm."""

from pathlib import Path

import pytest

from flowjobs.config import SlurmConfig
from flowjobs.field_values import KeyValues
from flowjobs.jobs.environment import _master_port
from flowjobs.runs.run import Run
from flowjobs.runs.status import same_host
from flowjobs.slurm.options import export_for
from tests.cluster.slurm import SlurmCluster
from tests.conftest import Command
from tests.jobs.disturbed import OPTIONS, REPOSITORY, Disturbed

# Short, and with `--arch-args` of the tests' model: that one is found on PYTHONPATH only.
SHORT = (*OPTIONS, "--epochs", "1")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SBATCH_EXPORT", "NONE"),  # of the environment here: nothing
        ("TMPDIR", "/nonexistent/of-the-login-node"),
    ],
)
def test_a_job_finds_what_it_needs_whatever_a_site_passes_on(
    slurm: SlurmCluster,
    flowjobs: Command,
    study: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv(name, value)
    done = flowjobs("submit", *SHORT, "--name", "submitted")
    assert done.returncode == 0, done.stderr
    # A batch script gets nothing of PYTHON and PYTHONPATH either, and has quotes to keep.
    Path(".venv").symlink_to(REPOSITORY / ".venv")
    Path("tests").symlink_to(REPOSITORY / "tests")
    list_of_runs = ["--arch-args 'control=a b' --epochs 1 --name='by-hand' --study='my study'"]
    own = " ".join(SHORT).replace("--arch-args control=control", "")
    Path("runs.txt").write_text(f"# a comment\n{own} {list_of_runs[0]}\n")
    by_hand = slurm.submit("--array=2", str(REPOSITORY / "sbatch" / "array.sh"), "runs.txt")
    slurm.wait_state(by_hand, {"COMPLETED", "FAILED"}, 120)
    for where, run_name in ((study, "submitted"), (Path("my study").absolute(), "by-hand")):
        job = Disturbed(Run(where, run_name), by_hand, slurm)
        assert job.wait_for_state("finished", "failed").state == "finished", job.explain()
    arguments = Run(Path("my study").absolute(), "by-hand").config().training.arch_args
    assert arguments == {"control": "a b"}


def test_where_nothing_is_passed_on_what_a_job_needs_still_is() -> None:
    here = {"SBATCH_EXPORT": "NONE", "PATH": "/bin", "WANDB_API_KEY": "k", "EDITOR": "vi"}
    assert export_for(here, SlurmConfig()) == "PATH,WANDB_API_KEY"
    assert export_for({"PATH": "/bin"}, SlurmConfig()) is None
    own = SlurmConfig(sbatch=KeyValues(export="EDITOR"))
    assert export_for(here, own) == "EDITOR,PATH,WANDB_API_KEY"
    assert export_for(here, SlurmConfig(sbatch=KeyValues(export="ALL,A=1"))) == "ALL,A=1"


def test_ranks_meet_at_another_port_when_their_job_starts_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ports = [_master_port("12"), _master_port("13")]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    ports += [_master_port("12"), _master_port("12")]
    assert ports[2] == ports[3]  # on each rank
    assert len({*ports}) == 3
    assert all(20_000 <= port < 32_768 for port in ports)


def test_a_host_is_the_same_with_its_domain_and_without() -> None:
    assert same_host("n1", "n1.cluster.org")
    assert not same_host("n1", "n10.cluster.org")
    assert not same_host("login1.a.edu", "login1.b.edu")
    assert not same_host("10.0.0.1", "10.0.0.2")
