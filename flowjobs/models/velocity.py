"""How a model is called: in the type of its weights, and checked for what it returns."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from flowjobs.config import TrainingConfig
from flowjobs.errors import ConfigError

Velocity = Callable[[Tensor, Tensor], Tensor]

# Outside of training a model is called on no more numbers, or no more rows than in a step: the GPU
# was chosen for those. Of small rows more come at once, since each call has its price.
NUMBERS_AT_ONCE = 2**18
# What gloo and NCCL pass on, both.
BETWEEN_RANKS = frozenset(
    {
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
        *(torch.complex128, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool),
    }
)


def input_dtype(model: nn.Module) -> torch.dtype:
    """What a model is given x and t in: float64 where all its weights are, else float32.

    A table of integers or complex numbers, which `model.double()` leaves as it is, is none of them.
    """
    dtypes = {of.dtype for of in model.parameters() if of.is_floating_point()}
    return torch.float64 if dtypes == {torch.float64} else torch.float32


def checked_velocity(model: Velocity, dtype: torch.dtype, name: str) -> Velocity:
    """A model that takes float32, returns float32, and raises where it returns no velocity.

    Args:
        model: The model, or what stands for it (compiled, joined to other ranks).
        dtype: What it is given x and t in.
        name: Its name in the error's text.

    Returns:
        The velocity at x of shape (batch, dim) and t of shape (batch,). It raises a ConfigError
        for another shape, which the loss would broadcast and nobody notice until all is trained.
        That is found at the first step and not before: a trial call would change a model that
        initializes itself from the first batch, and counters in its buffers.
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        found: object = model(x.to(dtype), t.to(dtype))
        if not isinstance(found, Tensor):
            raise ConfigError(_unexpected(name, x, t, f"a {type(found).__name__}"))
        if found.shape != x.shape:
            raise ConfigError(_unexpected(name, x, t, str(tuple(found.shape))))
        if not found.is_floating_point():
            raise ConfigError(_unexpected(name, x, t, f"numbers of type {_word(found.dtype)}"))
        return found.float()

    return velocity


def rows_at_once(config: TrainingConfig, ranks: int, numbers: int) -> int:
    """How many rows a model is called on outside of training, at most.

    Args:
        config: Gives the size of a batch.
        ranks: Processes that share it.
        numbers: Of a row.
    """
    return max(config.batch_size // ranks, NUMBERS_AT_ONCE // numbers, 1)


def check_types_of_ranks(model: nn.Module) -> None:
    """Raise a ConfigError for weights and buffers that ranks cannot pass to one another."""
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        dense = tensor.layout is torch.strided
        if not dense or tensor.dtype not in BETWEEN_RANKS:
            raise ConfigError(
                f"--arch {type(model).__name__}: {key} is of type "
                f"{_word(tensor.dtype if dense else tensor.layout)}, which several ranks cannot "
                "pass to one another: keep it in a type that they can (float32, int64), with "
                "register_buffer(…) of the dense values, or train on one GPU"
            )


def check_weights(model: nn.Module) -> None:
    """Raise a ConfigError for weights that would not be trained right."""
    name = type(model).__name__
    _check_parts(model)
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ConfigError(
                f"--arch {name}: {key} has no shape before the first call (a Lazy module); give "
                "the module its width, or call the model once in its constructor"
            )
        # AdamW's fused kernel would write past the end of such memory.
        strides = tensor.stride() if tensor.layout is torch.strided else [1] * tensor.dim()
        sizes = zip(tensor.shape, strides, strict=True)
        if any(size > 1 and step == 0 for size, step in sizes):
            raise ConfigError(
                f"--arch {name}: several values of {key} share their memory (expand), so that "
                "they cannot be set; make it of its own memory (clone)"
            )
    for key, weights in model.named_parameters():
        if weights.layout is not torch.strided:
            raise ConfigError(
                f"--arch {name}: the parameter {key} is sparse ({_word(weights.layout)}), which "
                "neither AdamW nor the average takes: make it a buffer, or its values a parameter"
            )
    trained = [(key, weights) for key, weights in model.named_parameters() if weights.requires_grad]
    if not trained:
        raise ConfigError(f"--arch {name}: found no parameter that requires a gradient")
    for key, weights in trained:
        if weights.is_complex():
            raise ConfigError(
                f"--arch {name}: the parameter {key} is of type {_word(weights.dtype)}, expected "
                "float32 or float64; keep its real and imaginary parts as one real parameter, and "
                "call torch.view_as_complex on it in forward"
            )
        if weights.dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"--arch {name}: the parameter {key} is of type {_word(weights.dtype)}, in which "
                "small updates are lost in rounding, expected float32 or float64; --precision "
                "bf16 computes in bfloat16 with weights in float32"
            )
        # AdamW's fused kernel takes value by value as they lie in memory, and its moments are
        # dense: on a CPU it would train other values, and write between them. Transposed ones are
        # dense as well: what torch makes like them has their strides.
        if torch.empty_like(weights, device="meta").stride() != weights.stride():
            raise ConfigError(
                f"--arch {name}: the parameter {key} is a slice of a larger tensor, with memory "
                "between its values that is not its own, which AdamW cannot train; give it memory "
                "of its own: nn.Parameter(values.clone(memory_format=torch.contiguous_format))"
            )


def _check_parts(model: nn.Module) -> None:
    name = type(model).__name__
    for key, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ConfigError(
                f"--arch {name}: {key or 'the model'} is in TorchScript, which the moving average "
                "cannot follow: build it in Python; one that is not to be trained can be kept in a "
                "list (self.encoder = [torch.jit.load(…)]), with requires_grad_(False) on its "
                "parameters, and on a GPU with map_location"
            )
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse:
            raise ConfigError(
                f"--arch {name}: {key} has sparse gradients, which AdamW does not take: build "
                "it without sparse=True"
            )


def check_new_model(model: nn.Module) -> None:
    """Raise a ConfigError for what a new run should not begin with.

    One that is under way resumes with it: its code cannot be changed any more.
    """
    name = type(model).__name__
    for key, part in model.named_modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.max_norm is not None:
            raise ConfigError(
                f"--arch {name}: {key} rescales its rows wherever it is called, also those of "
                "the moving average: build it without max_norm, and in forward scale the rows "
                "that it returns (torch.renorm)"
            )
        for key_there, tensor in {**vars(part), **part._buffers}.items():
            is_weight = isinstance(tensor, Tensor) and tensor.is_leaf and tensor.requires_grad
            # Of one number it is what reentrant checkpointing needs.
            if is_weight and not isinstance(tensor, nn.Parameter) and tensor.numel() > 1:
                raise ConfigError(
                    f"--arch {name}: {key}{'.' * bool(key)}{key_there} requires a gradient and is "
                    "no nn.Parameter, so that it would never be trained: make it one, or call "
                    "requires_grad_(False) on it"
                )


def frozen_in_evaluation(model: nn.Module) -> list[nn.Module]:
    """The parts that a constructor has put into evaluation mode for good; none of a whole model.

    Those with weights to train are not meant: libraries give what is pretrained in that mode.
    """
    parts = [part for part in (model.modules() if model.training else ()) if not part.training]
    trained = {
        inner
        for part in parts
        if any(weights.requires_grad for weights in part.parameters())
        for inner in part.modules()
    }
    return [part for part in parts if part not in trained]


def check_parameters(trained: Mapping[str, nn.Parameter], model: nn.Module) -> None:
    """Raise a ConfigError if forward has put another parameter in the place of one.

    Args:
        trained: The parameters that the optimizer was given, by all their names.
        model: The model now.
    """
    for key, weights in model.named_parameters(remove_duplicate=False):
        # One that came anew is found when the state is saved, as a restart builds none.
        if trained.get(key, weights) is not weights:
            raise ConfigError(
                f"--arch {type(model).__name__}: forward puts another parameter in the place of "
                f"{key}, which is not trained: write into the one that is there "
                f"(self.{key}.data.copy_)"
            )


def check_gradient(velocity: Tensor, name: str) -> None:
    """Raise a ConfigError for the velocity of a training step from which no weight can learn."""
    if velocity.requires_grad:
        return
    found = (
        "gradients are switched off (torch.set_grad_enabled), so that it has none"
        if not torch.is_grad_enabled()
        else "it depends on no parameter that requires a gradient"
    )
    raise ConfigError(
        f"--arch {name}: forward returns a velocity that cannot be trained: {found}; look for "
        "torch.no_grad, detach, numpy, and parameters that forward does not use"
    )


def check_leaves(velocity: Tensor, model: nn.Module) -> None:
    """Raise a ConfigError if a velocity was computed with parameters that are not the model's.

    Args:
        velocity: Of a training step, with its graph.
        model: The model, as forward has left it.
    """
    own = {id(weights) for weights in model.parameters()}
    for leaf in leaves_of(velocity):
        # What forward made itself, to take a gradient at it, is no parameter.
        if isinstance(leaf, nn.Parameter) and id(leaf) not in own:
            raise ConfigError(
                f"--arch {type(model).__name__}: forward uses weights of shape "
                f"{tuple(leaf.shape)} that are not among its parameters, so that they would be "
                "neither trained nor saved: hold layers in an nn.ModuleList or nn.ModuleDict, not "
                "in a list or dict, and weights as an nn.Parameter of a module; on what is not to "
                "be trained call requires_grad_(False)"
            )


def leaves_of(result: Tensor) -> Iterator[Tensor]:
    """What requires a gradient and was not computed itself, of all that a result depends on."""
    seen, ahead = set(), [result.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            yield leaf
        ahead += [before for before, _ in node.next_functions]


def _unexpected(name: str, x: Tensor, t: Tensor, found: str) -> str:
    return (
        f"--arch {name}: for x of shape {tuple(x.shape)} and t of shape {tuple(t.shape)} forward "
        f"returns {found}, expected a velocity of shape {tuple(x.shape)}"
    )


def _word(of: torch.dtype | torch.layout) -> str:
    return str(of).removeprefix("torch.")
