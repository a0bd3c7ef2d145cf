"""A submission that dies in the middle, or that the cluster takes a part of."""

import itertools
import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from flowjobs.config import RunConfig, TrainingConfig
from flowjobs.jobs.array import arrays_of, submitting
from flowjobs.jobs.current_job import running_jobs
from flowjobs.jobs.run_stages import Member
from flowjobs.runs.run import Run
from flowjobs.runs.status import RunStatus
from flowjobs.sweeps.submit_arrays import ArrayLeft, jobs_at_once, share_parallel, tasks_of
from tests.cluster.slurm import SlurmCluster
from tests.cluster.waiting import wait_until
from tests.conftest import Command
from tests.sweeps.test_plan import patient_for_five

Site = Callable[[str, str], None]

SWEEP = ("sweep", "--flow", "icfm", "otcfm", "--seed", "0", "1", "2", "--wandb-mode", "disabled")
HELD = (*SWEEP, "--sbatch", "hold=True")

# A limit of four jobs a user, in Slurm's words.
LIMIT_OF_FOUR = r"""
last=$(sed -n 's/^#SBATCH --array=.*0-\([0-9]*\).*/\1/p' "${@: -1}")
if [ $(($(squeue -h -r | wc -l) + last + 1)) -gt 4 ]; then
  echo "sbatch: error: AssocMaxSubmitJobLimit" >&2
  echo "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy" \
    "(job submit limit, user's size and/or time limits)" >&2
  exit 1
fi
$real "$@" """


def tasks(slurm: SlurmCluster) -> list[str]:
    return sorted(slurm.run("squeue", "-h", "-r", "-t", "PD,R", "-o", "%i").split())


def noted(study: Path) -> list[str]:
    runs = [Run.at(folder) for folder in (study / "runs").iterdir()]
    return sorted(entry.job_id for run in runs for entry in run.submissions())


def counts(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """The runs of each stage, as the plan has them."""
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"^(new|waiting|running|finished|unknown) +(\d+)", done.stdout, re.M)
    return {stage: int(count) for stage, count in lines}


def test_an_array_whose_submitter_dies_before_it_is_noted_is_found_by_its_mark(
    slurm: SlurmCluster, site: Site, study: Path, flowjobs: Command
) -> None:
    # Nor does the site keep comments: the mark is in the names of its logs too.
    site("sbatch", '$real --parsable "${@:3}"; kill -9 $PPID')
    assert flowjobs(*HELD).returncode == -9
    assert len(tasks(slurm)) == 6
    assert noted(study) == []
    # For all commands its tasks are jobs of their runs.
    runs = [Run.at(folder) for folder in sorted((study / "runs").iterdir())]
    busy = running_jobs(runs)
    assert {str(job).partition(" (pending)")[0] for job in busy.values()} == {
        f"job {task}" for task in tasks(slurm)
    }
    # They may be another user's, or sbatch may just be taking it.
    (array,) = arrays_of(study)
    os.chown(array.folder, 65534, -1)
    site("squeue", "exit 0")
    said = [str(job) for job in running_jobs(runs).values()]
    assert ["user 65534 has prepared an array" in words for words in said] == [True] * 6
    os.chown(array.folder, os.getuid(), -1)
    os.utime(array.folder)  # as if it had just been prepared
    said = [str(job) for job in running_jobs(runs).values()]
    assert ["sbatch may be taking it" in words for words in said] == [True] * 6
    os.utime(array.folder, (0, 0))
    assert running_jobs(runs) == {}
    site("sbatch", "exit 1")
    # From another cluster on the same home: its queue says nothing of it.
    site("squeue", "exit 0")
    site("scontrol", '$real "$@" | sed "s/^ClusterName.*/ClusterName = other/"')
    elsewhere = flowjobs("sweep", "ablation")
    assert counts(elsewhere) == {"unknown": 6}
    assert "an array of the cluster flowjobs was prepared and not noted" in elsewhere.stdout
    one = flowjobs(
        "submit", "--flow", "icfm", "--seed", "1", "--name", "mlp-icfm-digits-none-seed1"
    )
    assert "whether its tasks wait there is unknown" in one.stderr
    site("squeue", '$real "$@"')
    site("scontrol", '$real "$@"')
    again = flowjobs("sweep", "ablation")
    assert counts(again) == {"waiting": 6}
    assert "waits held by its user: `scontrol release" in again.stdout
    assert "had been submitted and not noted: it is now" in again.stdout
    assert noted(study) == tasks(slurm)
    assert flowjobs("cancel", "ablation").returncode == 0
    wait_until(lambda: tasks(slurm) == [], "the tasks to be cancelled", 30)


def test_an_array_that_not_all_of_its_runs_could_note_is_told_of_and_kept(
    slurm: SlurmCluster, site: Site, study: Path, flowjobs: Command
) -> None:
    in_the_way = study / "runs/mlp-icfm-digits-none-seed2/jobs.jsonl"
    # As a full quota would: what is to be written after the submission cannot be.
    site("sbatch", f'$real "$@"; mkdir -p {in_the_way}')
    told = flowjobs(*HELD)
    assert told.returncode == 75, told.stderr
    array_id = tasks(slurm)[0].partition("_")[0]
    assert f"job {array_id} was submitted, and not all of its runs could note it" in told.stderr
    assert len(list((study / "runs").iterdir())) == len(tasks(slurm)) == 6
    in_the_way.rmdir()
    shutil.rmtree(study / "runs/mlp-otcfm-digits-none-seed0")  # its user has had enough of it
    site("sbatch", "exit 1")
    assert flowjobs("sweep", "ablation").returncode == 2  # the one that is new
    assert noted(study) == [f"{array_id}_{task}" for task in (0, 1, 2, 4, 5)]


def test_an_array_that_comes_late_finds_no_runs(
    slurm: SlurmCluster, site: Site, study: Path, flowjobs: Command
) -> None:
    late = 'until [ -e go ]; do sleep 0.1; done; $real "${@:1:$#-1}" read > late'
    # sbatch has read the batch file, and reaches the controller when its caller is long dead.
    site("sbatch", f'cp "${{@: -1}}" read; ({late}) >/dev/null 2>&1 &\nkill -9 $PPID')
    assert flowjobs(*SWEEP).returncode == -9
    site("sbatch", '$real "$@"')
    again = flowjobs(*HELD)
    assert counts(again) == {"new": 6}
    Path("go").touch()
    wait_until(lambda: Path("late").exists() and Path("late").read_text(), "the late one", 30)
    late_id = Path("late").read_text().strip()

    def states() -> Counter[str]:
        said = slurm.run("squeue", "-h", "-r", "-t", "all", "-j", late_id, "-o", "%T")
        return Counter(said.split())

    wait_until(lambda: states() == {"FAILED": 6}, "its tasks to end", 60, lambda: str(states()))
    assert noted(study) == tasks(slurm)
    assert all(Run.at(folder).status() == RunStatus() for folder in (study / "runs").iterdir())


def test_a_task_notes_itself_where_nobody_has(
    slurm: SlurmCluster, site: Site, study: Path, flowjobs: Command
) -> None:
    site("sbatch", '$real "$@"; kill -9 $PPID')
    sweep = ("sweep", "--seed", "0", "--epochs", "1", "--wandb-mode", "disabled")
    assert flowjobs(*sweep).returncode == -9
    run = Run(study, "mlp-icfm-digits-none")
    wait_until(run.finished, "the run to finish", 120)
    (entry,) = run.submissions()
    array = arrays_of(study)[0]
    assert entry.mark == array.mark
    assert entry.array == array.folder.name
    assert Path(entry.log).parent == run.logs
    assert "finished" in Path(entry.log).read_text()
    assert counts(flowjobs(*sweep)) == {"finished": 1}
    assert len(run.submissions()) == 1


def test_a_run_that_cannot_be_extended_keeps_no_other_from_it(
    slurm: SlurmCluster, study: Path, flowjobs: Command
) -> None:
    names = [f"mlp-icfm-digits-none-seed{seed}" for seed in range(4)]
    whole = patient_for_five(study, names[0], 10)
    patient_for_five(study, names[1], 6, losses=[1.0] * 6, seed=1)
    of_a_notebook = patient_for_five(study, names[2], 6, state="preempted", seed=2)
    patient_for_five(study, names[3], 4, state="failed", seed=3)
    status = of_a_notebook.status()
    status.model = "__main__:Net"
    status.write(of_a_notebook.status_file)
    sweep = ("sweep", "--seed", "0", "1", "2", "3", "--epochs", "20", "--name", "s")
    done = flowjobs(*sweep, "--wandb-mode", "disabled", "--sbatch", "hold=True")
    assert (done.returncode, done.stderr.count("error: ")) == (2, 2), done.stderr
    assert f"error: {names[2]} was trained in Python with __main__:Net" in done.stderr
    assert f"error: so not started: {names[2]}\n" in done.stderr
    assert "finished   1\n           1 of them ran out of patience" in done.stdout
    assert "to resume  2\n" in done.stdout
    assert re.search(r"^failed     1: .*\n +1 run still with --epochs 10: once", done.stdout, re.M)
    assert f"extends {names[0]} from 10 to 20 epochs" in done.stdout
    assert re.search(r"^submitted  job \d+, 1 run$", done.stdout, re.M), done.stdout
    assert noted(study) == tasks(slurm)
    assert [entry.array for entry in whole.submissions()] == [arrays_of(study)[0].folder.name]
    # Nor is the sweep that is saved one that is refused.
    again = flowjobs("sweep", "s", "--dry-run")
    assert "waiting    1\n" in again.stdout, again.stdout + again.stderr
    assert "nothing to submit" in again.stdout


def test_what_the_cluster_does_not_take_now_comes_with_the_next_call(
    slurm: SlurmCluster, site: Site, study: Path, flowjobs: Command
) -> None:
    site("sbatch", LIMIT_OF_FOUR)
    first = flowjobs(*HELD)
    assert counts(first) == {"new": 6}
    assert "does not take 2 runs more now" in first.stdout, first.stdout
    assert len(noted(study)) == len(tasks(slurm)) == 4
    assert len(list((study / "runs").iterdir())) == 4
    site("sbatch", '$real "$@"')
    assert counts(flowjobs("sweep", "ablation")) == {"waiting": 4, "new": 2}
    assert noted(study) == tasks(slurm)
    assert len(tasks(slurm)) == 6


def throttles(slurm: SlurmCluster) -> list[str]:
    arrays = dict.fromkeys(task.partition("_")[0] for task in tasks(slurm) if "_" in task)
    return [slurm.job(array)["ArrayTaskThrottle"] for array in arrays]


def test_what_the_cluster_does_not_take_has_no_part_in_what_runs_at_a_time(
    slurm: SlurmCluster, site: Site, study: Path, flowjobs: Command
) -> None:
    site("sbatch", LIMIT_OF_FOUR)
    first = flowjobs(*HELD, "--seed", "0", "1", "2", "3", "--parallel", "4")
    assert counts(first) == {"new": 8}
    assert "does not take 4 runs more now" in first.stdout, first.stdout
    (array,) = {task.partition("_")[0] for task in tasks(slurm)}
    assert f"job {array} runs 4 at a time from now on" in first.stdout
    assert throttles(slurm) == ["4"]
    # Refused altogether, it leaves the older one as it was.
    site("sbatch", "echo 'sbatch: error: Invalid account' >&2; exit 1")
    refused = flowjobs("sweep", "ablation", "--parallel", "4")
    assert (refused.returncode, throttles(slurm)) == (2, ["4"]), refused.stdout + refused.stderr
    assert flowjobs("cancel", "ablation").returncode == 0
    wait_until(lambda: tasks(slurm) == [], "the tasks to be cancelled", 30)

    def what_became_of_them() -> bool:
        return "is unknown" not in flowjobs("retry", "ablation", "--dry-run").stdout

    # The controller may have forgotten them before accounting has a word of them.
    wait_until(what_became_of_them, "accounting to know", 60)
    site("sbatch", '$real "$@"')
    for _ in range(2):
        slurm.submit("--hold", "--wrap=true")
    site("sbatch", LIMIT_OF_FOUR)
    retried = flowjobs("retry", "ablation", "--parallel", "2")
    assert "does not take 2 runs more now" in retried.stdout, retried.stdout + retried.stderr
    assert throttles(slurm)[-1] == "2"


def test_what_is_in_the_queue_is_said_though_the_next_array_is_refused_or_ctrl_c_comes(
    slurm: SlurmCluster, site: Site, study: Path, flowjobs: Command, workplace: Path
) -> None:
    (workplace / "two.toml").write_text(
        "[grid]\nseed = [0, 1]\n[[zip]]\nflow = ['icfm', 'otcfm']\nmem_gb = [1, 2]\n"
        "[slurm]\nsbatch = { hold = true }\n[tracking]\nwandb_mode = 'disabled'\n"
    )
    submitted = re.compile(r"^submitted  job \d+, (\d) runs$", re.M)
    # As of a time limit that is too long for all of these, whatever room there is.
    policy = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
    of_two = 'if grep -q -- "--mem=2" "${@: -1}"; then'
    site("sbatch", f'{of_two} echo "sbatch: error: {policy}" >&2; exit 1; fi; $real "$@"')
    refused = flowjobs("sweep", "two.toml")
    assert (refused.returncode, policy in refused.stderr) == (2, True), refused.stdout
    assert submitted.findall(refused.stdout) == ["2"]
    assert len(noted(study)) == len(list((study / "runs").iterdir())) == 2
    site("sbatch", '$real "$@"; kill -INT $PPID')
    stopped = flowjobs("sweep", "two")
    assert stopped.returncode == 130, stopped.stdout + stopped.stderr
    assert submitted.findall(stopped.stdout) == ["2"]
    assert len(tasks(slurm)) == 4
    assert noted(study) == tasks(slurm)


def test_nothing_is_left_of_what_is_refused(
    slurm: SlurmCluster, study: Path, flowjobs: Command
) -> None:
    refused = flowjobs(*SWEEP, "--partition", "nowhere")
    assert refused.returncode == 2
    assert "nowhere is not one of gpu, preempt" in refused.stderr
    assert list((study / "runs").iterdir()) == []
    assert arrays_of(study) == []


def test_nothing_is_submitted_while_it_is_unknown_what_there_is(
    slurm: SlurmCluster, site: Site, study: Path, flowjobs: Command
) -> None:
    site("sbatch", '$real "$@" >/dev/null; touch asked; exit 1')
    site("squeue", '[ -e asked ] && exit 1; $real "$@"')
    unknown = flowjobs(*HELD)
    assert unknown.returncode == 75, unknown.stderr
    assert "whether the job was taken is unknown" in unknown.stderr
    still = flowjobs(*HELD)
    assert still.returncode != 0
    assert "Slurm does not say which jobs there are" in still.stderr
    Path("asked").unlink()
    assert counts(flowjobs("sweep", "ablation")) == {"waiting": 6}
    assert noted(study) == tasks(slurm)


def test_who_is_asked_keeps_nobody_waiting_and_starts_nothing_cancelled_meanwhile(
    slurm: SlurmCluster, site: Site, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site("sbatch", 'grep -- --array "${@: -1}" > asked; exit 1')
    run = Run(study, "mlp-icfm-digits-none-seed0")
    run.create(RunConfig(TrainingConfig(seed=0)))
    seeds = [str(seed) for seed in range(101)]
    command = [sys.executable, "-m", "flowjobs", "sweep", "--seed", *seeds]
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, text=True) as sweep:
        os.close(theirs)
        assert sweep.stdout is not None
        try:
            said = ""
            while "submit 101 runs? [y/N] " not in said:
                more = sweep.stdout.read(1)
                assert more, said
                said += more
            monkeypatch.setattr("flowjobs.jobs.array.SUBMIT_WAIT_S", 5.0)
            with submitting(study):
                run.request_cancel()
            os.write(ours, b"y\n")
            said += sweep.communicate(timeout=600)[0]
        finally:
            os.close(ours)  # where nobody answers, it hears that
    assert "cancelled  1 of them by now: not started" in said
    assert "0-99" in Path("asked").read_text()
    assert run.cancel_requested()


def test_a_sweep_is_split_by_what_its_runs_ask_for_and_its_parallel_changes(
    slurm: SlurmCluster, site: Site, study: Path, flowjobs: Command, workplace: Path
) -> None:
    site("scontrol", '$real "$@" | sed "s/^MaxArraySize.*/MaxArraySize = 2/"')
    (workplace / "two.toml").write_text(
        "[grid]\nseed = [0, 1, 2]\n[[zip]]\nflow = ['icfm', 'otcfm']\nmem_gb = [1, 2]\n"
        "[slurm]\nsbatch = { hold = true }\n[tracking]\nwandb_mode = 'disabled'\n"
    )
    done = flowjobs("sweep", "two.toml", "--parallel", "2")
    # Three runs with 1 GB and three with 2 GB, in arrays of two at most.
    assert re.findall(r"job \d+, (\d) run", done.stdout) == ["2", "1", "2", "1"], done.stderr
    assert "4 at a time, not 2: at least one job of each array runs (4 arrays)\n" in done.stdout
    assert {slurm.job(task)["ArrayTaskThrottle"] for task in tasks(slurm)} == {"1"}
    asked = {Run(study, f"mlp-{flow}-digits-none-seed0") for flow in ("icfm", "otcfm")}
    memory = {
        slurm.job(run.submissions()[0].job_id)["MinMemoryNode"] for run in sorted(asked, key=str)
    }
    assert memory == {"1G", "2G"}
    # Of what has ended Slurm keeps no number, and says so with an exit code of 1.
    slurm.run("scancel", min(tasks(slurm), key=lambda task: [*map(int, task.split("_"))]))
    done = flowjobs("sweep", "two", "--parallel", "8")
    assert done.returncode == 0, done.stderr
    # Shared by the runs that are left: one array has two, the others one each.
    assert sorted(re.findall(r"runs (\d) at a time from now on", done.stdout)) == list("1112")
    assert " 8 at a time\n" in done.stdout
    throttles = Counter(slurm.job(task)["ArrayTaskThrottle"] for task in tasks(slurm))
    assert throttles == {"2": 2, "1": 3}
    shared = flowjobs("sweep", "two", "--parallel", "3", "--runs-per-gpu", "4")
    assert (shared.returncode, "expected at least 4, or fewer" in shared.stderr) == (2, True)


@pytest.mark.parametrize(
    ("parts", "parallel", "jobs"),
    [
        ([ArrayLeft(14), ArrayLeft(13)], 4, [2, 2]),  # all of it is handed out
        ([ArrayLeft(30), ArrayLeft(1), ArrayLeft(1)], 4, [2, 1, 1]),  # one of each, no more in all
        ([ArrayLeft(2), ArrayLeft(1), ArrayLeft(2), ArrayLeft(1)], 2, [1, 1, 1, 1]),
        ([ArrayLeft(20, slots=4), ArrayLeft(20, slots=4)], 10, [1, 1]),  # no third job has room
        ([ArrayLeft(20, slots=4), ArrayLeft(5)], 10, [2, 2]),
        ([ArrayLeft(1, slots=4), ArrayLeft(40)], 4, [1, 3]),  # of four slots one has a run
        ([], 3, []),
    ],
)
def test_arrays_share_what_is_to_run_at_a_time(
    parts: list[ArrayLeft], parallel: int, jobs: list[int]
) -> None:
    assert jobs_at_once(parts, parallel) == jobs


@pytest.mark.parametrize(
    ("runs", "slots", "parallel", "rounds"),
    [
        *((40, 4, 8, 5), (40, 2, 8, 5), (48, 4, 8, 6), (60, 4, 12, 5), (64, 4, 8, 8), (3, 4, 8, 1)),
        *((10, 4, 12, 1), (6, 4, 8, 1)),
    ],
)
def test_packs_train_as_many_at_a_time_as_was_asked_for_to_the_end(
    study: Path, runs: int, slots: int, parallel: int, rounds: int
) -> None:
    new = [Member(Run(study, f"{number}"), RunConfig(), "new") for number in range(runs)]
    _, part = share_parallel([], new, parallel, slots)
    packs = tasks_of(range(runs), part, slots)
    assert sorted(itertools.chain(*packs)) == [*range(runs)]
    (at_once,) = jobs_at_once([ArrayLeft(runs, slots)], parallel)
    rounds_of = [math.ceil(len(pack) / slots) for pack in packs]  # runs take equally long
    assert sum(rounds_of[::at_once]) == rounds


def test_a_description_that_was_kept_is_the_same_sweep(
    study: Path, flowjobs: Command, workplace: Path
) -> None:
    local = ("--cluster", "local", "--epochs", "1", "--wandb-mode", "disabled")
    one = flowjobs("sweep", "--lr", "0.1", *local)
    assert one.returncode == 0, one.stderr
    # A sweep that grows keeps the names of the runs that it has.
    grown = flowjobs("sweep", "--lr", "0.1", "0.2", *local, "--dry-run")
    assert counts(grown) == {"finished": 1, "new": 1}
    # Another one under the name that nobody chose is an error, as is another value of a run.
    other = flowjobs("sweep", "--seed", "3", "4", *local)
    assert other.returncode == 2
    assert "has runs that this one has not: mlp-icfm-digits-none; give this one" in other.stderr
    Path("flowjobs.toml").write_text("weight_decay = 0.5")  # a changed default
    changed = flowjobs("sweep", "ablation", "--cluster", "local")
    assert changed.returncode == 2
    assert "mlp-icfm-digits-none:\n  --weight-decay: 0.01 there, 0.5 asked for" in changed.stderr
    assert json.loads((study / "runs/mlp-icfm-digits-none/config.json").read_text())["training"][
        "weight_decay"
    ] == pytest.approx(0.01)
