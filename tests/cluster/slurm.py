"""A Slurm cluster on this machine, and what a test does to it."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from tests.cluster import client, settings
from tests.cluster.ports import Ports, free_ports
from tests.cluster.services import Services
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

    # ---- the whole cluster ---------------------------------------------------------------

    def up(self) -> bool:
        """Boots the cluster, or starts what is missing of it. False if it was up.

        Raises:
            ClusterError: a daemon does not start; the text has the end of its log.
        """
        with self._lock("boot"):
            if self.is_up():
                return False
            if self._state_is_usable():
                # If that fails, what an earlier boot left is not as good as it looked.
                with contextlib.suppress(ClusterError):
                    self._boot()
                    return True
            self._wipe()
            try:
                self._boot()
            except ClusterError:
                self._services.stop()
                raise
        return True

    def down(self) -> None:
        """Ends every job and daemon. Does nothing if the cluster is down."""
        with self._lock("boot"):
            if not any(self.daemons().values()):
                self._services.stop()  # jobs may outlive all daemons
                return
            controller_ran = self._services.slurmctld.pid() is not None
            if self._services.stop() and controller_ran:
                self._clean_stop.touch()

    def is_up(self) -> bool:
        """Whether every daemon runs, the controller answers and each node takes jobs."""
        if not all(self.daemons().values()):
            return False
        unusable = "--states=down,drain,no_respond,unknown"
        try:
            return not self.run("sinfo", "--noheader", unusable, "--format=%N").strip()
        except ClusterError:
            return False

    @contextlib.contextmanager
    def reserved(self) -> Iterator[None]:
        """Keeps other test sessions off the cluster: they would cancel each other's jobs.

        Raises:
            ClusterError: another session has it.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._lock("tests", wait=False))
            except BlockingIOError as error:
                raise ClusterError(
                    f"other tests are using the cluster in {self.root}: wait until they end, or "
                    f"set {ROOT_VARIABLE} to another folder for a cluster of your own"
                ) from error
            yield

    def daemons(self) -> dict[str, int | None]:
        """The process id of each daemon, None where it does not run."""
        return {daemon.name: daemon.pid() for daemon in self._services.daemons()}

    def reset(self) -> None:
        """The state between two tests: no jobs, all nodes idle, controller up, user signal on."""
        self._services.start_accounting(self._ports())
        self.start_controller()
        self.set_user_signal(True)
        self._start_nodes_without_jobs()

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

    # ---- jobs ----------------------------------------------------------------------------

    def submit(self, *arguments: str) -> str:
        """`sbatch` with these arguments; returns the job's id."""
        return self.run("sbatch", "--parsable", *arguments).strip()

    def job(self, job_id: str | int) -> dict[str, str]:
        """What the controller says of a job now, by scontrol's names; of an array, one task."""
        text = self.run("scontrol", "show", "job", str(job_id), "--oneliner")
        return client.parse_fields(text.splitlines()[0])

    def accounting(self, job_id: str | int) -> list[dict[str, str]]:
        """sacct's rows of a job by `client.ACCOUNTING_FIELDS`, one for each life, oldest first."""
        return client.parse_accounting(self.run(*client.accounting_command(str(job_id))))

    def wait_state(
        self, job_id: str | int, states: str | Collection[str], timeout_s: float = 30
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

    def hurry(self, job_id: str | int, timeout_s: float = 30) -> None:
        """Starts a requeued job in a second that would wait for its BeginTime, once it waits."""

        def waits() -> bool:
            return self.job(job_id)["JobState"] in ("PENDING", "RUNNING")

        wait_until(waits, f"job {job_id} to wait in the queue", timeout_s)
        if self.job(job_id)["JobState"] == "PENDING":
            # Started in the second in which its last life ended, a job is refused by the node:
            # "already killed, do not launch".
            self.run("scontrol", "update", f"jobid={job_id}", "starttime=now+1")

    def cancel_all(self, timeout_s: float = 30) -> None:
        """Kills the processes of every job, cancels it and waits until the queue is empty."""

        def queue_is_empty() -> bool:
            if not self.run("squeue", "-h", "-o", "%A").strip():
                return True
            # Killed first: Slurm takes 3 s and more to end a job whose processes live. Again and
            # again: what ends may start another, or put itself back into the queue.
            for node in self._services.nodes.values():
                node.kill_jobs()
            self.run("scancel", "--user=root")
            return False

        wait_until(queue_is_empty, "the queue to be empty", timeout_s, lambda: self.run("squeue"))

    # ---- faults --------------------------------------------------------------------------

    def preempt(self, name: str) -> str:
        """Submits a job that needs a whole node and preempts for it; returns the new job's id.

        It holds the node until it is cancelled, so that what it preempted does not start there.
        """
        node = ("-p", "gpu", "-w", name, "--exclusive", "--gres=gpu:4")
        return self.submit(*node, "--output=/dev/null", "--wrap=sleep 600")

    def kill_node(self, name: str) -> None:
        """The node loses power: slurmd, slurmstepd and every process of its jobs die at once.

        Slurm finds out some 16 s later, or when the node is started again, or by `mark_down`.
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

    def start_controller(self) -> None:
        """Starts slurmctld and waits until it answers."""
        self._services.start_controller(self._ports())

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
        settings.write_settings(self.root, self._ports(), user_signal=on)
        self.run("scontrol", "reconfigure")
        wait_until(lambda: self._user_signal() == on, "the new settings to hold", 10)

    def _user_signal(self) -> bool:
        return "preempt_send_user_signal" in self.run("scontrol", "show", "config")

    # ---- booting -------------------------------------------------------------------------

    @property
    def _clean_stop(self) -> Path:
        return self.root / "stopped"

    @property
    def _fingerprint(self) -> Path:
        return self.root / "fingerprint"

    def _ports(self) -> Ports:
        return Ports(int((self.root / "ports").read_text()))

    def _state_is_usable(self) -> bool:
        # What a crash left is not worth a repair: a boot from nothing takes seconds.
        alive = any(self.daemons().values())
        if not (alive or self._clean_stop.exists()):
            return False
        return self._fingerprint.exists() and (
            self._fingerprint.read_text() == settings.fingerprint()
        )

    def _wipe(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        content = [path for path in self.root.iterdir() if path != self._fingerprint]
        if self.root.stat().st_uid != os.geteuid() or (content and not self._fingerprint.exists()):
            raise ClusterError(f"{self.root} is not a folder of this test cluster: choose another")
        self._services.stop()
        for path in content:  # all but the fingerprint, lest a wipe cut short is not taken up again
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._fingerprint.write_text(settings.fingerprint())

    def _boot(self) -> None:
        self._clean_stop.unlink(missing_ok=True)
        settings.create_folders(self.root)
        repairs = any(self.daemons().values())
        if not repairs:
            ports = free_ports()
            (self.root / "ports").write_text(str(ports.slurmctld))
            settings.write_settings(self.root, ports, user_signal=True)
        self._services.start_accounting(self._ports())
        self.start_controller()
        if not repairs:
            # Jobs of an earlier boot must not run again: before a node could start one.
            self.run("scancel", "--user=root")
            self._start_nodes_without_jobs()
        else:
            for name in self._services.nodes:
                self.start_node(name)

    def _start_nodes_without_jobs(self) -> None:
        for node in self._services.nodes.values():
            node.slurmd.start()
        # Only now: without slurmd Slurm waits in vain to hear that a job's processes ended.
        self.cancel_all()
        for node in self._services.nodes.values():
            node.wait_ready()

    @contextlib.contextmanager
    def _lock(self, what: str, wait: bool = True) -> Iterator[None]:
        """A lock beside the folder, because a boot may delete the folder."""
        self.root.parent.mkdir(parents=True, exist_ok=True)
        with self.root.with_name(f"{self.root.name}.{what}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield
