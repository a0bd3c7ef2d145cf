"""What a run's config in W&B holds beside its own: what an ablation needs to be reproduced."""

from typing import Any

from flowjobs.errors import ConfigError
from flowjobs.runs.code import code_of
from flowjobs.runs.run import Run
from flowjobs.runs.surroundings import surroundings_of

# Of a diff in a run's config; the whole is in the run's folder.
DIFF_LIMIT_BYTES = 20_000


def config_for_wandb(run: Run) -> dict[str, Any]:
    """The run's training config, its attempts, and the surroundings of the newest one."""
    config = run.config().training
    status = run.status()
    return {
        **config.to_dict(),
        **surroundings_of(run),
        **_code(run),
        "signature": config.signature,
        "run_folder": str(run.folder),
        "extensions": status.extensions,
        "attempts": [
            {
                "attempt": attempt.number,
                "cluster": attempt.job.cluster,
                "job_id": attempt.job.job_id,
                "host": attempt.job.host,
            }
            for attempt in status.attempts
        ],
    }


def _code(run: Run) -> dict[str, Any]:
    """What the run keeps of its code: known by that, not by what is checked out at an attempt."""
    try:
        code = code_of(run)
        if code is None:
            return {}
        with run.code_diff_file.open("rb") as file:
            diff = file.read(DIFF_LIMIT_BYTES + 1)
    except (ConfigError, OSError):
        return {}  # the attempt says so itself
    text = diff[:DIFF_LIMIT_BYTES].decode(errors="replace")
    cut = f"\n(cut: see {run.code_diff_file})" if len(diff) > DIFF_LIMIT_BYTES else ""
    return {
        "code": code.digest,
        "code_earlier": list(code.earlier),
        "git_commit": code.git_commit,
        "git_dirty": code.git_dirty,
        "git_diff": text + cut,
    }
