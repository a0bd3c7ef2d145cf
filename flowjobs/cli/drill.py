"""flowjobs drill."""

import contextlib
import dataclasses
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flowjobs.cli.defaults import CommandOptions, Defaults, WithDefaults
from flowjobs.cli.json_output import print_json
from flowjobs.cli.parser import Flag
from flowjobs.cli.prepare import check_parts
from flowjobs.config import (
    BUILT_IN_ARCHS,
    Augmentation,
    OptionalInt,
    Precision,
    RunConfig,
    SlurmConfig,
    TrainingConfig,
)
from flowjobs.errors import ConfigError, FlowjobsError, SubmissionUnknownError
from flowjobs.field_values import KeyValues
from flowjobs.runs.run import absolute, default_study
from flowjobs.runs.status import EXIT_CANCELLED, EXIT_FAILED

if TYPE_CHECKING:
    from flowjobs.drill.facts import ClusterFacts
    from flowjobs.drill.report import Report, Row

# The embedded digits in batches of 64.
STEPS_PER_EPOCH = 23
STEPS = 40_000
# Enough for more than the least time limit, a minute.
STEPS_TIME_LIMIT = 200_000
# Noise around the paths is drawn too, and sbcfm has none without.
SIGMA = 0.1
# A short job finds its place sooner.
TIMEOUT_MIN = 30


@dataclass(frozen=True)
class Drill(WithDefaults):
    """Show on your own cluster that an interrupted run ends with the bits of an undisturbed one.

    Takes minutes. Exit code 1 if something is not as promised.
    """

    study: Path = field(default_factory=default_study)
    """Root of the study; the drill's own runs are removed from it unless something fails."""

    cluster: Literal["auto", "slurm", "local"] = "auto"
    """auto: Slurm if its controller answers, else this machine."""

    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    time_limit: Flag = False
    """Let one run meet a time limit too, which takes minutes."""

    arch: str = "mlp"
    """Model: a tiny mlp, unet or dit, or your own as package.module:Name."""

    arch_args: KeyValues = field(default_factory=KeyValues)
    """Arguments of the model; default for those that are built in: width=16 depth=1 dropout=0.1."""

    flow: str = "icfm"
    """Flow, as for submit; not reflow, which needs a finished run."""

    aug: Augmentation = "none"
    """Augmentation of the training data."""

    deterministic: Flag = False
    """Drill runs as --deterministic trains them: on a GPU exact bits need it, on a CPU nothing
    does. A default of flowjobs.toml counts here too, as for --precision and --compile."""

    precision: Precision = "fp32"
    """Precision of the runs, as for submit."""

    compile: Flag = False
    """Compile the model with torch.compile, as for submit."""

    steps: OptionalInt = None
    """Steps of each run; default: 40000, or 200000 with --time-limit."""

    json: Flag = False
    """Print JSON."""

    @classmethod
    def with_defaults(cls, defaults: Defaults) -> "Drill":
        """The command with a file's and sbatch's defaults; of training's only what decides bits."""
        options: CommandOptions = defaults.fill(CommandOptions)
        # The debugger has no job that could be interrupted.
        cluster = "auto" if options.cluster == "debug" else options.cluster
        training: TrainingConfig = defaults.fill(TrainingConfig)
        return cls(
            cluster=cluster,
            slurm=defaults.fill(SlurmConfig),
            deterministic=training.deterministic,
            precision=training.precision,
            compile=training.compile,
        )

    def run(self, defaults: Defaults) -> int:
        """Drill. Returns the exit code."""
        from flowjobs.cli.live_line import StatusLine
        from flowjobs.drill.run import drill
        from flowjobs.jobs.executors import check_local, choose_cluster

        config = RunConfig(self._training(defaults), self.slurm)
        if self.slurm.timeout_min is None:
            config = dataclasses.replace(
                config, slurm=dataclasses.replace(self.slurm, timeout_min=TIMEOUT_MIN)
            )
        defaults.check_sbatch(config.slurm)
        cluster, _ = choose_cluster(self.cluster)
        if cluster == "local":
            check_local(config.slurm)
            if self.time_limit:
                raise ConfigError("--time-limit: expected Slurm, found this machine")
        # It would win over the runs' own configs.
        os.environ["WANDB_MODE"] = "disabled"
        folder = _make_folder(absolute(self.study))
        # Whoever ends it, and also if its terminal is closed: no job is left behind.
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler)
        with StatusLine() as line:
            line.say("submitting", "submitting")
            try:
                report = drill(folder, cluster, config, time_limit=self.time_limit, say=line.say)
            except KeyboardInterrupt:
                shutil.rmtree(folder, ignore_errors=True)
                with contextlib.suppress(OSError):  # its terminal may be gone
                    print("cancelled the drill's jobs", file=sys.stderr, flush=True)
                return EXIT_CANCELLED
            except SubmissionUnknownError:
                raise  # jobs may live, and need the folder
            except FlowjobsError:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        if report.as_promised:
            shutil.rmtree(folder)
        if self.json:
            kept = None if report.as_promised else str(folder)
            summary = {"as_promised": report.as_promised, "folder": kept}
            print_json({**dataclasses.asdict(report), **summary})
        else:
            _print_report(report, folder)
        return 0 if report.as_promised else EXIT_FAILED

    def _training(self, defaults: Defaults) -> TrainingConfig:
        steps = self.steps
        if steps is None:
            steps = STEPS_TIME_LIMIT if self.time_limit else STEPS
        if steps < 1:
            raise ConfigError(f"--steps: found {steps}, expected at least 1")
        arguments = self.arch_args
        if self.arch in BUILT_IN_ARCHS and not arguments:
            arguments = KeyValues(width=16, depth=1, dropout=0.1)
        epochs = -(-steps // STEPS_PER_EPOCH)
        training = TrainingConfig(
            arch=self.arch,
            arch_args=arguments,
            flow=self.flow,
            sigma=SIGMA,
            aug=self.aug,
            epochs=epochs,
            patience=epochs,
            checkpoint_every_s=1.0,
            deterministic=self.deterministic,
            precision=self.precision,
            compile=self.compile,
            evaluate=False,
        )
        training = defaults.resolve_arch(training)
        check_parts(training, absolute(self.study), defaults)
        return training


def _make_folder(study: Path) -> Path:
    try:
        study.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="drill-", dir=study))
    except OSError as error:
        raise ConfigError(f"--study {study}: {error.strerror}: {error.filename}") from error


def _print_report(report: "Report", folder: Path) -> None:
    from rich.table import Table

    from flowjobs.cli.table import plain_console

    for title, text in _facts_in_words(report.facts).items():
        print(f"{title:11} {text}")
    table = Table("drill", "signal", "resumed as", "steps lost", "saved in", "same bits", box=None)
    for row in report.rows:
        table.add_row(*_cells(row, report.facts.notice_s))
    print()
    plain_console().print(table)
    print("(user signal and TERM stand for a preemption, which only the scheduler can cause)\n")
    for row in report.rows:
        if row.problem:
            print(f"{row.way}: {row.problem}")
    for shortfall in report.shortfalls:
        print(shortfall.what)
    if report.as_promised:
        print("as promised")
    else:
        print(f"not as promised; runs and logs are in {folder}")


def _cells(row: "Row", notice_s: float | None) -> list[str]:
    saved = "-"
    if row.saved_s is not None:
        saved = f"{row.saved_s:.1f} s" + (f" of {notice_s:g} s" if notice_s else "")
    return [
        row.way,
        row.signal or "-",
        row.resumed_as or "no",
        "-" if row.steps_lost is None else str(row.steps_lost),
        saved,
        "-" if row.same_bits is None else _yes(row.same_bits),
    ]


def _facts_in_words(facts: "ClusterFacts") -> dict[str, str]:
    node = facts.node
    words = {"cluster": facts.scheduler}
    if facts.scheduler != "this machine":
        grace = "unknown" if facts.grace_s is None else f"{facts.grace_s:g} s"
        kill_wait = "unknown" if facts.kill_wait_s is None else f"{facts.kill_wait_s:g} s"
        words["partition"] = facts.partition or "unknown"
        words["preemption"] = (
            f"PreemptMode {facts.preempt_mode or 'unknown'} ({facts.preempt_type or 'unknown'}), "
            f"GraceTime {grace}, KillWait {kill_wait}, preempt_send_user_signal "
            f"{_yes(facts.user_signal)}"
        )
        words["requeue"] = f"{_yes(facts.requeue)} (JobRequeue {_yes(facts.job_requeue)})"
        words["accounting"] = _yes(facts.accounting)
        if node:
            words["on a node"] = f"{node.host}: sbatch and scontrol {_yes(node.commands)}"
    words["study"] = (
        f"{facts.study}: reached by a job {_yes(node is not None)}, "
        f"file locks hold {_yes(node.locks if node else None)}"
    )
    return words


def _yes(fact: bool | None) -> str:
    return "unknown" if fact is None else "yes" if fact else "no"
