"""JSON files: their format and keys are checked, and options come back as they were, tuples and block numbers too."""

import json
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any


def read_json(text: str, what: str, form: str, version: int) -> dict[str, Any]:
    """The object that JSON text holds, of a format and its version; ValueError in words where it is something else."""
    try:
        found: Any = json.loads(text)
    except ValueError as error:
        raise ValueError(f"a {what} must be JSON, but {error}") from None
    if not isinstance(found, dict) or found.get("format") != form:
        raise ValueError(f"a {what} must be a JSON object with format {form!r}")
    if type(found.get("version")) is not int or found["version"] != version:
        raise ValueError(f"the {what}'s version is {found.get('version')!r}, but this package reads {version}")
    return found


def check_keys(what: str, found: Any, keys: set[str]) -> None:
    """ValueError where something is not an object with these keys and no others."""
    if not isinstance(found, Mapping) or set(found) != keys:
        given = sorted(found) if isinstance(found, Mapping) else repr(found)
        raise ValueError(f"{what} must have the keys {', '.join(sorted(keys))}, but has {given}")


def encoded(what: str, value: Any) -> Any:
    """A value of numbers, text, lists, tuples and mappings as JSON has it, which knows no tuples, nor keys but text.

    Raises:
        TypeError: there is something else in it, or a number that is not finite.

    >>> encoded("points", {0: "horizontal", 1: (2, 0.5)})
    {'mapping': [[0, 'horizontal'], [1, {'tuple': [2, 0.5]}]]}
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and math.isfinite(value) and float(value) == value:
        return float(value)
    if type(value) is list:
        return [encoded(what, one) for one in value]
    if type(value) in (tuple, range):
        return {"tuple": [encoded(what, one) for one in value]}
    if isinstance(value, Mapping):
        return {"mapping": [[encoded(what, key), encoded(what, one)] for key, one in value.items()]}
    raise TypeError(
        f"{what} has {value!r}, a {type(value).__name__}, but JSON takes finite numbers, text, lists, tuples and"
        " mappings of them"
    )


def decoded(what: str, value: Any) -> Any:
    """What `encoded` was given; ValueError for what it does not write.

    >>> decoded("r", {"tuple": [8, -1]})
    (8, -1)
    """
    if isinstance(value, list):
        return [decoded(what, one) for one in value]
    if not isinstance(value, dict):
        return value
    kind, inner = next(iter(value.items()), (None, None))
    if len(value) == 1 and isinstance(inner, list):
        if kind == "tuple":
            return tuple(decoded(what, one) for one in inner)
        if kind == "mapping" and all(isinstance(pair, list) and len(pair) == 2 for pair in inner):
            pairs = [(decoded(what, key), decoded(what, one)) for key, one in inner]
            if all(isinstance(key, (str, int, float, tuple, type(None))) for key, _ in pairs):
                return dict(pairs)
    raise ValueError(f"{what} has {value!r}, but an object must be a 'tuple' of values or a 'mapping' of pairs")
