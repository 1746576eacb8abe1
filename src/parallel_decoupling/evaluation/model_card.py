"""The README.md of an exported model, written from the run that trained it.

Here: the text. Elsewhere: what the run recorded (``training``, ``evaluation.report``), the other files of the
folder (``evaluation.sharing``). What is not known is left out; nothing is assumed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from parallel_decoupling.evaluation.report import MEAN_TITLES, ScoreReport

HEADER = """---
library_name: parallel-decoupling
pipeline_tag: feature-extraction
tags:
- sentence-transformers
- multimodal
- embeddings
---
"""
USAGE = """```python
from parallel_decoupling import Embedder

model = Embedder.from_pretrained("path/to/this/folder")
queries = model.encode_query(["a red circle"], paths="aggregate")
candidates = model.encode_candidate([{"image": "picture.png"}], paths="aggregate")
model.similarity(queries, candidates)
```

`paths` is `"aggregate"`, `"all"`, a number (the cost of the plain backbone) or a list of numbers.
"""
INTENDED = """Embeddings of texts, images and both for search, ranking, clustering and classification by
nearest neighbour, with inputs like those that it was trained on. Not for decisions about people, and not as
the only judge of what a picture shows.
"""
LIMITS = (
    "It knows what its backbone and the training data above hold, with their gaps and biases.",
    "Scores are of the tasks above; other data needs an evaluation of its own.",
    "Embeddings of different paths, or of another export, are not comparable with each other.",
)


def model_card(config: Mapping[str, Any], report: ScoreReport | None = None) -> str:
    """Write the card as Markdown.

    Args:
        config: of ``model.pretrained``, with ``run``, ``query_instruction`` and ``candidate_instruction``.
        report: scores of all paths of the training run; paths are numbered as there.

    Returns:
        The whole file. Sections: use, model, training data, hyper-parameters, compute, scores, paths,
        intended use, limits.
    """
    run = config["run"]
    sections = [
        ("Use", [USAGE]),
        ("Model", _model(config)),
        ("Training data", _data(run)),
        ("Hyper-parameters", _hyper_parameters(run)),
        ("Compute", _compute(run)),
        ("Scores", _scores(report)),
        ("Paths", _paths(config["paths"], report)),
        ("Intended use", [INTENDED]),
        ("Limits", [f"- {limit}" for limit in (*LIMITS, *_own_limits(config, report))]),
    ]
    name = _cell(str(config["backbone"]["fingerprint"]["name"]).rstrip("/").rsplit("/", 1)[-1])
    count = len(config["paths"])
    title = f"# {count} {'paths' if count > 1 else 'path'} of {name}"
    text = "\n\n".join(f"## {title}\n\n" + "\n".join(lines).strip() for title, lines in sections if lines)
    return (
        f"{HEADER}\n{title}\n\nMultimodal embeddings by parallel decoupling (arXiv 2511.01588).\n\n{text}\n"
    )


def _model(config: Mapping[str, Any]) -> list[str]:
    backbone, encoder = config["backbone"], config["encoder"]
    rows = {
        "backbone": backbone["fingerprint"]["name"],
        "revision": backbone.get("revision"),
        "backbone's sha256": backbone["fingerprint"]["sha256"],
        "backbone in this folder": "yes" if backbone["included"] else "no, referred to",
        "dtype": backbone["dtype"],
        "adapter": _adapter(config["adapter"]),
        "paths (numbers in the training run)": ", ".join(map(str, config["paths"])),
        "embedding": f"{config['embed_dim']} numbers per path, {config['aggregate_dim']} of the aggregate",
        "query instruction": config["query_instruction"],
        "candidate instruction": config["candidate_instruction"],
    }
    return _table(("", ""), [*rows.items(), *encoder.items()])


def _adapter(adapter: Mapping[str, Any]) -> str:
    if adapter["kind"] not in ("lora", "dora"):
        return str(adapter["kind"])
    return f"{adapter['kind']}, rank {adapter['rank']}, alpha {adapter['alpha']}, {adapter['scope']}"


def _data(run: Mapping[str, Any]) -> list[str]:
    lines = _table(("setting", "value"), run.get("data", {}).items())
    rows = run.get("rows_by_subset", {})
    if not rows:
        return lines
    total = sum(rows.values())
    mixture = [(name, f"{count} ({count / total:.1%})") for name, count in sorted(rows.items())]
    return [*lines, "", "Rows seen:", "", *_table(("subset", "rows"), mixture)]


def _hyper_parameters(run: Mapping[str, Any]) -> list[str]:
    return _table(("setting", "value"), run.get("model", {}).items())


def _compute(run: Mapping[str, Any]) -> list[str]:
    rows = {
        "main steps": run.get("global_step"),
        "token passes (tokens times paths through all layers)": run.get("token_passes"),
        "seed": run.get("seed"),
        "commit": run.get("commit"),
    }
    return _table(("", ""), rows.items())


def _scores(report: ScoreReport | None) -> list[str]:
    if report is None:
        return ["Not evaluated."]
    rows = [
        (MEAN_TITLES[name], *(f"{100 * mean[column]:.1f}" for column in report.columns))
        for name, mean in report.means.items()
    ]
    queries = sum(result.num_queries for result in report.tasks.values())
    about = f"hit@1 in percent over {len(report.tasks)} tasks with {queries} queries, all paths of the run."
    return [about, "", *_table(("", *report.columns), rows)]


def _paths(paths: Sequence[int], report: ScoreReport | None) -> list[str]:
    """Agreement of every two exported paths, and what at least one of them answers."""
    columns = [f"path_{path}" for path in paths]
    hits = [] if report is None else [result.hits for result in report.tasks.values()]
    if len(paths) < 2 or not all(set(columns) <= each.keys() for each in hits) or not hits:
        return []
    joined = {column: "".join(each[column] for each in hits) for column in columns}
    rows = [
        (f"{first} and {second}", f"{100 * _share(x == y for x, y in _zip(joined, first, second)):.1f}")
        for first, second in combinations(columns, 2)
    ]
    some = _share("1" in answers for answers in zip(*joined.values(), strict=True))
    lines = ["Share of evaluation queries in percent on which two paths are both right or both wrong.", ""]
    return [*lines, *_table(("paths", "agree"), rows), "", f"Right on at least one path: {100 * some:.1f}."]


def _zip(joined: Mapping[str, str], first: str, second: str) -> Iterable[tuple[str, str]]:
    return zip(joined[first], joined[second], strict=True)


def _share(answers: Iterable[bool]) -> float:
    values = list(answers)
    return sum(values) / len(values)


def _own_limits(config: Mapping[str, Any], report: ScoreReport | None) -> list[str]:
    limits = []
    backbone = config["backbone"]
    if not backbone["included"]:
        limits.append(f"It needs the backbone {backbone['name']} on the machine that loads it.")
    if backbone["fingerprint"]["name"] == "tiny":
        limits.append(
            "The tiny backbone knows small generated scenes only, no photographs and little language."
        )
    if report is None:
        limits.append("No scores were recorded for these weights.")
    return limits


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A Markdown table; rows whose last cell is None or empty are left out, no rows are no table."""
    cells = [[_cell(value) for value in row] for row in rows if row[-1] is not None and row[-1] != ""]
    if not cells:
        return []
    lines = [[_cell(value) for value in head], ["---"] * len(head), *cells]
    return [f"| {' | '.join(line)} |" for line in lines]


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")
