"""What a JSON file has of a dataclass, whatever became of the file."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pytest

from flowjobs.from_json import from_json


@dataclass(frozen=True)
class Inner:
    size: float
    word: Literal["one", "other"] = "one"


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner | None = None
    names: tuple[str, ...] = ()
    of_each: dict[str, Inner] = field(default_factory=dict)
    anything: Any = None
    count: int = 0


def test_what_was_written_is_read_and_what_is_new_is_left_out() -> None:
    outer = Outer("a", Inner(2, "other"), ("b", "c"), {"d": Inner(0.5)}, [1, {}], 3)
    there = asdict(outer) | {"names": ["b", "c"], "of a newer version": 1}
    assert from_json(Outer, there) == outer
    assert from_json(Outer, {"name": "a"}) == Outer("a")


@pytest.mark.parametrize(
    ("damaged", "why"),
    [
        (None, "found None, expected an object"),
        ([], r"found \[\], expected an object"),
        ({}, "found no name"),
        ({"name": 1}, "name: found 1, expected str"),
        ({"count": True}, "count: found True, expected int"),
        ({"inner": {}}, "inner: found {}, expected .*Inner"),
        ({"names": "bc"}, "names: found 'bc', expected tuple"),
        ({"names": ["b", 1]}, "names: found 1, expected str"),
        ({"of_each": {"d": {"size": "x"}}}, "of_each: size: found 'x', expected float"),
        ({"of_each": {"d": {"size": 1, "word": "third"}}}, "word: found 'third', expected"),
    ],
)
def test_what_is_of_another_type_is_named(damaged: Any, why: str) -> None:
    found = {"name": "a"} | damaged if damaged else damaged
    with pytest.raises(ValueError, match=why):
        from_json(Outer, found)
