"""What a ``scores.json`` must hold: kinds of values, and hits that fit the scores.

Here: checks of the parsed JSON. Elsewhere on purpose: what it means (``report``), means that were changed by
hand (``audit``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
ROUNDING_ERROR = 1e-9
"""Two fractions of the same counts differ by at most this much."""

_NUMBER = (int, float)
_PARTS: dict[str, Any] = {"tasks": dict, "hits": dict, "run": dict, "modes": dict, "warnings": list}
_ROW: dict[str, Any] = {
    "meta_task": str,
    "in_distribution": bool,
    "num_queries": int,
    "chance": _NUMBER,
    "hit_at_1": dict,
}
_OPTIONAL: dict[str, Any] = {"num_skipped": int, "metrics": dict, "rows_sha256": str}
_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a whole number"}


def read_json(file: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: it is none, or no text at all.
    """
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def check_content(content: Any, file: str | Path) -> None:
    """Check that all values of a ``scores.json`` are there and of their kind.

    Args:
        content: of the file.
        file: for the errors.

    Raises:
        ValueError: of another format, or a value that is missing or of another kind; names its place.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{file} is not a score file of format {FORMAT}; run the test again to write one")
    _check_keys(content, {"tasks": dict}, f"{file}")
    for name, kind in _PARTS.items():
        _check(content.get(name, kind()), kind, f"{file}, {name}")
    for task, columns in content.get("hits", {}).items():
        _check_values(columns, str, f"{file}, task {task}, hits")
    for column, costs in content.get("modes", {}).items():
        _check_values(costs, _NUMBER, f"{file}, modes, {column}")
    for task, row in content["tasks"].items():
        where = f"{file}, task {task}"
        _check(row, dict, where)
        _check_keys(row, _ROW, where)
        _check_keys(row, {key: kind for key, kind in _OPTIONAL.items() if key in row}, where)
        _check_values(row["hit_at_1"], _NUMBER, f"{where}, hit_at_1")
        if not row["hit_at_1"]:
            raise ValueError(f"{where}, hit_at_1: no column has a score; run the test again")
        for column, values in row.get("metrics", {}).items():
            _check_values(values, _NUMBER, f"{where}, metrics, {column}")


def hit_problems(content: Mapping[str, Any]) -> list[str]:
    """Where per-row hits do not fit the number of rows or the score; names task and column.

    Args:
        content: of a ``scores.json``, checked.
    """
    problems = []
    for task, by_column in content.get("hits", {}).items():
        row = content["tasks"].get(task)
        if row is None or (by_column and list(by_column) != list(row["hit_at_1"])):
            scored = None if row is None else list(row["hit_at_1"])
            problems.append(f"task {task}: hits of {list(by_column)}, but scores of {scored}")
            continue
        for column, hits in by_column.items():
            mean, score = hits.count("1") / max(1, len(hits)), row["hit_at_1"][column]
            where = f"task {task}, column {column}"
            if len(hits) != row["num_queries"]:
                problems.append(f"{where}: {len(hits)} hits of {row['num_queries']} queries")
            elif set(hits) - {"0", "1"}:
                problems.append(f"{where}: hits other than 0 and 1")
            elif abs(mean - score) > ROUNDING_ERROR:
                problems.append(f"{where}: the mean of the hits is {mean:.6g}, but hit_at_1 is {score:.6g}")
    return problems


def _check_keys(row: Mapping[str, Any], kinds: Mapping[str, Any], where: str) -> None:
    for key, kind in kinds.items():
        if key not in row:
            raise ValueError(
                f"{where} lacks {key!r}: an earlier version wrote it, or it was cut; run the test again"
            )
        _check(row[key], kind, f"{where}, {key}")


def _check_values(values: Any, kind: Any, where: str) -> None:
    _check(values, dict, where)
    for name, value in values.items():
        _check(value, kind, f"{where}, {name}")


def _check(value: Any, kind: Any, where: str) -> None:
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"{where}: {value!r:.60} is not {_KINDS.get(kind, 'a number')}; run the test again")
