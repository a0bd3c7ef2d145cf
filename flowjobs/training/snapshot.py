"""Copies of a state, which the next step may change while they are written.

A GPU copies it between two steps, if it has the room, and from there to the CPU beside them. Only
the last best state before a save is written, so most copies never leave the GPU.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowjobs.training.checkpoint import CONTAINERS, Payload, bytes_of, rebuilt

CPU = torch.device("cpu")
# Share of a GPU's memory that a copy may take; there are two or three copies.
GPU_SHARE = 0.02


@dataclass(frozen=True)
class Snapshot:
    """A deep copy of a payload.

    Attributes:
        payload: The copy. Tensors on a GPU are copied there where they take little of it, between
            two steps, and to the CPU beside them; others to the CPU at once.
        on_gpu: Whether tensors on a GPU were copied there.
        parts: The dicts and lists that it is a copy of.
        copy: Copies the tensors.
    """

    payload: Payload
    on_gpu: bool
    parts: "dict[int, _Part]"
    copy: Callable[[], object]

    @classmethod
    def of(
        cls, payload: Payload, reuse: "Snapshot | None" = None, *, held: bool = False
    ) -> "Snapshot":
        """A copy of a payload.

        Args:
            payload: Nested dicts and lists of tensors and plain values.
            reuse: An older copy whose memory may be written over; new memory takes twice as long.
            held: Whether a dict or list that is the very one of that copy holds the same as then,
                so that it need not be looked through again.
        """
        on_gpu = reuse.on_gpu if reuse else _fits_on_gpu(payload)
        copying = _Copying(on_gpu, reuse.parts if reuse and held else {})
        copied = copying.copy_of(payload, reuse and reuse.payload)
        copy: Callable[[], object]
        if reuse and not copying.looked_at_tensors:
            copy = reuse.copy if isinstance(reuse.copy, _OnGpu) else copying.copier()
        else:
            copy = copying.copy
        copy()
        return cls(copied, on_gpu, copying.parts, copy)


@dataclass(frozen=True)
class _Part:
    source: dict[Any, Any] | list[Any]
    copied: Any
    targets: list[Tensor]
    sources: list[Tensor]


class _OnGpu:
    """Copies the same tensors again, by one launch."""

    def __init__(self, copy: Callable[[], object]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            copy()

    def __call__(self) -> None:
        self._graph.replay()


class _Copying:
    """Makes the memory for a copy: `targets`, of `sources`."""

    def __init__(self, on_gpu: bool, parts: dict[int, _Part]) -> None:
        self._on_gpu = on_gpu
        self._parts_before = parts
        self.parts: dict[int, _Part] = {}
        self.targets: list[Tensor] = []
        self.sources: list[Tensor] = []
        self.looked_at_tensors = False

    def copy(self) -> None:
        """Copy the tensors."""
        alike: dict[object, tuple[list[Tensor], list[Tensor]]] = {}
        for target, source in zip(self.targets, self.sources, strict=True):
            # One kernel copies many, but of one type and device.
            targets, sources = alike.setdefault((source.device, source.dtype), ([], []))
            targets.append(target)
            sources.append(source)
        for targets, sources in alike.values():
            torch._foreach_copy_(targets, sources)

    def copier(self) -> Callable[[], object]:
        """What copies these tensors again and again."""
        return _OnGpu(self.copy) if self._on_gpu else self.copy

    def copy_of(self, value: Any, old: Any) -> Any:
        """The copy of a part of a payload, in the memory of an old one where that fits."""
        match value:
            case None | bool() | int() | float() | str():
                return value
            case Tensor(layout=layout) if layout is not torch.strided:
                self.looked_at_tensors = True
                return value.detach().to("cpu", copy=True)  # sparse: it may be of another size
            case Tensor():
                device = value.device if self._on_gpu else CPU
                alike = isinstance(old, Tensor) and (
                    (old.shape, old.dtype, old.layout, old.device)
                    == (value.shape, value.dtype, value.layout, device)
                )
                target = old if alike else torch.empty_like(value, device=device)
                self.targets.append(target)
                self.sources.append(value.detach())
                self.looked_at_tensors = True
                return target
            case dict() | list() | tuple() if type(value) in CONTAINERS:
                return self._copy_of_part(value, old)
        return copy.deepcopy(value)  # a module's extra state, which its next step may change

    def _copy_of_part(self, value: Any, old: Any) -> Any:
        part = self._parts_before.get(id(value))
        if part and part.source is value:
            self.targets += part.targets
            self.sources += part.sources
        else:
            first = len(self.targets)
            before = old if isinstance(old, dict) else {}
            copied = rebuilt(value, lambda item, key: self.copy_of(item, before.get(key)))
            part = _Part(value, copied, self.targets[first:], self.sources[first:])
        self.parts[id(value)] = part
        return part.copied


def _fits_on_gpu(payload: Payload) -> bool:
    """Whether two copies of what is on a GPU take little of it."""
    size = bytes_of(payload, on_gpu=True)
    return 0 < size <= GPU_SHARE * torch.cuda.get_device_properties().total_memory
