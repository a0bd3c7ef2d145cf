"""Which options a run of a sweep has a use for: `--ot-batch` beside `--flow icfm otcfm`.

A single run with an option that does nothing is refused, since something else was meant. In a sweep
the option means the runs that have a use for it, and is left out of the others: of their config,
signature and name. Where no run has a use for it, it stays, and is refused as that of a single run.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from flowjobs.config import SIZE_FIELDS, TrainingConfig
from flowjobs.flows.uses import has_use
from flowjobs.models.source import may_take
from flowjobs.runs.selection import ARGUMENT


def applying(
    points: Sequence[Mapping[str, Any]], defaults: TrainingConfig
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The runs without what they have no use for, each once.

    Args:
        points: The runs, by the values of the fields that are given.
        defaults: The values of the others.

    Returns:
        The runs, and of each field that was left out somewhere, of how many.
    """
    takes = functools.cache(may_take)  # reads the model's source

    def use(point: Mapping[str, Any], field: str) -> bool:
        def of(name: str) -> Any:
            return point.get(name, getattr(defaults, name))

        if field.startswith(ARGUMENT) or field in SIZE_FIELDS:
            return takes(of("arch"), field.removeprefix(ARGUMENT))
        return has_use(field, of)

    used = {field for point in points for field in point if use(point, field)}
    left_out: dict[str, int] = {}
    kept = []
    for point in points:
        idle = {field for field in point if field in used and not use(point, field)}
        for field in idle:
            left_out[field] = left_out.get(field, 0) + (point[field] is not None)
        kept.append({field: value for field, value in point.items() if field not in idle})
    once = {json.dumps(point, sort_keys=True): point for point in kept}
    return list(once.values()), {field: n for field, n in left_out.items() if n}
