"""Configuration as data: parsed JSON in, frozen dataclasses out, anything unknown refused by name."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, TypeVar

from .errors import InvalidRequest, MedAnomalyCLIPError

Configuration = TypeVar("Configuration")
_LARGEST = 2**63  # what other libraries count with ends here


def from_mapping(
    kind: type[Configuration],
    data: Any,
    where: str,
    error: type[MedAnomalyCLIPError] = InvalidRequest,
) -> Configuration:
    """Build a dataclass, and the dataclasses in its fields, from parsed JSON or TOML.

    Args:
        kind: a dataclass whose field types are numbers, strings, booleans, tuples, dicts of these, optional
            values, or dataclasses.
        data: mapping of field names to values; fields with a default may be left out.
        where: what the data is, for messages, for example "bundle.json".
        error: type of the error that is raised.

    Raises:
        MedAnomalyCLIPError: of the given type, naming the key that is unknown, missing or of a wrong type.
    """
    if not isinstance(data, Mapping):
        raise error(f"{where} is {_shown(data)}; a table of settings belongs there")
    known = {entry.name: entry for entry in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(str(key) for key in data if key not in known)
    if unknown:
        raise error(
            f"{where}: unknown key {', '.join(map(repr, unknown))}; known are {', '.join(sorted(known))}"
        )
    missing = [
        name
        for name, entry in known.items()
        if name not in data and entry.default is MISSING and entry.default_factory is MISSING
    ]
    if missing:
        raise error(f"{where}: key {', '.join(map(repr, missing))} is missing")
    hints = _type_hints(kind)  # type: ignore[arg-type]
    return kind(**{key: _value(hints[key], value, f"{where}.{key}", error) for key, value in data.items()})


@functools.cache
def _type_hints(kind: type) -> dict[str, Any]:
    """Types of a dataclass's fields; told once, since Python evaluates them anew each time it is asked."""
    return typing.get_type_hints(kind)


def to_mapping(configuration: Any) -> dict[str, Any]:
    """The plain dicts, lists, numbers and strings that `from_mapping` reads back."""
    return _plain(asdict(configuration))


def _value(hint: Any, value: Any, where: str, error: type[MedAnomalyCLIPError]) -> Any:
    """A parsed value as the type a field asks for."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _value(next(a for a in arguments if a is not type(None)), value, where, error)
    if is_dataclass(hint) and isinstance(hint, type):
        return from_mapping(hint, value, where, error)
    if origin is tuple and isinstance(value, (list, tuple)):
        if arguments[-1] is Ellipsis:
            hints: tuple[Any, ...] = (arguments[0],) * len(value)
        elif len(arguments) == len(value):
            hints = arguments
        else:
            raise error(f"{where} holds {len(value)} values instead of {len(arguments)}")
        return tuple(
            _value(h, v, f"{where}[{i}]", error) for i, (h, v) in enumerate(zip(hints, value, strict=True))
        )
    if origin is dict and isinstance(value, Mapping):
        return {str(k): _value(arguments[1], v, f"{where}.{k}", error) for k, v in value.items()}
    if hint is Any:
        return value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and not abs(value) < _LARGEST:  # NaN is not less either
        raise error(f"{where} is {_shown(value)}; a number of ordinary size belongs there")
    if hint is float and is_number:
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise error(f"{where} is {_shown(value)}, which is not of the kind that belongs there")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
