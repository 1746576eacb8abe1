"""The real ``mteb`` on generated data, no download."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mteb", minversion="2")

import mteb

from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.mteb import PROMPTS, evaluate, mteb_model, world_tasks
from parallel_decoupling.world.glyphs import handwritten_digits
from tests.support.embedders import tiny_embedder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return tiny_embedder("tiny")


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("no network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(f"socket.socket.{name}", refuse)
    return world_tasks(20)


def test_both_tasks_and_any_path(tasks: list[Any], embedder: Embedder, tmp_path: Path) -> None:
    """Scores of an exported folder equal those of the embedder; another path has others."""
    embedder.save_pretrained(tmp_path / "model")
    scores = evaluate(mteb_model(embedder, prompts=PROMPTS), tasks)
    assert scores.keys() == {"WorldPictures", "WorldDigits"}
    assert all(0 <= score <= 1 for score in scores.values())
    assert evaluate(mteb_model(tmp_path / "model", prompts=PROMPTS), tasks) == scores
    assert evaluate(mteb_model(embedder, 1, prompts=PROMPTS), tasks) != scores


def test_retrieval_score_against_our_own_ranks(tasks: list[Any], embedder: Embedder) -> None:
    pictures = tasks[0]
    (result,) = mteb.evaluate(
        mteb_model(embedder, prompts=PROMPTS), [pictures], cache=None, show_progress_bar=False
    ).task_results
    pictures.load_data()
    split = pictures.dataset["default"]["test"]
    query = embedder.encode(list(split["queries"]["text"]), instruction=PROMPTS["query"], paths="aggregate")
    candidate = embedder.encode(
        list(split["corpus"]["image"]), instruction=PROMPTS["document"], paths="aggregate"
    )
    ids = split["corpus"]["id"]
    best = [ids[place] for place in embedder.similarity(query, candidate).argmax(dim=1).tolist()]
    hits = [best[n] in split["relevant_docs"][query_id] for n, query_id in enumerate(split["queries"]["id"])]
    assert result.scores["test"][0]["hit_rate_at_1"] == pytest.approx(sum(hits) / len(hits), abs=1e-4)
    assert torch.isfinite(query).all()


def test_digits_that_are_scored_are_not_fitted_on() -> None:
    digits = world_tasks(300)[1]
    digits.load_data()
    halves = [digits.dataset[name] for name in ("train", "test")]
    train, test = ({image.tobytes() for image in half["image"]} for half in halves)
    assert len(train) == len(test) == 300
    assert not train & test
    counts = Counter(halves[1]["label"])
    assert counts.keys() == set(range(10))
    assert max(counts.values()) - min(counts.values()) <= 2
    pictures, values = handwritten_digits()
    value_of = dict(zip((picture.tobytes() for picture in pictures), values, strict=True))
    found = [value_of[image.tobytes()] for image in halves[0]["image"]]
    assert found == list(halves[0]["label"])


@pytest.mark.parametrize("num_rows", [5, 899])
def test_too_few_and_too_many_rows(num_rows: int) -> None:
    with pytest.raises(ValueError, match=f"num_rows is {num_rows}"):
        world_tasks(num_rows)
