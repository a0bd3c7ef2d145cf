"""One checkpoint file: written whole, sealed with a digest, verified, loaded without running code.

A file is what `torch.save` writes, and `torch.load` reads it anywhere.
"""

import errno
import io
import logging
import os
import pickle
import shutil
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from flowjobs.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFiniteError,
    CheckpointUnloadableError,
    CheckpointWriteError,
)
from flowjobs.runs.files import replaced_whole
from flowjobs.runs.run import Run, absolute, default_study
from flowjobs.training.ema import EMAModel
from flowjobs.training.optimizer import load_by_name, names_of_weights
from flowjobs.training.seal import SealedWriter, verify_seal

logger = logging.getLogger(__name__)

FORMAT = 1

Payload = dict[str, Any]

# What `torch.load(weights_only=True)` takes for certain; of any other type a value is tried.
_PLAIN = frozenset({bool, int, float, str, type(None), Tensor, nn.Parameter})


def get_checkpoint_path(run_name: str) -> str:
    """`study/checkpoints/{run_name}/best.pt`, under $FLOWJOBS_STUDY where that is set."""
    study = default_study()
    if str(study).startswith("~"):  # as a crontab has it: no shell has read it
        study = absolute(study)
    return str(Run(study, run_name).best)


def save_checkpoint(
    path: str | Path,
    epoch: int,
    model: nn.Module,
    ema: EMAModel,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    best_loss: float,
    config: dict[str, Any],
    stats: dict[str, Tensor],
) -> None:
    """Write a checkpoint, making its folder where needed.

    Args:
        path: The file; replaced whole or not at all.
        epoch: Last finished epoch, from 0.
        model: The model.
        ema: Its averaged weights.
        optimizer: Its state.
        scheduler: Its state.
        best_loss: Best validation loss so far.
        config: The training config as a dict; for `--resume` all of it (`TrainingConfig.to_dict`).
        stats: Normalization: `mean` and `std`, each of shape (dim,).

    Raises:
        CheckpointWriteError: The file cannot be written, or does not hold what was written; the
            text says which, why, and how much room it needs.
    """
    payload = checkpoint_payload(
        epoch=epoch,
        step=scheduler.last_epoch,
        model=model,
        ema=ema,
        optimizer=optimizer,
        scheduler=scheduler,
        best_loss=best_loss,
        epochs_without_improvement=0,
        resumed_from="",
        computed_with={},
        extensions=(),
        config=config,
        stats=stats,
    )
    write_checkpoint(Path(path), payload)


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    ema: EMAModel,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    device: torch.device,
) -> tuple[int, float]:
    """Restore the state of a checkpoint into the given objects.

    The optimizer's weights get the order that they had when it was saved.

    Returns:
        The next epoch to train (the one after the last finished) and the best validation loss.

    Raises:
        CheckpointDamagedError: Not the bytes that were written.
        CheckpointMismatchError: It is of another model, or of a newer version of flowjobs.
    """
    payload = read_checkpoint(Path(path), device)
    restore_payload(payload, Path(path), model, ema, optimizer, scheduler)
    return payload["epoch"] + 1, payload["best_loss"]


def checkpoint_payload(
    *,
    epoch: int,
    step: int,
    model: nn.Module,
    ema: EMAModel,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    best_loss: float,
    epochs_without_improvement: int,
    resumed_from: str,
    computed_with: dict[str, Any],
    extensions: Sequence[Mapping[str, Any]],
    config: dict[str, Any],
    stats: dict[str, Tensor],
) -> Payload:
    """What a checkpoint holds. The tensors are the live ones; on a CPU, slices are copied."""
    return {
        "format": FORMAT,
        "epoch": epoch,
        "step": step,
        "model_state_dict": _without_slices(model.state_dict()),
        "ema_shadow": _without_slices(ema.shadow),
        "ema_updates": ema.updates,
        "optimizer_state_dict": optimizer.state_dict(),
        "optimizer_weights": names_of_weights(optimizer, model),
        "scheduler_state_dict": scheduler.state_dict(),
        "best_loss": best_loss,
        "epochs_without_improvement": epochs_without_improvement,
        "resumed_from": resumed_from,
        "computed_with": computed_with,
        "extensions": [dict(extension) for extension in extensions],
        "config": config,
        "normalization_stats": stats,
    }


def _without_slices(weights: dict[str, Any]) -> dict[str, Any]:
    """A state with copies of what is a slice, since torch.save writes all that it is a slice of.

    On a CPU alone: on a GPU all weights of an LSTM are slices of one tensor, and there may be no
    room for them twice.
    """
    for name, of in weights.items():
        on_cpu = isinstance(of, Tensor) and of.layout is torch.strided and of.device.type == "cpu"
        if on_cpu and of.untyped_storage().nbytes() > of.nbytes:
            weights[name] = of.clone()
    return weights


def restore_payload(
    payload: Payload,
    path: Path,
    model: nn.Module,
    ema: EMAModel,
    optimizer: Optimizer,
    scheduler: LRScheduler,
) -> None:
    """Put a payload's state into the given objects; `path` is for the error's text."""
    try:
        model.load_state_dict(payload["model_state_dict"])
        ema.load_shadow(payload["ema_shadow"], payload["ema_updates"])
        state, names = payload["optimizer_state_dict"], payload.get("optimizer_weights")
        load_by_name(optimizer, state, names, model, payload["model_state_dict"])
        scheduler.load_state_dict(payload["scheduler_state_dict"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointMismatchError(
            f"{path} is of another model than the config asks for: {error}; "
            "give the run another --name, or restore the arguments it was started with"
        ) from error


def write_checkpoint(
    path: Path,
    payload: Payload,
    before_replace: Callable[[], None] = lambda: None,
    prove: Callable[[Payload, Path], None] | None = None,
) -> int:
    """Write `payload` to `path` whole or not at all, and verify what reached the disk.

    The file that it replaces is kept as `last.previous.pt` (or `best.previous.pt`).

    Args:
        path: The file to replace.
        payload: What it shall hold.
        before_replace: Called when the new file is good and before any name changes; what it
            raises leaves everything as it is.
        prove: Called before that with what a restart would load from the file; what it raises
            leaves everything as it is.

    Returns:
        The size in bytes.

    Raises:
        CheckpointWriteError: The file cannot be written, or does not hold what was written.
        CheckpointUnloadableError: Some of the payload could not be loaded again.
    """
    # Before the disk is touched: what no restart could load must not replace what one can.
    _check_loadable(payload)
    try:
        return _write(path, payload, before_replace, prove)
    except OSError as error:
        raise CheckpointWriteError(_why_not_written(path, payload, error)) from error
    except CheckpointDamagedError as error:
        raise CheckpointWriteError(f"{error}, so that the file before it is kept") from error


def _write(
    path: Path,
    payload: Payload,
    before_replace: Callable[[], None],
    prove: Callable[[Payload, Path], None] | None,
) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_whole(path) as file:
        sealed = SealedWriter(file)
        try:
            torch.save(payload, cast(IO[bytes], sealed))
        except RuntimeError as error:
            # torch turns the error of a full disk into one of its own that does not name it.
            raise sealed.failed_with or error from error
        size = sealed.seal()
        file.flush()
        # A file server may say only now that its disk is full: the old file has its name yet.
        os.fsync(file.fileno())
        file.seek(0)
        # Before the rename: the good file there is only given up for one that reads back.
        verify_seal(file, path)
        if prove is not None:
            prove(_load(file, path, "cpu"), path)
        # As late as can be: another attempt may have taken the run over while this one wrote.
        before_replace()
        _keep_previous(path)
    return size


def _why_not_written(path: Path, payload: Payload, error: OSError) -> str:
    needed = _size(bytes_of(payload))
    text = f"{path} could not be written: {error.strerror}; it needs {needed}"
    with suppress(OSError):
        text += f", {_size(shutil.disk_usage(path.parent).free)} are free there"
    if error.errno == errno.EDQUOT:
        text += " but not within your quota"
    return f"{text}; a checkpoint that was there before still is"


# What a payload nests. By the very type: a class of the user's may hold more than its items.
CONTAINERS = (dict, OrderedDict, list, tuple)


def bytes_of(payload: Payload, *, on_gpu: bool = False) -> int:
    """How much the tensors of a payload take, or those of them that are on a GPU."""
    tensors = (leaf for _, leaf in _leaves(payload) if isinstance(leaf, Tensor))
    return sum(_bytes_of(of) for of in tensors if of.is_cuda or not on_gpu)


def _bytes_of(tensor: Tensor) -> int:
    if tensor.layout is torch.sparse_coo:
        return tensor._indices().nbytes + tensor._values().nbytes
    return tensor.nbytes


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.2f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:.1f} GB"


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in nested dicts (their keys too), lists and tuples, by where it is."""
    # By the very type: to pickle, a named tuple is a class of the user's like any other.
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            yield from _leaves(key, f"a key of {name}")
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
        if type(value) is OrderedDict:  # as a state_dict's, with the versions of its modules
            yield from _leaves(vars(value), f"an attribute of {name}")
    elif type(value) in (list, tuple):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{name}.{number}")
    else:
        yield name, value


def on_cpu(value: Any) -> Any:
    """A payload with copies of what is on a GPU: a file says where its tensors were, and where that
    GPU is not, plain torch.load refuses it."""
    match value:
        case Tensor():
            return value.detach().cpu() if value.device.type not in ("cpu", "meta") else value
        case dict() | list() | tuple() if type(value) in CONTAINERS:
            return rebuilt(value, lambda item, key: on_cpu(item))
    return value


def rebuilt(value: Any, change: Callable[[Any, Any], Any]) -> Any:
    """A dict, list or tuple of a payload with other items.

    Args:
        value: One of a type in `CONTAINERS`.
        change: From an item and its key, which is None in a list or tuple.
    """
    if not isinstance(value, dict):
        return type(value)(change(item, None) for item in value)
    copied = type(value)((key, change(item, key)) for key, item in value.items())
    if isinstance(value, OrderedDict):
        vars(copied).update(vars(value))  # of a state_dict: its modules' versions
    return copied


def _check_loadable(payload: Payload) -> None:
    """Raise unless everything in a payload can be loaded again without running code.

    A module may put anything into its state (`get_extra_state`), and at any time.
    """
    for name, leaf in _leaves(payload):
        if type(leaf) in _PLAIN:
            continue
        try:
            content = io.BytesIO()
            torch.save(leaf, content)
            content.seek(0)
            torch.load(content, weights_only=True)
        except Exception as error:
            kind = f"{type(leaf).__module__}.{type(leaf).__qualname__}"
            raise CheckpointUnloadableError(
                f"a run of this model could not be resumed: its state holds a {kind} ({name}), "
                "and a checkpoint is loaded without running code from it: let get_extra_state "
                "return tensors, numbers, strings, lists and dicts of Python's own types"
            ) from error


def sweep_unfinished(path: Path) -> None:
    """Remove what killed writers of `path` left beside it. The caller must be its one writer."""
    for unfinished in (f".{path.name}.*.tmp", f".{path.name}.*.link"):
        for file in path.parent.glob(unfinished):
            with suppress(OSError):
                file.unlink()


def previous_of(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def read_newest_good(
    path: Path, check: Callable[[Payload, Path], None] = lambda payload, path: None
) -> Payload | None:
    """Read the checkpoint at `path`, or the one before it if that one cannot be used.

    A file that is not used is set aside under a name that says why, with a warning.

    Args:
        path: last.pt or best.pt.
        check: Raises a CheckpointMismatchError if the run cannot resume from a payload.

    Returns:
        The payload; None if there is no file, or all are damaged.

    Raises:
        CheckpointMismatchError: There are sound files, but of another model or a newer version of
            flowjobs, and none that the run can resume from. They stay where they are: the user
            must say what shall become of them.
        CheckpointError: A file that is there cannot be read (permissions, a failing disk): to
            train without it would throw work away that may still be sound.
    """
    refused: list[tuple[Path, CheckpointMismatchError]] = []
    payload = None
    for candidate in (path, previous_of(path)):
        # A link counts as a file even if its target is away, as scratch may be: that is said, and
        # not taken for "never saved".
        if payload is not None or not os.path.lexists(candidate):
            continue
        try:
            found = read_checkpoint(candidate)
            check(found, candidate)
            payload = found
        except CheckpointDamagedError as error:
            logger.warning("%s; set aside as %s", error, _set_aside(candidate, "damaged").name)
        except CheckpointNotFiniteError as error:
            logger.warning("%s; set aside as %s", error, _set_aside(candidate, "nonfinite").name)
        except CheckpointMismatchError as error:
            refused.append((candidate, error))
    if payload is None and refused:
        raise refused[0][1]
    # Only now: where no file serves, all stay in place until their user decides.
    for file, reason in refused:
        logger.warning("%s; set aside as %s", reason, _set_aside(file, "mismatched").name)
    return payload


def _keep_previous(path: Path) -> None:
    previous = previous_of(path)
    if not path.is_file() or (previous.is_file() and previous.samefile(path)):
        return  # the latter where a save was killed between its two renames
    link = path.with_name(f".{path.name}.{os.getpid()}.link")
    link.unlink(missing_ok=True)
    try:
        # A second name for the same file, so that there is a good one at `path` at all times.
        os.link(path, link)
    except OSError:
        # No hard links on this file system; until the new file is in place a start finds the
        # previous one under its own name.
        os.replace(path, previous)
        return
    # os.link refuses a name that is taken; a rename replaces it in one step.
    os.replace(link, previous)


def _set_aside(path: Path, why: str) -> Path:
    # Renamed and not removed: its user may still get something out of it.
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
    aside = path.with_name(f"{path.stem}.{why}-{stamp}{path.suffix}")
    path.rename(aside)
    return aside


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> Payload:
    """Read and verify a checkpoint. Runs no code from the file.

    Raises:
        CheckpointDamagedError: Not the bytes that were written, or no file but a folder or a loop
            of links.
        CheckpointMismatchError: Written by a newer version of flowjobs, or with more in it than
            tensors and plain values.
        CheckpointError: There is no file, or it cannot be read.
    """
    try:
        # Before it is opened: a named pipe would wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointDamagedError(f"{path} is not a file, as a checkpoint is")
        with path.open("rb") as file:
            verify_seal(file, path)
            payload = _load(file, path, device)
    except OSError as error:
        # A loop of links stays one; any other error may pass, and the file behind it be sound.
        kind = CheckpointDamagedError if error.errno == errno.ELOOP else CheckpointError
        raise kind(f"{path} cannot be read: {error.strerror}") from error
    found = payload.get("format") if isinstance(payload, dict) else None
    if not isinstance(found, int):
        raise CheckpointMismatchError(f"{path} is not a checkpoint of a run")
    # What a newer version keeps beside would be lost at the next save.
    if found > FORMAT:
        raise CheckpointMismatchError(
            f"{path} has format {found}, this flowjobs reads up to {FORMAT}: update flowjobs"
        )
    return payload


def _load(file: BinaryIO, path: Path, device: torch.device | str) -> Payload:
    file.seek(0)
    try:
        payload: Payload = torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        # Its digest is right: these are the bytes that were written.
        raise CheckpointUnloadableError(
            f"{path} holds more than tensors and plain values; it is not loaded, since that would "
            "run code from the file"
        ) from error
    return payload
