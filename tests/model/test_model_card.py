from __future__ import annotations

from typing import Any

import pytest

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
    return card.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_sections_come_from_the_run(config: dict[str, Any], scores: dict[str, Any]) -> None:
    card = model_card(config, scores)
    assert card.startswith("---\nlibrary_name: parallel-decoupling\n")
    assert "| revision | r1 |" in section(card, "Model")
    assert "| query instruction | find \\| it |" in section(card, "Model")
    assert "candidate instruction" not in card, "there is none"
    assert "| batch_size | 48 |" in section(card, "Training data")
    assert "| a | 1 (25.0%) |\n| b | 3 (75.0%) |" in section(card, "Training data")
    assert "| temperature | 0.05 |" in section(card, "Hyper-parameters")
    assert "| main steps | 480 |" in section(card, "Compute")
    assert "| classification | 75.0 | 50.0 | 50.0 |" in section(card, "Scores")
    assert "search" in section(card, "Intended use")
    assert "It needs the backbone owner/model" in section(card, "Limits")


def test_what_is_not_known_is_left_out(config: dict[str, Any]) -> None:
    card = model_card({**config, "run": {}})
    assert "Not evaluated." in section(card, "Scores")
    assert "No scores were recorded" in section(card, "Limits")
    for title in ("Training data", "Hyper-parameters", "Compute"):
        assert f"## {title}" not in card
