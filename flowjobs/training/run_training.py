"""From a run's config to its result: data, model, training, picture."""

import atexit
import gc
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from flowjobs.data.dataset import FlowDataset, load_datasets
from flowjobs.evaluation.pictures import draw_samples
from flowjobs.evaluation.sampling import CHUNK
from flowjobs.models.build import build_model
from flowjobs.runs.recorder import Recorder
from flowjobs.runs.run import Run
from flowjobs.training.ranks import Ranks
from flowjobs.training.trained import load_trained
from flowjobs.training.trainer import FlowTrainer

logger = logging.getLogger(__name__)


def run_training(
    run: Run,
    recorder: Recorder | None,
    ranks: Ranks,
    stop_reason: Callable[[], str | None],
    resume_path: Path | None = None,
) -> None:
    """Train a run to its end and draw samples of its best checkpoint.

    Args:
        run: The run; its config is on disk.
        recorder: Where rows and progress go; None but on the first rank.
        ranks: The processes that train together.
        stop_reason: Asked at each step boundary; a text makes the run save and leave.
        resume_path: Start from this checkpoint instead of last.pt.
    """
    # At its end the interpreter would search all that torch has loaded for garbage, which takes
    # 0.2 s of the time that a preempted job has.
    atexit.register(gc.freeze)
    config = run.config().training
    train_dataset, val_dataset = load_datasets(config.dataset, run.study)
    model = build_model(config, train_dataset.dim)
    trainer = FlowTrainer(
        model,
        config,
        train_dataset,
        val_dataset,
        ranks.device,
        run=run,
        recorder=recorder,
        ranks=ranks,
        stop_reason=stop_reason,
        resume_path=resume_path,
    )
    result = trainer.train()
    if not ranks.is_first:
        return
    try:
        draw_best(run, val_dataset, ranks.device)
    except Exception:
        # A picture is no reason to call a trained run failed.
        logger.warning("no samples were drawn", exc_info=True)
    logger.info(
        "finished %s: %d epochs in %.1f s, best validation loss %.4f, %s, %s",
        run.name,
        result["epochs_run"],
        result["time_s"],
        result["best_val_loss"],
        result["checkpoint_path"],
        run.samples_picture,
    )


def draw_best(run: Run, reference: FlowDataset, device: torch.device) -> None:
    """Draw samples of the run's best checkpoint to its `samples.png`."""
    trained = load_trained(run, device)
    drawn = trained.sample(min(CHUNK, len(reference)))
    dataset = trained.config.dataset
    draw_samples(run.samples_picture, dataset, drawn, lambda: reference[: len(drawn)])
