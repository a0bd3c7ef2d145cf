"""What the source of a flow of the user's own says of how it is called, read without running it.

As of a model: where that is not certain nothing is refused here, but where the run starts.
"""

import ast
import inspect
from collections.abc import Iterator

from flowjobs.config import TrainingConfig
from flowjobs.user_code import check_call
from flowjobs.user_source import Found, binding, binding_in, signature_of

# What a path and a coupling are called with; see `flows.flow`.
PATH = ("x_0", "x_1", "t", "sigma", "noise")
COUPLE = ("x_0", "x_1", "sigma", "seed")


def check_flow_source(config: TrainingConfig) -> None:
    """Raise a ConfigError where the source of `--flow` shows that it cannot be called."""
    found = binding_in(f"--flow {config.flow}", config.flow_path, ast.FunctionDef)
    match found and found.node:
        case ast.FunctionDef() as function if signature := _of_function(function):
            check_call(signature, f"--flow {config.flow}", PATH)
        case ast.Assign(value=ast.Call() as call) | ast.AnnAssign(value=ast.Call() as call):
            assert found is not None
            for what, given in _parts(call):
                arguments = {"path": PATH, "couple": COUPLE}[what]
                if signature := _signature(found, given):
                    check_call(signature, f"--flow {config.flow}: its {what}", arguments)


def _parts(call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    """The functions that `Flow(...)` is made with; of another call, none."""
    match call.func:
        case ast.Name("Flow") | ast.Attribute(attr="Flow"):
            named = [(keyword.arg, keyword.value) for keyword in call.keywords]
            if not any(isinstance(given, ast.Starred) for given in call.args):
                named += zip(("path", "couple"), call.args, strict=False)
            for what, given in named:
                if what in ("path", "couple"):
                    yield what, given


def _signature(found: Found[ast.stmt], given: ast.expr) -> inspect.Signature | None:
    """The signature of a function that a module names or has; None where it is not certain."""
    match given:
        case ast.Lambda():
            return signature_of(given.args)
        case ast.Name():
            named = binding(found.source, given.id)
            if isinstance(named, Found) and isinstance(named.node, ast.FunctionDef):
                return _of_function(named.node)
    return None


def _of_function(function: ast.FunctionDef) -> inspect.Signature | None:
    return None if function.decorator_list else signature_of(function.args)
