"""From a run's best.pt to a model that can be sampled. Writes nothing."""

import hashlib
import textwrap
from weakref import WeakKeyDictionary

import torch
from torch import nn

from flowjobs.data.randomness import random_numbers_kept
from flowjobs.data.source import sources_of
from flowjobs.errors import CheckpointGoneError, CheckpointMismatchError, ConfigError
from flowjobs.evaluation.sampling import CHUNK
from flowjobs.evaluation.trained import TrainedModel
from flowjobs.models.build import COMPILED, build_model, uncompiled
from flowjobs.models.flops import flops_of_batch, flops_per_sample
from flowjobs.runs.code import importing_from_snapshot
from flowjobs.runs.run import Run
from flowjobs.training.checkpoint import read_checkpoint
from flowjobs.training.compute import threads_for
from flowjobs.training.ranks import single_process

# The run whose weights a model has in this process, by their digest: it may get others.
_weights_of: WeakKeyDictionary[nn.Module, tuple[str, Run]] = WeakKeyDictionary()


def note_weights(model: nn.Module, run: Run) -> None:
    """Note that a model has the weights of a run."""
    _weights_of[model] = _digest(model), run


def run_of_weights(model: nn.Module) -> Run | None:
    """The run whose weights a model of one's own has; None where it has others."""
    digest, run = _weights_of.get(model, ("", None))
    return run if run is not None and digest == _digest(model) else None


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for of in model.parameters():
        digest.update(
            of.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def load_trained(
    run: Run, device: torch.device | str = "auto", model: nn.Module | None = None
) -> TrainedModel:
    """The model of a run's best.pt, with its averaged weights.

    Args:
        run: The run; it may still train.
        device: Where to put it; "auto" is the GPU where there is one.
        model: Takes the weights, and is set to evaluation mode; by default one of the run's
            `--arch`, built from its own code.

    Raises:
        RunNotFoundError: There is no such run.
        CheckpointError: It has no best.pt, or not one of this model.
        ConfigError: There is no such model or device, or the run's code is gone or was changed.
        DataError: The data that its paths start from are gone.
    """
    config = run.config().training
    if not run.best.exists():
        why = (
            "the run is finished, so that it was moved or deleted; restore it"
            if run.status().state == "finished"
            else "it is written after the first epoch, with the next save; the run has trained "
            f"{run.steps_trained()} steps"
        )
        raise CheckpointGoneError(f"{run.name} has no {run.best}: {why}")
    device = usable_device(device)
    best = read_checkpoint(run.best)
    stats = best["normalization_stats"]
    given = model is not None
    if model is None:
        # This process may have imported other code: another run's, or newer than the run.
        with importing_from_snapshot(run), random_numbers_kept():
            model = build_model(config, tuple(stats["mean"].shape))
    weights = best["ema_shadow"]
    nn.modules.utils.consume_prefix_in_state_dict_if_present(weights, COMPILED)
    try:
        uncompiled(model).load_state_dict(weights)
    except RuntimeError as error:
        missing = textwrap.shorten(str(error).partition("\n")[2], 120, placeholder=" …")
        if not given and run.status().was_begun_in_python:
            raise CheckpointMismatchError(
                f"{run.name} was trained from Python, with a model that its config does not name: "
                f"load it there, with one of that class: flowjobs.load({run.name!r}, model=…)"
            ) from error
        kind = type(model).__name__
        raise CheckpointMismatchError(
            f"{run.best} is of another model than the {kind} that was given ({missing}): build it "
            "with the code and the arguments that it was trained with"
            if given
            else f"{run.best} is of another model than {kind} is now ({missing}): restore the code "
            "that it was trained with, or give flowjobs.load the model: model=…"
        ) from error
    model.to(device)
    if not given:  # one that is may be trained further
        model.requires_grad_(False)
    model.eval()  # a `train` of the model's own may return nothing
    source = sources_of(config, run.study, stats["mean"], stats["std"]).held_out
    flops = flops_of_batch(model, CHUNK, flops_per_sample(model, stats["mean"].shape))
    threads = threads_for(single_process(device), flops)
    ranks = best.get("computed_with", {}).get("ranks", 1)
    step = best["step"]
    return TrainedModel(run.name, model, stats, config, step, device, source, threads, ranks)


def usable_device(asked: torch.device | str) -> torch.device:
    """The device that is asked for; "auto" is the GPU where there is one.

    Raises:
        ConfigError: It cannot be used here.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--device: found {asked!r}, which cannot be used here ({reason}); expected auto, cpu "
            "or a GPU that there is (cuda, cuda:1)"
        ) from error
    return device
