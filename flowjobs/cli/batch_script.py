"""What sbatch/*.sh call: trains under srun, and if that dies silently finds the cause.

python -m flowjobs.cli.batch_script ARGUMENTS         those of `flowjobs train`
python -m flowjobs.cli.batch_script --lines-of FILE   those on the line of the array's task
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from flowjobs.cli.defaults import Defaults, load_defaults
from flowjobs.cli.main import exit_with, parse
from flowjobs.cli.reconcile import print_job_end
from flowjobs.errors import ConfigError, FlowjobsError
from flowjobs.runs.run import Run, absolute, default_study
from flowjobs.slots import JOB_OF_RUN
from flowjobs.slurm.options import SCRIPT_ARGUMENTS, SCRIPT_OUTPUT, srun_options

# Slurm tells them to all of a job; what a batch script has left to do comes after.
OUTLIVED = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


def main() -> None:
    """Run the job's step. Always exits, with srun's exit code."""
    exit_with(lambda: run_step(sys.argv[1:]))


def run_step(script_arguments: Sequence[str]) -> int:
    """Train under srun; if that dies in a job of the run's own, record why.

    Returns:
        srun's exit code.
    """
    from flowjobs.jobs.environment import forget_submitting_job, is_batch_script

    forget_submitting_job()
    by_line = script_arguments[:1] == ["--lines-of"]
    given = script_arguments[1:] if by_line else script_arguments  # to sbatch, after the script
    own = is_batch_script(given)
    if own:
        os.environ[JOB_OF_RUN] = os.environ["SLURM_JOB_ID"]
    elif job_id := os.environ.get("SLURM_JOB_ID"):
        print(
            f"this is not the batch script of job {job_id}, so that is neither requeued nor "
            "cancelled for the run: with sbatch the script gets a job of its own",
            file=sys.stderr,
        )
    if run := _run_so_far(given, by_line=by_line):
        command = ["flowjobs.jobs", str(run.folder)]
    else:
        arguments = _arguments_on_line(given) if by_line else given
        # Bad input ends here, and not on every rank.
        train, defaults = parse(["train", *arguments])
        run = train.prepare(defaults)[0]
        command = ["flowjobs", "train", *arguments]
    for number in OUTLIVED:
        # A handler, unlike SIG_IGN, is not inherited by srun.
        signal.signal(number, lambda number, frame: None)
    code = _train(command, given)
    if code and own and run.exists():
        # After a silent death: its cause, and a restart where that is allowed.
        try:
            print_job_end([run], code)
        except FlowjobsError as error:
            print(f"error: {error}", file=sys.stderr)
    return code


def _run_so_far(given: Sequence[str], *, by_line: bool) -> Run | None:
    """The run that an earlier start of this job trained: a restart resumes it as it was configured,
    whatever a list of runs or flowjobs.toml says by now.

    None if this is the first start, or none got so far.
    """
    from flowjobs.jobs.environment import batch_script_job_id, is_first_start
    from flowjobs.jobs.plain_sbatch import run_of_job

    if is_first_start():
        return None
    arguments, defaults = given, Defaults()
    with contextlib.suppress(ConfigError):
        defaults = load_defaults()
    with contextlib.suppress(ConfigError):
        arguments = _arguments_on_line(given) if by_line else given
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--study", type=Path, default=os.environ.get("FLOWJOBS_STUDY"))
    known.add_argument("--resume")
    options = known.parse_known_args(arguments)[0]
    study = options.study or defaults.values.get("study") or default_study()
    run = run_of_job(absolute(Path(study)), batch_script_job_id(), given)
    if run and options.resume and not run.started():
        return None  # which checkpoint it begins with is in its arguments alone
    return run


def _arguments_on_line(files: Sequence[str]) -> list[str]:
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    if len(files) != 1 or task is None:
        raise ConfigError("expected sbatch --array=1-N sbatch/array.sh FILE, a line a run in FILE")
    try:
        # As a shell passes arguments on, but for the byte order mark that an editor may write.
        text = Path(files[0]).read_text(encoding="utf-8-sig", errors="surrogateescape")
        lines = text.splitlines()
    except OSError as error:
        raise ConfigError(f"{files[0]}: {error.strerror}") from error
    if not 1 <= int(task) <= len(lines):
        raise ConfigError(f"{files[0]} has no line {task}: it has {len(lines)}")
    try:
        arguments = shlex.split(lines[int(task) - 1])
    except ValueError as error:
        raise ConfigError(f"{files[0]}, line {task}: {error}") from error
    if not arguments:
        raise ConfigError(f"{files[0]}, line {task}: found no arguments")
    return arguments


def _train(module: Sequence[str], script_arguments: Sequence[str]) -> int:
    """Run a module with its arguments under srun. Returns the exit code."""
    environment = {
        **os.environ,
        SCRIPT_ARGUMENTS: json.dumps(list(script_arguments)),
        SCRIPT_OUTPUT: json.dumps([_file_of_script(descriptor) for descriptor in (1, 2)]),
        # Slurm may have been told to pass on nothing to srun, which then finds no program.
        "SLURM_EXPORT_ENV": "ALL",
    }
    # srun, so that the signals reach python.
    command = ["srun", "--unbuffered", *srun_options(os.environ.get("SLURM_CPUS_PER_TASK"))]
    command += [*_guard(), sys.executable, "-u", "-m", *module]
    code = subprocess.run(command, env=environment, check=False).returncode
    return code if code >= 0 else 128 - code


def _file_of_script(descriptor: int) -> str:
    """The file that the batch script's output (1) or errors (2) go to; empty if it is none."""
    # Not this process's own: `conda run` puts a pipe between.
    pid = os.environ.get("SLURM_TASK_PID", "self")
    try:
        path = os.readlink(f"/proc/{pid}/fd/{descriptor}")
    except OSError:
        return ""
    return path if os.path.isfile(path) else ""


def _guard() -> list[str]:
    """A signal that comes before python listens would kill it; blocked ones wait.

    Before 2019, env could not do that.
    """
    guard = [shutil.which("env") or "/usr/bin/env", "--block-signal=TERM", "--block-signal=USR2"]
    known = subprocess.run([*guard, "true"], stderr=subprocess.DEVNULL, check=False)
    return guard if known.returncode == 0 else []


if __name__ == "__main__":
    main()
