"""From a run's config to its result: data, model, training, samples and their measures."""

import atexit
import gc
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from flowjobs.data.dataset import FlowDataset, load_datasets
from flowjobs.errors import FlowjobsError, MeasuringInterrupted
from flowjobs.evaluation.evaluate import QUICK, evaluate
from flowjobs.evaluation.pictures import draw_samples
from flowjobs.evaluation.sampling import CHUNK, joined
from flowjobs.evaluation.solver import Solver
from flowjobs.formatting import counted
from flowjobs.models.build import build_model
from flowjobs.models.flops import flops_of_batch, flops_per_sample
from flowjobs.runs.files import read_json, write_json
from flowjobs.runs.recorder import Recorder
from flowjobs.runs.run import Run
from flowjobs.training.compute import computing
from flowjobs.training.determinism import set_cublas_workspace
from flowjobs.training.ranks import Ranks
from flowjobs.training.trained import load_trained
from flowjobs.training.trainer import Trainer

logger = logging.getLogger(__name__)


def run_training(
    run: Run,
    recorder: Recorder | None,
    ranks: Ranks,
    stop_reason: Callable[[], str | None],
    resume_path: Path | None = None,
) -> None:
    """Train a run to its end, then draw and measure samples of its best checkpoint.

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
    if config.deterministic:  # before a model of the user's own computes on the GPU as it is built
        set_cublas_workspace()
    train_dataset, val_dataset = load_datasets(config.dataset, run.study)
    model = build_model(config, train_dataset.shape)
    trainer = Trainer(
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
    flops = flops_of_batch(model, CHUNK, flops_per_sample(model, train_dataset.shape))
    with computing(ranks, flops):
        ema = trainer.state.ema.model
        draw_and_measure(run, ema, (train_dataset, val_dataset), ranks.device, stop_reason)
    picture = run.samples_picture
    logger.info(
        "finished %s: %s in %.1f s, best validation loss %.4f, %s, %s",
        run.name,
        counted(result["epochs_run"], "epoch"),
        result["time_s"],
        result["best_val_loss"],
        result["checkpoint_path"],
        picture if picture.exists() else f"no {picture.name}",
    )


def draw_and_measure(
    run: Run,
    model: nn.Module,
    data: tuple[FlowDataset, FlowDataset],
    device: torch.device,
    stop_reason: Callable[[], str | None],
) -> None:
    """Draw samples of the run's best checkpoint, and measure them.

    The run is trained and saved by now: whatever happens here does not make it fail. One that is
    told to leave, or killed, has not said yet that it is finished, so that its next start trains
    no step and comes here again.

    Args:
        run: Gets a `samples.png`, and an `evaluation.json` if its config says so.
        model: Takes the weights.
        data: The training and the validation part.
        device: Where to compute.
        stop_reason: Asked between measures and network calls.

    Raises:
        MeasuringInterrupted: `stop_reason` asked to leave.
    """

    def check() -> None:
        if reason := stop_reason():
            raise MeasuringInterrupted(reason)

    try:
        _remove_outdated(run)
        trained = load_trained(run, device, model)
        n = min(CHUNK, len(data[1]), trained.source.rows or CHUNK)
        drawn = joined(list(trained.chunks(n, 0, Solver(), check=check))).x_1
        draw_samples(run.samples_picture, trained.config.dataset, drawn, lambda: data[1][:CHUNK])
        if not trained.config.evaluate:
            return
        write_json(run.evaluation_file, evaluate(trained, *data, QUICK, check))
    except MeasuringInterrupted:
        raise
    except FlowjobsError as error:
        logger.warning("the samples were not measured: %s", error)
    except (Exception, SystemExit):
        logger.warning("the samples were not measured", exc_info=True)


def _remove_outdated(run: Run) -> None:
    """Remove what an extended run had of its earlier end: this one may be told to stop first."""
    run.samples_picture.unlink(missing_ok=True)
    try:
        outdated = run.is_outdated(read_json(run.evaluation_file))
    except ValueError:  # damaged
        outdated = True
    except FileNotFoundError:
        return
    if outdated:
        run.evaluation_file.unlink()
