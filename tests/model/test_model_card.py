from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCard

from parallel_decoupling.model.model_card import model_card

CONFIG: dict[str, Any] = {
    "backbone": {"name": "owner/model", "sha256": "abc"},
    "backbone_included": False,
    "settings": {"revision": "r1"},
    "paths": [0, 1],
    "embed_dim": 32,
    "aggregate_dim": 32,
    "query_instruction": "find | it",
    "candidate_instruction": "",
    "run": {"model": {"temperature": 0.05}, "rows_by_subset": {"b": 3, "a": 1}, "global_step": 480},
}
SCORES = {"means": {"classification": {"aggregate": 0.75, "path_0": 0.5}}}


def section(card: str, title: str) -> str:
    return card.split(f"\n## {title}")[1].split("\n## ")[0]


def test_sections_come_from_the_run() -> None:
    text = model_card(CONFIG, SCORES)
    assert ModelCard(text).data.library_name == "parallel-decoupling"
    assert "| revision | r1 |" in section(text, "Model")
    assert "| query instruction | find \\| it |" in section(text, "Model")
    assert '| rows seen by subset | {"b": 3, "a": 1} |' in section(text, "Training data")
    assert "| temperature | 0.05 |" in section(text, "Hyper-parameters")
    assert "| main steps | 480 |" in section(text, "Compute")
    assert "| classification | aggregate 75.0, path_0 50.0 |" in section(text, "Scores")


def test_what_is_not_known_is_left_out() -> None:
    card = model_card({**CONFIG, "run": {}})
    assert "not evaluated" in section(card, "Scores")
    for title in ("Training data", "Hyper-parameters", "Compute"):
        assert f"## {title}" not in card
