"""The model card of an exported folder. What is not known is left out; nothing is assumed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

CARD = """---
library_name: parallel-decoupling
pipeline_tag: feature-extraction
tags:
- sentence-transformers
- multimodal
- embeddings
---

# {title}

Multimodal embeddings by parallel decoupling (arXiv 2511.01588).

## Use

```python
from parallel_decoupling import Embedder

model = Embedder.from_pretrained("path/to/this/folder")
queries = model.encode_query(["a red circle"])
candidates = model.encode_document([{{"image": "picture.png"}}])
model.similarity(queries, candidates)
```

`paths` of these methods is `"aggregate"` (the default), `"all"`, a number (the cost of the plain backbone) or
a list of numbers.

{sections}

## Intended use

Embeddings of texts, images and both for search, ranking, clustering and classification by nearest neighbour,
with inputs like those that it was trained on. Not for decisions about people, and not as the only judge of
what a picture shows.

## Limits

- It knows what its backbone and the training data above hold, with their gaps and biases.
- Scores are of the tasks above; other data needs an evaluation of its own.
- Embeddings of different paths, or of another export, are not comparable with each other.
{limits}"""


def model_card(config: Mapping[str, Any], scores: Mapping[str, Any] | None = None) -> str:
    """Write the card as Markdown.

    Args:
        config: content of ``config.json``.
        scores: content of the training run's ``scores.json``; paths are numbered as there.
    """
    run, name = config["run"], str(config["backbone"]["name"])
    limits = []
    if not config["backbone_included"]:
        limits.append(f"It needs the backbone {name} on the machine that loads it.")
    if name == "tiny":
        limits.append("The tiny backbone knows small generated scenes, no photographs and little language.")
    if scores is None:
        limits.append("No scores were recorded for these weights.")
    compute = {
        "main steps": run.get("global_step"),
        "token passes (tokens times paths through all layers)": run.get("token_passes"),
        "seed": run.get("seed"),
        "commit": run.get("commit"),
    }
    sections = {
        "Model": _model(config),
        "Training data": [*_table(run.get("data", {}).items()), *_mixture(run.get("rows_by_subset", {}))],
        "Hyper-parameters": _table(run.get("model", {}).items()),
        "Compute": _table(compute.items()),
        "Scores": ["Not evaluated."] if scores is None else _scores(scores),
    }
    count = len(config["paths"])
    return CARD.format(
        title=_cell(f"{count} {'paths' if count > 1 else 'path'} of {name.rstrip('/').rsplit('/', 1)[-1]}"),
        sections="\n\n".join(
            f"## {title}\n\n" + "\n".join(lines) for title, lines in sections.items() if lines
        ),
        limits="".join(f"- {limit}\n" for limit in limits),
    )


def _model(config: Mapping[str, Any]) -> list[str]:
    rows = {
        **config["settings"],
        "backbone": config["backbone"]["name"],
        "backbone's sha256": config["backbone"]["sha256"],
        "backbone in this folder": "yes" if config["backbone_included"] else "no, referred to",
        "paths (numbers in the training run)": ", ".join(map(str, config["paths"])),
        "embedding": f"{config['embed_dim']} numbers per path, {config['aggregate_dim']} of the aggregate",
        "query instruction": config["query_instruction"],
        "candidate instruction": config["candidate_instruction"],
    }
    return _table(rows.items())


def _mixture(rows: Mapping[str, int]) -> list[str]:
    total = sum(rows.values())
    shares = [(name, f"{count} ({count / total:.1%})") for name, count in sorted(rows.items())]
    return ["", "Rows seen:", "", *_table(shares, ("subset", "rows"))] if rows else []


def _scores(scores: Mapping[str, Any]) -> list[str]:
    means, tasks = scores["means"], scores["tasks"].values()
    columns = list(next(iter(means.values())))
    rows = [
        (group.replace("_", " "), *(f"{100 * mean[column]:.1f}" for column in columns))
        for group, mean in means.items()
    ]
    queries = sum(task["num_queries"] for task in tasks)
    about = f"hit@1 in percent, means over {len(tasks)} tasks with {queries} queries, all paths of the run."
    return [about, "", *_table(rows, ("", *columns))]


def _table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ("setting", "value")) -> list[str]:
    """Return a Markdown table without the rows whose last cell is None or empty; nothing without rows."""
    cells = [list(map(_cell, row)) for row in rows if row[-1] is not None and row[-1] != ""]
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *cells)] if cells else []


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")
