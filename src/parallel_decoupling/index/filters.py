"""Conditions on source fields, in one form for every index.

A filter maps a field to a value (equal), a list of values (any of them) or a range ``{"min": a, "max": b}``
(both ends included, either may be missing). ``None`` finds missing values. All conditions must hold.
Here: checking a filter and writing it as a pyarrow expression or as SQL.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

Value: TypeAlias = str | int | float | bool | None
Filter: TypeAlias = Mapping[str, Value | Sequence[Value] | Mapping[str, Value]]

_FORMS = "a value, a list of values, or a range such as {'min': 1, 'max': 5}"


def check_filter(conditions: Filter, schema: pa.Schema) -> None:
    """Check a filter against the fields of an index.

    Raises:
        ValueError: an unknown field, a field of a type without conditions, or a value of another type or
            out of its range.
    """
    if not isinstance(conditions, Mapping) or not conditions:
        raise ValueError(f"the filter is {conditions!r}; map a field to {_FORMS}")
    for name, condition in conditions.items():
        if name not in schema.names:
            raise ValueError(f"filter: there is no field {name!r}; this index has {', '.join(schema.names)}")
        kind = schema.field(name).type
        accepted = _accepted_types(kind)
        if accepted is None:
            raise ValueError(
                f"filter, field {name!r}: its type is {kind}; conditions work on texts, numbers and booleans"
            )
        for value in _values(name, condition):
            good = isinstance(value, accepted) and (bool in accepted or not isinstance(value, bool))
            if value is not None and (not good or (isinstance(value, float) and not math.isfinite(value))):
                raise ValueError(f"filter, field {name!r}: {value!r} is no value of its type, {kind}")
            if isinstance(value, int) and not _in_range(value, kind):
                raise ValueError(
                    f"filter, field {name!r}: the whole number {value!r} is out of range for its type, {kind}"
                )


def to_arrow(conditions: Filter) -> pc.Expression:
    """Write a checked filter for pyarrow."""
    parts = []
    for name, condition in conditions.items():
        column = pc.field(name)
        if isinstance(condition, Mapping):
            bounds = {key: value for key, value in condition.items() if value is not None}
            parts += [column >= bounds[key] if key == "min" else column <= bounds[key] for key in bounds]
            continue
        values = _values(name, condition)
        present = [value for value in values if value is not None]
        options = ([column.isin(present)] if present else []) + ([column.is_null()] if None in values else [])
        parts.append(reduce(lambda a, b: a | b, options))
    return reduce(lambda a, b: a & b, parts)


def to_sql(conditions: Filter) -> str:
    """Write a checked filter as SQL.

    Relations:
        Finds the rows that ``to_arrow`` finds.
    """
    parts = []
    for name, condition in conditions.items():
        column = f"`{name}`"
        if isinstance(condition, Mapping):
            signs = {"min": ">=", "max": "<="}
            parts += [
                f"{column} {signs[key]} {_sql(value)}"
                for key, value in condition.items()
                if value is not None
            ]
            continue
        values = _values(name, condition)
        present = ", ".join(_sql(value) for value in values if value is not None)
        options = [f"{column} IN ({present})"] if present else []
        options += [f"{column} IS NULL"] if None in values else []
        parts.append(f"({' OR '.join(options)})")
    return " AND ".join(parts)


def _values(name: str, condition: object) -> list[Any]:
    if isinstance(condition, Mapping):
        unknown = [key for key in condition if key not in ("min", "max")]
        values = [value for value in condition.values() if value is not None]
        if unknown or not values:
            raise ValueError(f"filter, field {name!r}: {dict(condition)!r} is no range; use {_FORMS}")
        return values
    if isinstance(condition, (list, tuple, set)):
        if not condition:
            raise ValueError(f"filter, field {name!r}: an empty list finds nothing; use {_FORMS}")
        return list(condition)
    return [condition]


def _accepted_types(kind: pa.DataType) -> tuple[type, ...] | None:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return (str,)
    if pa.types.is_boolean(kind):
        return (bool,)
    if pa.types.is_integer(kind):
        return (int,)
    if pa.types.is_floating(kind):
        return (int, float)
    return None


def _in_range(value: int, kind: pa.DataType) -> bool:
    """Whether Arrow can compare the number with a field: all are compared as int64 or as the floats."""
    try:
        pa.scalar(value, pa.int64() if pa.types.is_integer(kind) else kind)
    except (OverflowError, pa.ArrowInvalid):
        return False
    return True


def _sql(value: Value) -> str:
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(value).lower() if isinstance(value, bool) else repr(value)
