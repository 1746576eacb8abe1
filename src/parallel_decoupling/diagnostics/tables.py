"""An analysis of paths as tables, for the terminal and for Markdown, and as ``paths.json``.

Here: rounding, wording, layout of the file. Elsewhere: the numbers (``study``), pictures (``figures``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from parallel_decoupling.diagnostics.attention import GROUPS
from parallel_decoupling.diagnostics.contributions import agreement
from parallel_decoupling.diagnostics.study import PathAnalysis

FORMAT = 1


@dataclass(frozen=True)
class Section:
    """One table.

    Attributes:
        title: what it shows.
        headings: of the columns.
        rows: cells as text; the first one names the row.
        caption: how to read it.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str

    def terminal(self) -> Table:
        """As a rich table."""
        table = Table(title=self.title, caption=self.caption)
        for number, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """As a Markdown section."""
        lines = [
            f"### {self.title}",
            "",
            self.caption,
            "",
            "| " + " | ".join(self.headings) + " |",
            "|---|" + "---:|" * (len(self.headings) - 1),
            *("| " + " | ".join(row) + " |" for row in self.rows),
        ]
        return "\n".join(lines) + "\n"


def sections(analysis: PathAnalysis) -> list[Section]:
    """All tables that the analysis has numbers for."""
    parts = [_paths(analysis)]
    if analysis.num_paths > 1:
        parts += [_pairs(analysis), _maps(analysis)]
    if analysis.probes:
        parts.append(_probes(analysis))
    if analysis.errors is not None:
        parts.append(_errors(analysis))
    return parts


def write_json(analysis: PathAnalysis, json_file: str | Path) -> None:
    """Write ``as_plain`` as JSON."""
    text = json.dumps(as_plain(analysis), indent=1, default=str, allow_nan=False)
    Path(json_file).write_text(text + "\n", encoding="utf-8")


def as_plain(analysis: PathAnalysis) -> dict[str, Any]:
    """Every number, unrounded, except single maps; nan becomes None."""
    similarity, errors, attention = analysis.similarity, analysis.errors, analysis.attention
    score = analysis.contributions.score
    content: dict[str, Any] = {
        "format": FORMAT,
        "num_paths": analysis.num_paths,
        "num_inputs": analysis.num_inputs,
        "notes": analysis.notes,
        "similarity": {
            "cosine": similarity.cosine.tolist(),
            "centred_cosine": similarity.centred_cosine.tolist(),
            "linear_cka": similarity.cka.tolist(),
            "shuffled_linear_cka": similarity.shuffled_cka.tolist(),
            "pairs": similarity.pairs.tolist(),
            "principal_angles": similarity.angles.tolist(),
            "random_principal_angles": similarity.chance_angles.tolist(),
            "effective_rank": similarity.rank.tolist(),
            "joined_effective_rank": similarity.joined_rank,
        },
        "probes": {factor: asdict(result) for factor, result in analysis.probes.items()},
        "attention": attention
        and {
            "groups": list(GROUPS),
            "mass_by_path_and_layer": attention.mass.tolist(),
            **_correlations("patch_correlation", attention.patches),
        },
        "contributions": {
            "mean_change": analysis.contributions.change.mean(dim=(0, 2, 3)).tolist(),
            **_correlations("patch_correlation", analysis.contributions.change),
            **_correlations("score_patch_correlation", () if score is None else score),
        },
        "errors": errors
        and {
            "num_queries": errors.num_queries,
            "jaccard": errors.jaccard.tolist(),
            "kappa": errors.kappa.tolist(),
            "headline": errors.headline,
            "hit_at_1": errors.scores,
            "tasks": errors.tasks,
        },
        "run": analysis.run,
    }
    plain: dict[str, Any] = _without_nan(content)
    return plain


def _paths(analysis: PathAnalysis) -> Section:
    headings, rows = ["path", "effective rank", "mean change without a patch"], []
    if analysis.attention is not None:
        headings += [f"attention to {group}" for group in GROUPS]
    change_N = analysis.contributions.change.mean(dim=(0, 2, 3))
    for path in range(analysis.num_paths):
        row = [str(path), f"{float(analysis.similarity.rank[path]):.1f}", f"{float(change_N[path]):.4f}"]
        if analysis.attention is not None:
            row += [f"{100 * float(share):.1f} %" for share in analysis.attention.mass[path].mean(dim=0)]
        rows.append(row)
    joined = f"The paths side by side have effective rank {analysis.similarity.joined_rank:.1f}"
    return Section(
        "Each path",
        headings,
        rows,
        f"{joined} ({analysis.num_inputs} inputs). Attention is that of the pooled token, mean over layers "
        "and heads.",
    )


def _pairs(analysis: PathAnalysis) -> Section:
    similarity, errors = analysis.similarity, analysis.errors
    columns: dict[str, Any] = {
        "cosine": similarity.cosine,
        "cosine, centred": similarity.centred_cosine,
        "linear CKA": similarity.cka,
        "linear CKA, shuffled": similarity.shuffled_cka,
    }
    if errors is not None:
        columns |= {"misses, Jaccard": errors.jaccard, "misses, kappa": errors.kappa}
    angles = [f"{float(angles_S.mean()):.0f}" for angles_S in similarity.angles]
    rows = [[*row, angle] for row, angle in zip(_pair_rows(analysis, columns), angles, strict=True)]
    chance = float(similarity.chance_angles.mean())
    return Section(
        "Pairs of paths",
        ["paths", *columns, "mean angle"],
        rows,
        "Shuffled: the second path's inputs in another order, so what unrelated paths would have. Mean "
        f"principal angle in degrees between {similarity.angles.shape[1]} leading directions each (random "
        f"subspaces: {chance:.0f}).",
    )


def _maps(analysis: PathAnalysis) -> Section:
    maps = {} if analysis.attention is None else {"attention maps": analysis.attention.patches}
    maps["patch contributions"] = list(analysis.contributions.change)
    columns: dict[str, Any] = {}
    for name, found in maps.items():
        if found:
            columns[name], columns[f"{name}, different pictures"] = agreement(found)
    return Section(
        "Pairs of paths: correlation of their maps over patches",
        ["paths", *columns],
        _pair_rows(analysis, columns),
        "Different pictures: the second path's map is of another picture, mean over all such pairs, so what "
        "does not depend on the picture.",
    )


def _pair_rows(analysis: PathAnalysis, columns: Mapping[str, Any]) -> list[list[str]]:
    """A row per pair of paths, a cell per ``[N, N]``."""
    pairs = analysis.similarity.pairs.tolist()
    return [[f"{i} and {j}", *(f"{float(cells[i][j]):.3f}" for cells in columns.values())] for i, j in pairs]


def _probes(analysis: PathAnalysis) -> Section:
    columns = list(next(iter(analysis.probes.values())).accuracy)
    rows = []
    for factor, result in analysis.probes.items():
        cells = [f"{100 * result.accuracy[c]:.1f} ± {100 * result.spread[c]:.1f}" for c in columns]
        rows.append([factor, str(result.num_values), f"{100 * result.majority:.1f}", *cells])
    inputs = next(iter(analysis.probes.values())).num_inputs
    return Section(
        "Linear probes, accuracy in percent",
        ["factor", "values", "majority", *columns],
        rows,
        f"Mean ± standard deviation over 5 folds of {inputs} scenes.",
    )


def _errors(analysis: PathAnalysis) -> Section:
    errors = analysis.errors
    assert errors is not None
    names = ("best_path", "mean_path", errors.headline, "oracle", "independent_oracle")
    rows = [
        [name, *(f"{100 * values[key]:.1f}" for key in names)]
        for name, values in {**errors.tasks, "mean of tasks": errors.scores}.items()
    ]
    return Section(
        "hit@1 in percent: paths, aggregate, oracle",
        ["task", "best path", "mean path", errors.headline, "oracle", "oracle if independent"],
        rows,
        "The oracle counts a query as right if any path is right. Copies of the best path have its score as "
        "oracle; paths of these scores that miss independently within each task have the last column.",
    )


def _correlations(name: str, maps: Sequence[Tensor] | Tensor) -> dict[str, list[list[float]] | None]:
    """``agreement`` under ``name`` and ``<name>_different_pictures``; None without maps."""
    found = [matrix.tolist() for matrix in agreement(list(maps))] if len(maps) else (None, None)
    return dict(zip((name, f"{name}_different_pictures"), found, strict=True))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
