"""A Slurm cluster on this machine, and what a test does to it."""

import contextlib
import os
import re
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from tests.cluster import client
from tests.cluster.boot import Boot
from tests.cluster.ports import Ports
from tests.cluster.services import Services
from tests.cluster.settings import write_settings
from tests.cluster.waiting import ClusterError, wait_until

ROOT_VARIABLE = "FLOWJOBS_TEST_CLUSTER"


def default_root() -> Path:
    """$FLOWJOBS_TEST_CLUSTER, or a folder of this user under the temporary folder."""
    chosen = os.environ.get(ROOT_VARIABLE)
    return Path(chosen or Path(tempfile.gettempdir()) / f"flowjobs-slurm-{os.getuid()}").absolute()


class SlurmCluster:
    """Four nodes n1 to n4 with four GPUs each, in the partitions of `conf/slurm.conf`.

    Args:
        root: where settings, state and logs go; every process of the cluster is known by it, so
            another object with the same root, in any process, is the same cluster.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._services = Services(self.root)
        self._boot = Boot(self._services)

    # The whole cluster

    def up(self) -> bool:
        """Boots the cluster, or starts what is missing of it. False if it was up.

        Raises:
            ClusterError: a daemon does not start; the text has the end of its log.
        """
        return self._boot.up()

    def down(self) -> None:
        """Ends every job and daemon. Does nothing if the cluster is down."""
        self._boot.down()

    def is_up(self) -> bool:
        """Whether every daemon runs, the controller answers and each node takes jobs."""
        return self._boot.is_up()

    @contextlib.contextmanager
    def reserved(self) -> Iterator[None]:
        """Keeps other test sessions off the cluster: they would cancel each other's jobs.

        Raises:
            ClusterError: another session has it.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._boot.lock("tests", wait=False))
            except BlockingIOError as error:
                raise ClusterError(
                    f"other tests are using the cluster in {self.root}: wait until they end, or "
                    f"set {ROOT_VARIABLE} to another folder for a cluster of your own"
                ) from error
            yield

    def daemons(self) -> dict[str, int | None]:
        """The process id of each daemon, None where it does not run."""
        return self._services.pids()

    def reset(self) -> None:
        """The state between two tests: no jobs, all nodes idle, controller up, user signal on."""
        self._services.start_accounting()
        self.start_controller()
        self.set_user_signal(True)
        self._boot.start_nodes_without_jobs()

    @property
    def env(self) -> dict[str, str]:
        """The variables with which Slurm's commands talk to this cluster."""
        return {"SLURM_CONF": str(self._services.slurm_conf)}

    def run(self, *command: str) -> str:
        """Runs a client command, `run("scontrol", "show", "nodes")`, and returns what it printed.

        Raises:
            CommandError: it failed; the text has its stderr.
        """
        return client.run_client(self._services.slurm_conf, command)

    # Jobs

    def submit(self, *arguments: str) -> str:
        """`sbatch` with these arguments; returns the job's id."""
        return self.run("sbatch", "--parsable", *arguments).strip()

    def job(self, job_id: str | int) -> dict[str, str]:
        """What the controller says of a job now, by scontrol's names; of an array, one task."""
        text = self.run("scontrol", "show", "job", str(job_id), "--oneliner")
        return client.parse_fields(text.splitlines()[0])

    def accounting(self, job_id: str | int) -> list[dict[str, str]]:
        """sacct's rows of a job by `client.ACCOUNTING_FIELDS`, one for each start, oldest first."""
        return client.parse_accounting(self.run(*client.accounting_command(str(job_id))))

    def wait_state(
        self, job_id: str | int, states: str | Collection[str], timeout_s: float = 120
    ) -> str:
        """Waits until the controller shows the job in one of the states, and returns which.

        Raises:
            ClusterError: it is in none of them in time; the text has the job's record.
        """
        wanted = {states} if isinstance(states, str) else set(states)

        def state() -> str | None:
            now = self.job(job_id)["JobState"]
            return now if now in wanted else None

        def record() -> str:
            return self.run("scontrol", "show", "job", str(job_id))

        return wait_until(state, f"job {job_id} to be {' or '.join(wanted)}", timeout_s, record)

    def hurry(self, job_id: str | int, timeout_s: float = 120) -> None:
        """Starts a requeued job in a second that would wait for its BeginTime, once it waits."""

        def waits() -> bool:
            return self.job(job_id)["JobState"] in ("PENDING", "RUNNING")

        wait_until(waits, f"job {job_id} to wait in the queue", timeout_s)
        if self.job(job_id)["JobState"] == "PENDING":
            # Started in the second in which its last start ended, a job is refused by the node:
            # "already killed, do not launch".
            with contextlib.suppress(client.CommandError):  # it has started meanwhile
                self.run("scontrol", "update", f"jobid={job_id}", "starttime=now+1")

    def cancel_all(self, timeout_s: float = 120) -> None:
        """Kills the processes of every job, cancels it and waits until the queue is empty."""
        self._services.end_jobs(timeout_s)

    # Faults

    def preempt(self, name: str) -> str:
        """Submits a job that needs a whole node and preempts for it; returns the new job's id.

        It holds the node until it is cancelled, so that what it preempted does not start there.
        """
        node = ("-p", "gpu", "-w", name, "--exclusive", "--gres=gpu:4")
        return self.submit(*node, "--output=/dev/null", "--wrap=sleep 600")

    def kill_node(self, name: str) -> None:
        """The node loses power: slurmd, slurmstepd and every process of its jobs die at once.

        Slurm finds out minutes later, or when the node is started again, or by `mark_down`.
        """
        self._services.nodes[name].kill()

    def kill_slurmd(self, name: str) -> None:
        """Only slurmd dies, by SIGKILL; slurmstepd and the jobs' processes live on."""
        self._services.nodes[name].slurmd.kill()

    def start_node(self, name: str) -> None:
        """Brings a node back and waits until it takes jobs; resumes it if it is down or drained.

        Jobs that were lost with the node are requeued by then; those that run there still, do.
        """
        self._services.nodes[name].bring_back()

    def mark_down(self, name: str) -> None:
        """Slurm takes a killed node for lost now, not only when it finds out by itself."""
        self._services.nodes[name].set_state("down")

    def stop_controller(self) -> None:
        """Ends slurmctld, which saves its state; nodes and jobs go on."""
        self._services.slurmctld.stop()
        self._set_message_timeout(5)  # nobody will answer, which commands wait for

    def start_controller(self) -> None:
        """Starts slurmctld and waits until it answers."""
        self._set_message_timeout(60)
        self._services.start_controller()

    def restart_controller(self) -> None:
        """Ends slurmctld and starts it again."""
        self.stop_controller()
        self.start_controller()

    def set_user_signal(self, on: bool) -> None:
        """Whether a preempted job gets the signal it asked for with --signal, or only TERM.

        Sets or drops SlurmctldParameters=preempt_send_user_signal, and waits until it holds.
        """
        if self._user_signal() == on:
            return
        write_settings(self.root, Ports.load(self.root), user_signal=on)
        self.run("scontrol", "reconfigure")
        wait_until(lambda: self._user_signal() == on, "the new settings to hold", 60)

    def _user_signal(self) -> bool:
        return "preempt_send_user_signal" in self.run("scontrol", "show", "config")

    def _set_message_timeout(self, seconds: int) -> None:
        settings = self._services.slurm_conf
        line = f"MessageTimeout={seconds}"
        new = settings.with_name("slurm.conf.new")
        new.write_text(re.sub(r"MessageTimeout=\d+", line, settings.read_text()))
        new.replace(settings)
