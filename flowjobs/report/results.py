"""What one run says to a report: its config, its state, its curve and its measures.

Reads the run's folder alone. Where a job died and nobody has noted it yet, the run counts as
running: `flowjobs reconcile` records that.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flowjobs.config import TrainingConfig, value_in_name
from flowjobs.errors import ConfigError
from flowjobs.runs.code import code_of
from flowjobs.runs.data_file import DataContent
from flowjobs.runs.files import read_json
from flowjobs.runs.hint import hint
from flowjobs.runs.metrics import Row, read_rows
from flowjobs.runs.progress import state_in_words
from flowjobs.runs.run import Run, has_done
from flowjobs.runs.selection import ARGUMENT, fields_in, fields_of
from flowjobs.runs.status import RunStatus, read_sound_status

BEST_LOSS = "best_val_loss"
# Between a measure and the network calls of its samples: sliced_wasserstein@8.
AT_CALLS = "@"
# What is told by the nearest of some training rows.
OF_NEIGHBOURS = ("nn_train", "memorization")


@dataclass(frozen=True)
class Result:
    """A run of the report. Hold it for the report's length only: it is read once.

    Attributes:
        run: The run.
        fields: Its config's fields, and its model's arguments, by name; of a model that was given
            from Python `arch` is its class.
        status: As its folder says.
        evaluation: Its `evaluation.json`; empty if there is none.
        outdated: Whether there is one of weights that it had before it was trained on.
        code: The digest of the user's code that it keeps; empty of a built-in model and flow.
        data: What its data are, by part; empty where that was not noted.
        words: By field, where the report has another word for the value than a run's name; see
            `apart`.
        made: Whether there is such a run: a sweep may have been broken off before it made all.
    """

    run: Run
    fields: Mapping[str, Any]
    status: RunStatus
    evaluation: Mapping[str, Any]
    outdated: bool = False
    code: str = ""
    data: Mapping[str, DataContent] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    made: bool = True

    @property
    def arguments(self) -> list[str]:
        """The names of its model's arguments among the fields."""
        given = self.fields.get("arch_args") or ()
        return [name if (name := f"{ARGUMENT}{key}") in self.fields else key for key in given]

    def shown(self, name: str) -> str:
        """A field's value in words, by which the report tells it from others."""
        return self.words.get(name) or self.in_name(name)

    def in_name(self, name: str) -> str:
        """A field's value, as a run's name has it; "-" where the run has none."""
        value = self.fields.get(name)
        return "-" if value is None else value_in_name(name, value)

    @property
    def state(self) -> str:
        """What it does, in a word or two."""
        if not self.made:
            return "not submitted"
        if self.status.state in ("submitted", "finished") and not self.finished:
            return "waiting"
        return state_in_words(self.status)

    @functools.cached_property
    def finished(self) -> bool:
        """Whether it has done all that it is asked to, which may be more than when it ended."""
        length = {key: self.fields[key] for key in ("epochs", "patience")}
        return has_done(self.status, **length)

    @property
    def live(self) -> bool:
        """Whether it will get further by itself, or when it is resumed."""
        return not self.finished and self.status.state not in ("failed", "cancelled")

    @functools.cached_property
    def rows(self) -> Sequence[Row]:
        """The rows of its `metrics.jsonl`."""
        return list(read_rows(self.run.metrics_file))

    @property
    def curve(self) -> list[tuple[int, float]]:
        """Its validation losses by step."""
        return [(row["step"], row["val/loss"]) for row in self.rows if _is_number(row, "val/loss")]

    def logged(self, key: str, up_to: int | None) -> float | None:
        """The last value of a key of `metrics.jsonl` (up to a step); None if there is none."""
        found = [
            row[key]
            for row in self.rows
            if _is_number(row, key) and (up_to is None or row["step"] <= up_to)
        ]
        return found[-1] if found else None

    def measure(self, name: str, key: str = "value") -> float | None:
        """A measure of `evaluation.json`, or its floor; None if it has not been taken."""
        name, _, calls = name.partition(AT_CALLS)
        try:
            if calls and key == "value":
                return _finite(self.evaluation["by_nfe"][calls][name])
            return _finite(self.evaluation["measures"][name][key])
        except (KeyError, TypeError):
            return None

    def note_of(self, name: str) -> str | None:
        """What its evaluation warns of at a measure."""
        try:
            note = self.evaluation["measures"][name.partition(AT_CALLS)[0]]["note"]
        except (KeyError, TypeError):
            return None
        return f"{name}: {note}" if note else None

    @property
    def measures(self) -> list[str]:
        """The names of its measures, the one that says most first."""
        found = self.evaluation.get("measures")
        return list(found) if isinstance(found, dict) else []


def read_result(run: Run) -> Result:
    """Read a run.

    Raises:
        ConfigError: A file of it is damaged.
    """
    try:
        evaluation = read_json(run.evaluation_file)
    except FileNotFoundError:
        evaluation = {}
    except (OSError, ValueError) as error:
        again = hint("evaluate", run.name, study=run.study)
        raise ConfigError(f"{run.evaluation_file} is damaged ({error}): `{again}`") from error
    status = read_sound_status(run.status_file)
    fields = fields_of(run)
    if status.model:
        fields["arch"] = status.model
    own = any(":" in str(fields[name]) for name in ("arch", "flow"))
    code = code_of(run) if own else None
    outdated = run.is_outdated(evaluation)
    return Result(
        run,
        fields,
        status,
        {} if outdated else evaluation,
        outdated,
        code.digest if code else "",
        run.data(),
    )


def not_made(run: Run, config: TrainingConfig) -> Result:
    """A run that a sweep means and has not made."""
    fields = fields_in({"training": config.to_dict()})
    return Result(run, fields, RunStatus("submitted"), {}, made=False)


def way_of(evaluation: Mapping[str, Any], name: str | None = None) -> str:
    """How measures were taken, which their values depend on: "n 256, repeats 2, solver heun".

    Args:
        evaluation: As `evaluation.json` has it.
        name: The measure; None: all of them.
    """
    keys = ["n", "repeats", "solver"]
    if name in (None, *OF_NEIGHBOURS) and "nearest_among" in evaluation:
        keys.append("nearest_among")
    return ", ".join(f"{key.replace('_', ' ')} {evaluation.get(key)}" for key in keys)


def _is_number(row: Row, key: str) -> bool:
    return isinstance(row.get(key), int | float) and math.isfinite(row[key])


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
