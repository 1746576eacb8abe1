from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import ModelCard

from parallel_decoupling.model.model_card import model_card

HITS = {"aggregate": "1110", "path_0": "1100", "path_1": "1010"}


@pytest.fixture
def config() -> dict[str, Any]:
    return {
        "backbone": {"name": "owner/model", "sha256": "abc"},
        "backbone_included": False,
        "settings": {"revision": "r1", "dtype": "float32", "prefix_length": 3},
        "paths": [0, 1],
        "embed_dim": 32,
        "aggregate_dim": 32,
        "query_instruction": "find | it",
        "candidate_instruction": "",
        "run": {
            "model": {"temperature": 0.05},
            "data": {"batch_size": 48},
            "rows_by_subset": {"b": 3, "a": 1},
            "global_step": 480,
            "token_passes": 99.0,
            "seed": 5,
        },
    }


@pytest.fixture
def scores() -> dict[str, Any]:
    """As ``scores.json`` holds them."""
    hit_at_1 = {column: hits.count("1") / 4 for column, hits in HITS.items()}
    means = {"classification": hit_at_1, "mean_of_meta_tasks": hit_at_1}
    return {"means": means, "tasks": {"Sign": {"num_queries": 4}}}


def section(card: str, title: str) -> str:
    return card.split(f"\n## {title}")[1].split("\n## ")[0]


def test_sections_come_from_the_run(config: dict[str, Any], scores: dict[str, Any]) -> None:
    text = model_card(config, scores)
    assert ModelCard(text).data.library_name == "parallel-decoupling"
    assert "| revision | r1 |" in section(text, "Model")
    assert "| query instruction | find \\| it |" in section(text, "Model")
    assert "| backbone | owner/model |" in section(text, "Model")
    assert "candidate instruction" not in text, "there is none"
    assert "| batch_size | 48 |" in section(text, "Training data")
    assert '| rows seen by subset | {"b": 3, "a": 1} |' in section(text, "Training data")
    assert "| temperature | 0.05 |" in section(text, "Hyper-parameters")
    assert "| main steps | 480 |" in section(text, "Compute")
    assert "| classification | aggregate 75.0, path_0 50.0, path_1 50.0 |" in section(text, "Scores")


def test_what_is_not_known_is_left_out(config: dict[str, Any]) -> None:
    card = model_card({**config, "run": {}})
    assert "not evaluated" in section(card, "Scores")
    for title in ("Training data", "Hyper-parameters", "Compute"):
        assert f"## {title}" not in card
