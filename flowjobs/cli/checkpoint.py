"""flowjobs checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from flowjobs.cli.defaults import Defaults
from flowjobs.cli.json_output import print_json
from flowjobs.cli.parser import Flag
from flowjobs.errors import ConfigError


@dataclass(frozen=True)
class Checkpoint:
    """Verify a checkpoint and print what it holds. Runs no code from the file."""

    action: tyro.conf.Positional[Literal["inspect"]]
    """inspect: print step, losses, config and tensors."""

    path: tyro.conf.Positional[Path]
    """A best.pt or last.pt."""

    json: Flag = False
    """Print JSON."""

    def run(self, defaults: Defaults) -> int:
        """Print. Returns the exit code."""
        from flowjobs.training.checkpoint import read_checkpoint

        if self.path.is_dir():
            raise ConfigError(f"{self.path} is a folder: name best.pt or last.pt in it")
        found = describe(self.path, read_checkpoint(self.path))
        if self.json:
            print_json(found)
            return 0
        for key, value in found.items():
            if isinstance(value, dict):
                print(f"{key}:")
                for name, item in value.items():
                    print(f"  {name:32} {item}")
            else:
                print(f"{key:34} {value}")
        return 0


def describe(path: Path, payload: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds, as JSON's types."""
    from torch import Tensor

    weights = payload["model_state_dict"]
    stats = payload["normalization_stats"]
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "format": payload["format"],
        "step": payload["step"],
        "epochs_finished": payload["epoch"] + 1,
        "best_loss": payload["best_loss"],
        "epochs_without_improvement": payload["epochs_without_improvement"],
        "computed_with": payload.get("computed_with", {}),
        "data_width": stats["mean"].numel(),
        "data_shape": list(stats["mean"].shape),
        # Not parameters: buffers are among them, and weights under two names.
        "elements": sum(of.numel() for of in weights.values() if isinstance(of, Tensor)),
        "config": payload["config"],
        "model": {
            name: f"{tuple(of.shape)} {str(of.dtype).removeprefix('torch.')}"
            if isinstance(of, Tensor)
            else type(of).__name__  # of get_extra_state
            for name, of in weights.items()
        },
    }
