"""What campaigns share: tries that are not repeated for the same commit, and the table of all verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from studies.results import append_result, code_version, read_results


def run_missing(
    results_file: Path, tries: Iterable[dict[str, Any]], one_try: Callable[..., dict[str, Any]]
) -> int:
    """Try what was not tried with this commit, and print the table of this commit.

    Args:
        results_file: has one JSON line per try.
        tries: the arguments of each; what tells them apart, and ``kind`` is one of them.
        one_try: returns what was found out, ``verdict`` among it.

    Returns:
        The exit code: 1 if a verdict is ``wrong``.
    """
    commit, _ = code_version()
    lines = [line for line in read_results(results_file) if line["commit"] == commit]
    for each in tries:
        if not any(line.items() >= each.items() for line in lines):
            lines.append({**each, **one_try(**each), "commit": commit})
            append_result(results_file, lines[-1])
    print(table({results_file.stem: lines}))
    return int(any(verdict_of(line) == "wrong" for line in lines))


def verdict_of(line: dict[str, Any]) -> str:
    """Return the verdict of a line; of a kill ``ended`` if the command ended well by itself."""
    if "verdict" in line:
        return str(line["verdict"])
    ended = line.get("ended_before") or line.get("exit_code") == 0
    return "wrong" if not line["ok"] else "ended" if ended else "right"


def table(campaigns: dict[str, list[dict[str, Any]]]) -> str:
    """Return how many tries of each campaign, kind and commit had which verdict, in Markdown."""
    counts: dict[tuple[str, str, str], Counter[str]] = {}
    for name, lines in campaigns.items():
        for line in lines:
            counts.setdefault((name, line["kind"], line["commit"][:7]), Counter())[verdict_of(line)] += 1
    rows = ["| campaign | kind | commit | tried | verdicts |", "| --- | --- | --- | --- | --- |"]
    for place, verdicts in counts.items():
        found = ", ".join(f"{verdict}: {number}" for verdict, number in sorted(verdicts.items()))
        rows.append(f"| {' | '.join(place)} | {verdicts.total():,} | {found} |")
    return "\n".join(rows)
