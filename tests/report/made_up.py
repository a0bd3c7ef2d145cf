"""Runs as a training leaves them on disk, made in a millisecond."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowjobs.config import RunConfig, TrainingConfig
from flowjobs.runs.run import Run
from flowjobs.runs.status import AttemptRecord, JobInfo, RunStatus, State

STEPS_AN_EPOCH = 10


def made_run(
    study: Path,
    losses: Sequence[float] = (),
    state: State = "finished",
    measures: Mapping[str, float] | None = None,
    *,
    name: str = "",
    epochs: int = 3,
    **training: Any,
) -> Run:
    """A run with a validation loss an epoch; without any, one that waits."""
    config = TrainingConfig(epochs=epochs, **training)
    run = Run(study, name or f"{config.run_name}-lr{config.lr}-seed{config.seed}")
    run.create(RunConfig(config))
    if not losses:
        return run
    best = [min(losses[: index + 1]) for index in range(len(losses))]
    rows = [
        {"step": (i + 1) * STEPS_AN_EPOCH, "epoch": i + 1, "val/loss": loss, "val/best_loss": low}
        for i, (loss, low) in enumerate(zip(losses, best, strict=True))
    ]
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status = RunStatus(
        state,
        step=rows[-1]["step"],
        total_steps=epochs * STEPS_AN_EPOCH,
        epoch=len(losses),
        epochs=epochs,
        patience=config.patience,
        best_val_loss=best[-1],
        reason="out of memory: 1.5 of 1.5 GiB" if state == "failed" else "",
    )
    job = JobInfo("slurm", "7", None, "n1", 1)
    ended = None if state == "running" else "2025-01-01T01:00:00+00:00"
    record = AttemptRecord(1, job, "2025-01-01T00:00:00+00:00", 0, status.step, ended, state)
    status.attempts.append(record)
    status.write(run.status_file, flush=False)
    if measures:
        run.evaluation_file.write_text(json.dumps(evaluation(measures)))
    return run


def evaluation(measures: Mapping[str, float], n: int = 256) -> dict[str, Any]:
    """What `flowjobs evaluate` writes, as far as a report reads it."""
    return {
        "n": n,
        "repeats": 2,
        "solver": "midpoint, 25 steps",
        "measures": {
            name: {
                "value": value,
                "std": 0.01,
                "floor": 0.05,
                "lower_is_better": {"coverage": False, "nn_train": None}.get(name, True),
                "best": {"c2st": 0.5}.get(name),
                "note": "n is small" if name == "frechet" else None,
            }
            for name, value in measures.items()
        },
        "by_nfe": {"8": {name: value * 2 for name, value in measures.items()}},
    }
