"""What is checked of a user's model, and when; each raises a ConfigError that says what to do.

At construction: check_weights, and where several ranks train check_types_of_ranks.
Before step 1: check_new_model.
In step 1: check_leaves, and as in each later one check_gradient.
After it: check_parameters, as at the end of each epoch, check_restart, `EMAModel.check_copy`, and
    in the first validation kept_in_evaluation.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from flowjobs.data.randomness import random_numbers_kept
from flowjobs.errors import ConfigError
from flowjobs.models.source import FORWARD
from flowjobs.models.velocity import input_dtype
from flowjobs.user_code import check_order

# By name: each weight, and its values.
Values = dict[str, tuple[nn.Parameter, Tensor]]
# What gloo and NCCL pass on, both.
BETWEEN_RANKS = frozenset(
    {
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
        *(torch.complex128, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool),
    }
)
# A restart, the moving average and the model that is sampled are built anew, and know of weights
# that forward writes itself what the state says: tensors, and what `get_extra_state` gives.
WHAT_TO_DO = (
    "what says that weights are initialized from the first batch must be in the state: a buffer "
    "(register_buffer), not an attribute"
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


def check_new_model(model: nn.Module) -> None:
    """Raise a ConfigError for what a new run should not begin with.

    One that is under way resumes with it: its code cannot be changed any more.
    """
    name = type(model).__name__
    _check_order(model)
    for key, part in model.named_modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.max_norm is not None:
            raise ConfigError(
                f"--arch {name}: {key} rescales its rows wherever it is called, also those of "
                "the moving average: build it without max_norm, and in forward scale the rows "
                "that it returns (torch.renorm)"
            )
        for key_there, tensor in {**vars(part), **part._buffers}.items():
            is_weight = isinstance(tensor, Tensor) and tensor.is_leaf and tensor.requires_grad
            # Reentrant checkpointing needs one of a single number.
            if is_weight and not isinstance(tensor, nn.Parameter) and tensor.numel() > 1:
                raise ConfigError(
                    f"--arch {name}: {key}{'.' * bool(key)}{key_there} requires a gradient and is "
                    "no nn.Parameter, so that it would never be trained: make it one, or call "
                    "requires_grad_(False) on it"
                )


def _check_order(model: nn.Module) -> None:
    if type(model).__call__ is not nn.Module.__call__:
        return  # it may give them to forward as it likes
    with suppress(ValueError):  # one that is not Python's does not say what it takes
        signature = inspect.signature(model.forward)
        check_order(signature, f"--arch {type(model).__name__}: its forward", FORWARD)


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
        velocity: A training step's, with its graph.
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


def values_of(model: nn.Module) -> Values:
    """The weights of a model as they are now."""
    return {name: (of, of.detach().clone()) for name, of in model.named_parameters()}


def changed(model: nn.Module, before: Values) -> str | None:
    """The name of a weight that is another one, or has other values, than before."""
    now = dict(model.named_parameters())
    for name, (weights, values) in before.items():
        # NaN is no change: what has diverged is said elsewhere.
        same = torch.isclose(weights, values, rtol=0, atol=0, equal_nan=True).all()
        if now.get(name) is not weights or not bool(same):
            return name
    return None


def check_restart(
    model: nn.Module, built: nn.Module, shape: tuple[int, ...], device: torch.device
) -> None:
    """Raise a ConfigError where a restart would initialize weights from a batch again.

    Copies are called, in the model's modes.

    Args:
        model: The model, whose forward has written weights in its first step.
        built: What a restart would have: a model of the same class that was never trained, with
            the tensors of a state.
        shape: A batch's.
        device: Where both are.
    """

    def writes(of: nn.Module) -> str | None:
        trial = copy.deepcopy(of)
        trial.train()  # one of the model's own may return nothing
        for part, trained in zip(trial.modules(), model.modules(), strict=True):
            part.training = trained.training
        before, dtype = values_of(trial), input_dtype(trial)
        x = torch.randn(shape, device=device, dtype=dtype)
        trial(x, torch.rand(len(x), device=device, dtype=dtype))
        return changed(trial, before)

    try:
        with random_numbers_kept(device), torch.no_grad():
            again, always = writes(built), writes(model)
    except Exception:
        return  # it cannot be copied, or not be called so: nothing is known
    if again and not always:  # as one does that normalizes its weights in each step
        raise ConfigError(
            f"--arch {type(model).__name__}: forward initializes {again} from the first batch, and "
            f"would again at each restart: {WHAT_TO_DO}"
        )


@contextmanager
def kept_in_evaluation(model: nn.Module) -> Iterator[None]:
    """Raise a ConfigError if a weight is another one when the block has called the model.

    Args:
        model: The moving average, in evaluation mode: what forward writes would replace it.
    """
    before = values_of(model)
    yield
    if name := changed(model, before):
        raise ConfigError(
            f"--arch {type(model).__name__}: forward changes {name} in evaluation mode, in which "
            "it is the moving average, that validation and samples are of: change it where "
            f"self.training alone; {WHAT_TO_DO}"
        )


def _word(of: torch.dtype | torch.layout) -> str:
    return str(of).removeprefix("torch.")
