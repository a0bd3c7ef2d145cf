"""What `--json` prints: JSON that every reader of it takes."""

import json
import math
from typing import Any


def print_json(found: Any, indent: int | None = 2) -> None:
    """Print as JSON, with null for what is no number: an infinite loss, before the first one.

    Args:
        found: Of JSON's types, tuples and dataclasses' dicts among them.
        indent: See `json.dumps`.
    """
    print(json.dumps(_finite(found), indent=indent, allow_nan=False))


def _finite(found: Any) -> Any:
    match found:
        case float():
            return found if math.isfinite(found) else None
        case dict():
            return {key: _finite(each) for key, each in found.items()}
        case list() | tuple():
            return [_finite(each) for each in found]
    return found
