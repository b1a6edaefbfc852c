"""Configuration: what `to_mapping` writes `from_mapping` reads, and nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest

from MedAnomalyCLIPLib.configuration import from_mapping, to_mapping
from MedAnomalyCLIPLib.errors import BundleInvalid, InvalidRequest


@dataclass(frozen=True)
class Part:
    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class Whole:
    count: int
    part: Part
    range: tuple[float, float]
    parts: dict[str, Part] = field(default_factory=dict)
    steps: tuple[int, ...] = ()
    note: str | None = None
    on: bool = False


WHOLE = Whole(3, Part("a", 0.5), (0.0, 1.0), {"b": Part("b")}, (1, 2), "n", True)


def test_json_round_trip_is_exact():
    assert from_mapping(Whole, json.loads(json.dumps(to_mapping(WHOLE))), "whole") == WHOLE


def test_whole_numbers_serve_as_fractions():
    part = from_mapping(Part, {"name": "a", "weight": 2}, "part")
    assert isinstance(part.weight, float)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"surprise": 1}, "surprise"),
        ({"count": 1.5}, "whole.count"),
        ({"count": True}, "whole.count"),
        ({"count": "3"}, "whole.count"),
        ({"on": 1}, "whole.on"),
        ({"part": {"name": "a", "wieght": 1}}, "whole.part: unknown key 'wieght'"),
        ({"part": {}}, "whole.part: key 'name' is missing"),
        ({"part": 3}, "whole.part is 3"),
        ({"parts": {"b": {"name": 4}}}, "whole.parts.b.name"),
        ({"range": [0.0]}, "whole.range holds 1"),
        ({"range": [0.0, "x"]}, r"whole.range\[1\]"),
        ({"steps": [1, 2.5]}, r"whole.steps\[1\]"),
    ],
)
def test_what_does_not_fit_is_refused_where_it_stands(change, where):
    with pytest.raises(InvalidRequest, match=where):
        from_mapping(Whole, {**to_mapping(WHOLE), **change}, "whole")


def test_the_caller_names_the_kind_of_error():
    with pytest.raises(BundleInvalid):
        from_mapping(Part, {}, "part", BundleInvalid)
