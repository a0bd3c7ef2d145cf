"""The torch side of a run. Calls neither Slurm nor W&B.

Why to leave, where rows go and what the job was given, it is told (`stop_reason`, `Recorder`,
`flowjobs.slots`). `FlowTrainer`, which has W&B's options, is a notebook's (`flowjobs.notebook`).

the way        run_training, trainer, rows (logged), validation, trained (a model to sample)
a step         inputs, pinned and reflow (of other runs), optimizer, schedule, ema
on a GPU       cuda_graph, watched (what a graph would leave out)
on disk        state, saving (when), snapshot, checkpoint, seal (digest)
the same bits  compute, ranks, determinism, same_bits

The public names are imported when first used, so that `import flowjobs.training` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowjobs.config import TrainingConfig
    from flowjobs.data.dataset import FlowDataset
    from flowjobs.notebook import FlowTrainer
    from flowjobs.training.checkpoint import get_checkpoint_path, load_checkpoint, save_checkpoint
    from flowjobs.training.ema import EMAModel
    from flowjobs.training.schedule import get_cosine_schedule_with_warmup

__all__ = [
    "EMAModel",
    "FlowDataset",
    "FlowTrainer",
    "TrainingConfig",
    "get_checkpoint_path",
    "get_cosine_schedule_with_warmup",
    "load_checkpoint",
    "save_checkpoint",
]

_MODULES = {
    "EMAModel": "flowjobs.training.ema",
    "FlowDataset": "flowjobs.data.dataset",
    "FlowTrainer": "flowjobs.notebook",
    "TrainingConfig": "flowjobs.config",
    "get_checkpoint_path": "flowjobs.training.checkpoint",
    "get_cosine_schedule_with_warmup": "flowjobs.training.schedule",
    "load_checkpoint": "flowjobs.training.checkpoint",
    "save_checkpoint": "flowjobs.training.checkpoint",
}


if not TYPE_CHECKING:  # to a type checker each name is its own, and any other an error

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)
