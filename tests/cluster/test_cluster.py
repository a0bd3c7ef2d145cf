"""That the cluster is what other tests take it for."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.daemons import Daemon
from tests.cluster.slurm import SlurmCluster
from tests.cluster.waiting import wait_until

# Says which signals it gets and goes on, as a run does that has no time to end.
_RECORD_SIGNALS = """\
import signal, sys, time
names = ["SIGUSR2", "SIGTERM"]
for name in names:
    signal.signal(getattr(signal, name), lambda n, _: print(signal.Signals(n).name, flush=True))
print("ready", flush=True)
while True:
    time.sleep(0.1)
"""


def _start(slurm: SlurmCluster, folder: Path, *arguments: str, command: str = "sleep 300") -> str:
    output = f"--output={folder}/%j.out"
    job = slurm.submit(output, "--gres=gpu:1", *arguments, f"--wrap={command}")
    slurm.wait_state(job, "RUNNING")
    return job


def _kill(slurm: SlurmCluster, daemon: str) -> None:
    pid = slurm.daemons()[daemon]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: slurm.daemons()[daemon] is None, f"{daemon} to die", 60)


def _wait_text(path: Path, text: str, timeout_s: float = 600) -> None:
    end = time.monotonic() + timeout_s
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < end, f"no {text} in {path}"
        time.sleep(0.05)


def _last_state(slurm: SlurmCluster, job: str, index: int) -> str:
    """sacct's state of one start of a job, once it says so: its rows come seconds late."""
    end = time.monotonic() + 600
    while True:
        states = [row["State"] for row in slurm.accounting(job)]
        if index < len(states) and states[index] not in ("PENDING", "RUNNING"):
            return states[index]
        assert time.monotonic() < end, states
        time.sleep(0.2)


def test_four_nodes_are_idle(slurm: SlurmCluster) -> None:
    nodes = slurm.run("sinfo", "--Node", "--noheader", "-p", "gpu", "-o", "%N %T %G")
    assert nodes.split() == [
        word for name in ("n1", "n2", "n3", "n4") for word in (name, "idle", "gpu:4")
    ]


def test_job_sees_its_gpus_its_node_and_the_other_nodes(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    command = "hostname; echo $CUDA_VISIBLE_DEVICES; getent hosts n2; srun hostname | sort"
    job = slurm.submit(
        *("-N2", "-w", "n[3-4]", "--gres=gpu:2", f"--output={tmp_path}/out", f"--wrap={command}")
    )
    slurm.wait_state(job, "COMPLETED")
    words = (tmp_path / "out").read_text().split()
    assert words[:4] == ["n3", "0,1", "127.0.0.1", "localhost"]
    assert words[-2:] == ["n3", "n4"]
    assert _last_state(slurm, job, 0) == "COMPLETED"


def test_commands_in_this_process_reach_the_cluster(slurm: SlurmCluster) -> None:
    assert os.environ["SLURM_CONF"] == slurm.env["SLURM_CONF"]
    done = subprocess.run("sinfo", capture_output=True, text=True, check=True)
    assert "preempt-nograce" in done.stdout


@pytest.mark.long  # test_nothing_is_lost.py needs the same
def test_preempted_job_is_requeued(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = _start(slurm, tmp_path, "-p", "preempt", "-w", "n1")
    preemptor = slurm.preempt("n1")
    slurm.wait_state(preemptor, "RUNNING")
    assert slurm.job(job)["JobState"] == "PENDING"
    slurm.run("scancel", preemptor)
    slurm.hurry(job)
    slurm.wait_state(job, "RUNNING")
    assert slurm.job(job)["Restarts"] == "1"
    assert _last_state(slurm, job, 0) == "PREEMPTED"


@pytest.mark.long  # test_nothing_is_lost.py needs the same
@pytest.mark.parametrize(
    ("partition", "state"), [("preempt-nograce", "PENDING"), ("preempt-cancel", "PREEMPTED")]
)
def test_other_partitions_are_preempted_too(
    slurm: SlurmCluster, tmp_path: Path, partition: str, state: str
) -> None:
    job = _start(slurm, tmp_path, "-p", partition, "-w", "n1")
    slurm.wait_state(slurm.preempt("n1"), "RUNNING")
    assert slurm.job(job)["JobState"] == state


@pytest.mark.parametrize(("on", "first"), [(True, "SIGUSR2"), (False, "SIGTERM")])
def test_user_signal_can_be_switched_off(
    slurm: SlurmCluster, tmp_path: Path, on: bool, first: str
) -> None:
    slurm.set_user_signal(on)
    script = tmp_path / "record.py"
    script.write_text(_RECORD_SIGNALS)
    arguments = ("-p", "preempt", "-w", "n1", "--signal=USR2@90")
    job = _start(slurm, tmp_path, *arguments, command=f"srun python3 {script}")
    _wait_text(tmp_path / f"{job}.out", "ready")
    slurm.preempt("n1")
    _wait_text(tmp_path / f"{job}.out", "SIG")
    words = (tmp_path / f"{job}.out").read_text().split()
    assert next(word for word in words if word.startswith("SIG")) == first


def test_job_of_a_killed_node_is_requeued(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = _start(slurm, tmp_path, "-p", "preempt", "-w", "n2")
    slurm.kill_node("n2")
    slurm.start_node("n2")
    slurm.hurry(job)
    slurm.wait_state(job, "RUNNING")
    time.sleep(1)  # its end would be the old start's, come late
    assert slurm.job(job)["JobState"] == "RUNNING"
    assert _last_state(slurm, job, 0) == "NODE_FAIL"


def test_killed_node_is_found_out_or_marked(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = _start(slurm, tmp_path, "-p", "preempt", "-w", "n[1-2]", "-N2", "--no-requeue")
    slurm.kill_node("n2")
    slurm.mark_down("n2")
    slurm.wait_state(job, "NODE_FAIL")


def test_job_survives_the_death_of_slurmd(slurm: SlurmCluster, tmp_path: Path) -> None:
    dead, back = tmp_path / "dead", tmp_path / "back"
    wait = "until [ -e {} ]; do sleep 0.1; done"
    command = f"echo begun; {wait.format(dead)}; echo one; {wait.format(back)}; echo two"
    job = _start(slurm, tmp_path, "-w", "n3", command=command)
    _wait_text(tmp_path / f"{job}.out", "begun")
    slurm.kill_slurmd("n3")
    dead.touch()
    _wait_text(tmp_path / f"{job}.out", "one")
    slurm.start_node("n3")
    back.touch()
    slurm.wait_state(job, "COMPLETED")
    assert (tmp_path / f"{job}.out").read_text().split() == ["begun", "one", "two"]


def test_job_survives_a_restart_of_the_controller(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = _start(slurm, tmp_path)
    slurm.restart_controller()
    assert slurm.job(job)["JobState"] == "RUNNING"


def test_reset_ends_jobs_that_ignore_term(slurm: SlurmCluster, tmp_path: Path) -> None:
    script = tmp_path / "record.py"
    script.write_text(_RECORD_SIGNALS)
    for command in (f"srun python3 {script}", f"setsid python3 {script} & wait"):
        job = _start(slurm, tmp_path, command=command)
        _wait_text(tmp_path / f"{job}.out", "ready")
    slurm.reset()
    assert slurm.run("squeue", "--noheader") == ""
    assert slurm.run("sinfo", "-h", "-p", "gpu", "-o", "%T").split() == ["idle"]


def test_second_up_changes_nothing(slurm: SlurmCluster) -> None:
    before = slurm.daemons()
    assert not slurm.up()
    assert slurm.daemons() == before


@pytest.mark.parametrize(
    "name",
    [
        "munged",
        *(pytest.param(n, marks=pytest.mark.long) for n in ("mariadbd", "slurmdbd", "slurmd-n4")),
    ],
)
def test_up_starts_again_what_died(slurm: SlurmCluster, tmp_path: Path, name: str) -> None:
    job = _start(slurm, tmp_path, "-w", "n1")
    before = slurm.daemons()
    pid = before.pop(name)
    _kill(slurm, name)
    assert slurm.up()
    after = slurm.daemons()
    assert after.pop(name) not in (None, pid)
    assert after == before
    assert slurm.job(job)["JobState"] == "RUNNING"


def test_up_boots_anew_when_the_controller_died(slurm: SlurmCluster) -> None:
    before = slurm.daemons()
    _kill(slurm, "slurmctld")
    assert slurm.up()
    assert slurm.is_up()
    assert not before.items() & slurm.daemons().items()


def test_pid_file_of_a_strangers_process_is_not_believed(tmp_path: Path) -> None:
    daemon = Daemon("daemon", tmp_path, ("sleep", "300"))
    daemon.pid_file.parent.mkdir()
    daemon.pid_file.write_text(str(os.getpid()))
    assert daemon.pid() is None
    daemon.stop()  # does not end this process


def test_folder_of_others_is_not_wiped(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RuntimeError, match="choose another"):
        SlurmCluster(tmp_path).up()
    assert (tmp_path / "thesis.tex").exists()
