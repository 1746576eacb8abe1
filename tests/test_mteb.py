"""The real ``mteb`` on a small task of the embedded world, no download."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mteb", minversion="2")

import mteb
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from PIL import Image

from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.sentence_transformers import mteb_model
from parallel_decoupling.world.rows import caption_to_scene
from tests.support.embedders import tiny_embedder

pytestmark = pytest.mark.slow

PROMPTS = {"query": "Find a picture that matches the caption:", "document": "Represent the given picture"}


class WorldPictures(AbsTaskRetrieval):
    """Find the picture of a caption among the pictures of all captions and one near miss of each."""

    metadata = TaskMetadata(
        name="WorldPictures",
        type="Any2AnyRetrieval",
        category="t2i",
        modalities=["text", "image"],
        main_score="ndcg_at_10",
        description="Generated pictures.",
        dataset={"path": "generated", "revision": "1"},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
    )

    def load_data(self, num_proc: int | None = None, **options: Any) -> None:
        rng = np.random.default_rng(0)
        rows = [caption_to_scene(rng) for _ in range(20)]
        sides = [side for row in rows for side in (row.positive, row.negatives[0])]
        captions = [row.query.text.split(": ", 1)[1].strip() for row in rows]
        relevant: dict[str, dict[str, int]] = {}
        for number, row in enumerate(rows):
            same = [place for place, side in enumerate(sides) if side.meaning == row.positive.meaning]
            relevant[f"q{number}"] = {f"d{place}": 1 for place in same}
        ids = [f"d{place}" for place in range(len(sides))]
        corpus = Dataset.from_dict({"id": ids, "image": [side.picture for side in sides]})
        queries = Dataset.from_dict({"id": list(relevant), "text": captions})
        split = RetrievalSplitData(corpus=corpus, queries=queries, relevant_docs=relevant, top_ranked=None)
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


def evaluate(model: Any, tasks: list[Any], cache: Any = None) -> Any:
    """Without a cache of results, unless one is given."""
    options: dict[str, Any] = {"cache": cache, "show_progress_bar": False, "co2_tracker": False}
    options["encode_kwargs"] = {"show_progress_bar": False}
    return {each.task_name: each for each in mteb.evaluate(model, tasks, **options).task_results}


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return tiny_embedder("tiny")


@pytest.fixture
def tasks() -> list[Any]:
    return [WorldPictures()]


def test_scores_of_an_exported_folder_and_of_one_path(
    tasks: list[Any], embedder: Embedder, tmp_path: Path
) -> None:
    embedder.save_pretrained(tmp_path / "model")
    scores, exported, one_path = (
        {name: result.get_score() for name, result in evaluate(model, tasks).items()}
        for model in (
            mteb_model(embedder, prompts=PROMPTS),
            mteb_model(tmp_path / "model", prompts=PROMPTS),
            mteb_model(embedder, 1, prompts=PROMPTS),
        )
    )
    assert scores.keys() == {"WorldPictures"}
    assert all(0 <= score <= 1 for score in scores.values())
    assert scores == exported != one_path


def test_another_model_is_not_given_the_kept_scores_of_the_first(tasks: list[Any], tmp_path: Path) -> None:
    from mteb.cache import ResultCache

    first, other = tiny_embedder("tiny"), tiny_embedder("tiny")
    with torch.no_grad():
        other.encoder.parameter_groups()["prefixes"][0].add_(0.5)
    revisions = [
        mteb_model(first).mteb_model_meta.revision,
        mteb_model(first, 0).mteb_model_meta.revision,
        mteb_model(first, prompts=PROMPTS).mteb_model_meta.revision,
        mteb_model(other).mteb_model_meta.revision,
        mteb_model(Embedder(first.encoder)).mteb_model_meta.revision,
        mteb_model(Embedder(first.encoder, max_tokens=9)).mteb_model_meta.revision,
    ]
    assert len(set(revisions)) == 6
    assert mteb_model(tiny_embedder("tiny")).mteb_model_meta.revision == revisions[0]
    cache = ResultCache(tmp_path)
    alone = [evaluate(mteb_model(model), tasks)["WorldPictures"].get_score() for model in (first, other)]
    kept = [
        evaluate(mteb_model(model), tasks, cache)["WorldPictures"].get_score() for model in (first, other)
    ]
    assert kept == alone
    assert alone[0] != alone[1]


def test_a_bad_input_is_named_by_its_place_in_the_corpus_or_gets_a_stand_in(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures come in batches; mteb's loader gives them one by one here."""
    task = WorldPictures()
    task.load_data()
    split = task.dataset["default"]["test"]
    broken = [dict(row) for row in split["corpus"]]
    broken[7]["image"] = Image.new("RGB", (2000, 2))
    split["corpus"] = Dataset.from_dict({name: [row[name] for row in broken] for name in ("id", "image")})
    monkeypatch.setattr(WorldPictures, "load_data", lambda self, **_: vars(self).update(vars(task)))
    with pytest.raises(ValueError, match=r"^input 7: .*aspect ratio"):
        evaluate(mteb_model(embedder, prompts=PROMPTS), [WorldPictures()])
    going = mteb_model(embedder, prompts=PROMPTS, bad_inputs="stand_in")
    assert evaluate(going, [WorldPictures()]).keys() == {"WorldPictures"}
    assert going.model[0].num_stand_ins == 1


@pytest.mark.filterwarnings("ignore:Task name")
def test_prompts_that_mteb_would_ignore_are_refused(embedder: Embedder) -> None:
    with pytest.raises(ValueError, match="mteb would ignore some prompts.*qurey"):
        mteb_model(embedder, prompts={"qurey": "find"})


def test_registered_under_a_name(embedder: Embedder) -> None:
    model = mteb_model(embedder, 1, name="me/model-path-1")
    meta = mteb.get_model_meta("me/model-path-1")
    assert meta.revision == mteb_model(embedder, 1).mteb_model_meta.revision
    assert meta.modalities == ["image", "text"]
    assert mteb.get_model("me/model-path-1").model is model.model
