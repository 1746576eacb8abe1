"""The model card of an exported folder. What is not known is left out; nothing is assumed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from parallel_decoupling.model.locations import HUB_ID

TEMPLATE = Path(__file__).with_suffix(".md")


def model_card(
    config: Mapping[str, Any], scores: Mapping[str, Any] | None = None, head: Mapping[str, Any] | None = None
) -> str:
    """Write the card as Markdown from ``config.json``, a run's ``scores.json`` and more for its head."""
    if scores is not None and "means" not in scores:
        raise ValueError(f"scores must be the content of a run's scores.json, got the keys {list(scores)}")
    run, name, included = config["run"], str(config["backbone"]["name"]), config["backbone_included"]
    about = {
        "backbone": name,
        "backbone's sha256": config["backbone"]["sha256"],
        "backbone in this folder": "yes" if included else "no: it must be where the model is loaded",
        "paths (numbers in the training run)": config["paths"],
        "embedding": f"{config['embed_dim']} numbers per path, {config['aggregate_dim']} of the aggregate",
        "query instruction": config["query_instruction"],
        "candidate instruction": config["candidate_instruction"],
    }
    data = {**run.get("data", {}), "rows seen by subset": run.get("rows_by_subset")}
    compute = {
        "main steps": run.get("global_step"),
        "token passes (tokens times paths through all layers)": run.get("token_passes"),
        "seed": run.get("seed"),
        "commit": run.get("commit"),
    }
    means = {
        group.replace("_", " "): ", ".join(f"{column} {100 * mean:.1f}" for column, mean in columns.items())
        for group, columns in (scores or {"means": {}})["means"].items()
    }
    sections = {
        "Model": {**config["settings"], **about},
        "Training data": data,
        "Hyper-parameters": run.get("model", {}),
        "Compute": compute,
        "Scores (hit@1 in percent, means over tasks)": means or {"all": "not evaluated"},
    }
    count = len(config["paths"])
    title = f"{count} {'paths' if count > 1 else 'path'} of {name.rstrip('/').rsplit('/', 1)[-1]}"
    tags = ["sentence-transformers", "multimodal", "embeddings"]
    named: dict[str, Any] = {"library_name": "parallel-decoupling", "tags": tags, "model_name": title}
    named |= {"pipeline_tag": "feature-extraction", "eval_results": _results(config, scores)}
    named["base_model"] = name if HUB_ID.fullmatch(name) else None
    card = ModelCardData(**{**named, **(head or {})})
    tables = {section: _table(rows) for section, rows in sections.items()}
    shown = "\n\n".join(f"## {section}\n\n{table}" for section, table in tables.items() if table)
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.format(metadata=card.to_yaml(), title=_cell(title), sections=shown)


def _results(config: Mapping[str, Any], scores: Mapping[str, Any] | None) -> list[EvalResult] | None:
    """Return every task's score of the one path or, unless some paths were left out, of the aggregate."""
    paths, results = config["paths"], []
    every = len(paths) == config["run"].get("model", {}).get("num_paths", len(paths))
    column = f"path_{paths[0]}" if len(paths) == 1 else "aggregate" if every else ""
    for name, row in (scores or {}).get("tasks", {}).items():
        metric = row.get("metric", "hit@1")
        values = {"hit@1": row["hit_at_1"].get(column), **row.get("metrics", {}).get(column, {})}
        if values.get(metric) is not None:
            about: dict[str, Any] = {"dataset_type": name, "dataset_name": name, "metric_type": metric}
            results.append(EvalResult(task_type="retrieval", metric_value=values[metric], **about))
    return results or None


def _table(rows: Mapping[str, Any]) -> str:
    """Return a Markdown table of what is known; empty without rows."""
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value not in (None, "", {})]
    return "\n".join(["| | |", "| --- | --- |", *lines]) if lines else ""


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")
