"""The exponential moving average of a model's weights."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from flowjobs.errors import ConfigError
from flowjobs.models.checks import leaves_of

_Place = tuple[dict[str, Tensor | None], str]

# Parameters of other types (integers, complex ones) are not trained, and copied as buffers are.
AVERAGED = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


# torch.optim.swa_utils.AveragedModel was tried: it takes 513 to 577 µs an update where this takes
# 197 to 229, and its first update copies the weights instead of averaging them.
class EMAModel:
    """Keeps a second copy of a model whose weights average the first one's over the steps.

    The decay of step s is min(decay, (1 + s) / (10 + s)), so that a short run's average forgets
    its initial weights (the warm-up of TensorFlow's ExponentialMovingAverage).

    Args:
        model: The model that is trained; it is copied.
        decay: The largest decay, in [0, 1).

    Attributes:
        model: The copy with the averaged weights, in evaluation mode, without gradients.
        updates: Steps averaged so far.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        # Each as a statement: `train`, which `eval` returns, may be the model's own, that returns
        # nothing.
        self.model = _copy(model)
        self.model.requires_grad_(False)
        self.model.eval()
        self.decay = decay
        self.updates = 0
        self._is_averaged = [_can_be_averaged(weights) for weights in model.parameters()]
        self._averaged, self._unaveraged = self._parameters(self.model)
        self._copied = _buffer_places(self.model)
        self._bind(model)

    @property
    def shadow(self) -> dict[str, Tensor]:
        """The averaged weights and the copied buffers by name, as in `nn.Module.state_dict`."""
        return self.model.state_dict()

    def statistics(self) -> Iterator[Tensor]:
        """The buffers of real numbers that a checkpoint holds, as a BatchNorm's are."""
        saved = self.shadow
        for name, buffer in self.model.named_buffers():
            if name in saved and buffer.is_floating_point() and buffer.layout is torch.strided:
                yield buffer

    def update(self, model: nn.Module) -> None:
        """Average in the weights of `model` after one optimizer step; buffers are copied."""
        self.average(model, self.share_of(self.updates))
        self.updates += 1

    @property
    def copies_buffers(self) -> bool:
        """Whether the model has buffers, which are copied."""
        return bool(self._copied)

    def share_of(self, updates: int) -> float:
        """The share of a step's weights in the average after so many others: 1 - decay."""
        return 1 - min(self.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def average(self, model: nn.Module, share: float | Tensor) -> None:
        """What `update` does, but count.

        Args:
            model: Whose weights are averaged in.
            share: Theirs; as a tensor of shape () on a GPU, from where a CUDA graph reads it anew.
        """
        if model is not self._bound_to:
            self._bind(model)
        # One fused kernel over all weights; a loop over them takes several times longer.
        if not isinstance(share, Tensor):
            torch._foreach_lerp_(self._averaged, self._weights, share)
        else:
            # Lerp takes no share that is a tensor. The same is a step of SGD at that rate, whose
            # gradient, "weight decay" less weights, is the distance.
            for averaged, weights in self._alike:
                torch._fused_sgd_(
                    averaged,
                    weights,
                    [],
                    weight_decay=1.0,
                    momentum=0.0,
                    lr=share,
                    dampening=0.0,
                    nesterov=False,
                    maximize=True,
                    is_first_step=False,
                )
            for averaged_one, weights_one in self._others:
                averaged_one.add_((weights_one - averaged_one) * share)
        if self._copied:
            self.copy_buffers()
        if self._unaveraged:
            torch._foreach_copy_(self._unaveraged, self._unaveraged_weights)

    def _bind(self, model: nn.Module) -> None:
        # Walking the modules at each step would take a twentieth of a small model's step.
        self._bound_to = model
        self._weights, self._unaveraged_weights = self._parameters(model)
        alike: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        self._others: list[tuple[Tensor, Tensor]] = []
        for averaged, weights in zip(self._averaged, self._weights, strict=True):
            if _lie_alike(averaged, weights):
                of_a_type = alike.setdefault(averaged.dtype, ([], []))
                of_a_type[0].append(averaged)
                of_a_type[1].append(weights)
            else:
                self._others.append((averaged, weights))
        self._alike = [*alike.values()]
        # Their places, since a model may put a new tensor there (`self.mean = 0.9 * self.mean`).
        self._buffers = _buffer_places(model)
        pairs = zip(model.modules(), self.model.modules(), strict=True)
        self._extra = [(module, copied) for module, copied in pairs if _keeps_more(module)]

    def _parameters(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Those that are averaged, and the others."""
        averaged: list[Tensor] = []
        others: list[Tensor] = []
        for weights, is_averaged in zip(model.parameters(), self._is_averaged, strict=True):
            (averaged if is_averaged else others).append(weights)
        return averaged, others

    def check_copy(self, model: nn.Module, x: Tensor, t: Tensor) -> None:
        """Raise a ConfigError where a copy of the model computes with the model itself.

        Copying does not reach what a function holds: validation, best.pt and samples would be of
        the weights of the last step, and of a model in training mode.

        Args:
            model: The model that this is the average of.
            x: What to call a copy on, of shape (batch, dim), in the type of the weights.
            t: Its times, of shape (batch,).
        """
        refusal = ConfigError(
            f"--arch {type(model).__name__}: a copy of the model computes with the model itself, "
            "so that the moving average of its weights, which validation and samples are of, "
            "would not be used: it holds a function over itself (a lambda, a hook, a compiled "
            "method) or a weak reference, which the copy has as well; make it a method, let a "
            "hook use the module that it is called with, instead of torch.compile give --compile"
        )

        def called(part: nn.Module, args: object) -> None:
            raise refusal

        trial = _copy(self.model)
        # One that copies itself as itself is meant to be shared.
        apart = {*model.modules()} - {*trial.modules()}
        hooks = [part.register_forward_pre_hook(called) for part in apart]
        try:
            with torch.enable_grad():
                velocity: object = trial(x, t)
        except Exception as error:
            if error is not refusal:
                error.add_note(
                    "This was a copy of the model in evaluation mode, as the moving average is. A "
                    "function that the model holds over itself (a lambda, a hook) acts on the "
                    "model, not on the copy that holds it as well."
                )
            raise
        finally:
            for hook in hooks:
                hook.remove()
        trained = {id(weights) for weights in model.parameters()}
        # The copy's weights require no gradient.
        if isinstance(velocity, Tensor) and any(id(of) in trained for of in leaves_of(velocity)):
            raise refusal

    def take_extra_state(self) -> None:
        """Give the copy what modules keep beside tensors, as it is now (`get_extra_state`).

        Not a part of `update`: to say it may take a module longer than a step does.
        """
        for module, copied in self._extra:
            copied.set_extra_state(copy.deepcopy(module.get_extra_state()))

    def copy_buffers(self) -> None:
        """Give the copy the buffers that the model has now."""
        copies, buffers = [], []
        for (there, name), (here, _) in zip(self._copied, self._buffers, strict=True):
            copied, buffer = there.get(name), here.get(name)
            if buffer is None:  # forward may put None there, and a tensor again
                there[name] = None
            elif copied is None or not _can_be_written(copied, buffer):
                there[name] = buffer.clone()
            else:
                copies.append(copied)
                buffers.append(buffer)
        if copies:
            torch._foreach_copy_(copies, buffers)

    def load_shadow(self, shadow: dict[str, Tensor], updates: int) -> None:
        """Restore what `shadow` and `updates` were."""
        self.model.load_state_dict(shadow)
        self.updates = updates


def _copy(model: nn.Module) -> nn.Module:
    # torch's own copy knows no compressed sparse tensors.
    copied = {id(of): of.clone() for of in model.buffers() if of.layout is not torch.strided}
    try:
        return copy.deepcopy(model, copied)
    except Exception as error:
        # Whatever a module of the user's own may hold: a lock, an open file, a tensor of a graph.
        raise ConfigError(
            f"--arch {type(model).__name__}: the model cannot be copied (copy.deepcopy), as the "
            f"moving average of its weights needs: {type(error).__name__}: {error}"
        ) from error


def _can_be_averaged(weights: Tensor) -> bool:
    """Not what is not trained and holds infinities (a mask): their difference is NaN."""
    if weights.dtype not in AVERAGED:
        return False
    return weights.requires_grad or bool(weights.isfinite().all())


def _lie_alike(averaged: Tensor, weights: Tensor) -> bool:
    """Whether a kernel may go by memory: a frozen slice of a larger tensor has other values between
    its own."""
    dense = torch.empty_like(weights, device="meta").stride()
    return averaged.stride() == weights.stride() == dense


def _buffer_places(model: nn.Module) -> list[_Place]:
    return [(module._buffers, name) for module in model.modules() for name in module._buffers]


def _can_be_written(copied: Tensor, buffer: Tensor) -> bool:
    """Whether a buffer's values surely fit the memory of its copy.

    Not where it is kept of a batch, as both models see others, is sparse, or was built as another
    type (torch.tensor(1), where forward puts a float).
    """
    alike = (copied.shape, copied.dtype) == (buffer.shape, buffer.dtype)
    return alike and buffer.layout is copied.layout is torch.strided


def _keeps_more(module: nn.Module) -> bool:
    """Whether a module gives and takes a state beside its tensors."""
    kind = type(module)
    return (
        kind.get_extra_state is not nn.Module.get_extra_state
        and kind.set_extra_state is not nn.Module.set_extra_state
    )
