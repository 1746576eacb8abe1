"""``mteb`` on an embedder, and two small tasks of the embedded world for it, which need no download.

Needs the extra ``mteb``. Elsewhere: the ``SentenceTransformer`` in between
(``sentence_transformers``), the package's own evaluation (``evaluation``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import train_test_split

from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.sentence_transformers import Output, as_sentence_transformer
from parallel_decoupling.world.glyphs import handwritten_digits
from parallel_decoupling.world.rows import caption_to_scene

try:
    import mteb
    from datasets import Dataset, DatasetDict
    from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models import SentenceTransformerEncoderWrapper
except ImportError as error:
    raise ImportError("pip install 'parallel-decoupling[mteb]' (version 2)") from error

NUM_ROWS = 100
PROMPTS = {"query": "Find a picture that matches the caption:", "document": "Represent the given picture"}
"""What the training data of the embedded world asks of captions and pictures."""


def mteb_model(
    model: Embedder | str | Path, paths: Output = "aggregate", *, prompts: Mapping[str, str] | None = None
) -> SentenceTransformerEncoderWrapper:
    """Make a model that ``mteb.evaluate`` takes; of a plain ``SentenceTransformer`` it assumes texts only.

    Args:
        model: an embedder, or an exported folder; see ``as_sentence_transformer`` for a checkpoint.
        paths: a path's number, or ``aggregate``.
        prompts: by ``query``, ``document`` or the name of a task or of its type; None is the model's own.
    """
    wrapped = SentenceTransformerEncoderWrapper(as_sentence_transformer(model, paths, prompts=prompts))
    known = {"name": f"parallel-decoupling/{paths}", "revision": "local", "modalities": ["image", "text"]}
    wrapped.mteb_model_meta = wrapped.mteb_model_meta.model_copy(update=known)
    return wrapped


def evaluate(
    model: SentenceTransformerEncoderWrapper, tasks: Sequence[Any], *, batch_size: int = 32
) -> dict[str, float]:
    """Run tasks without ``mteb``'s cache of results, which knows models by their names alone.

    Args:
        model: from ``mteb_model``.
        tasks: ``world_tasks()``, or what ``mteb.get_tasks`` gives (it downloads their data).
        batch_size: rows per forward pass.

    Returns:
        The main score of every task, by name, in [0, 1].
    """
    options: dict[str, Any] = {"cache": None, "show_progress_bar": False, "co2_tracker": False}
    options["encode_kwargs"] = {"batch_size": batch_size, "show_progress_bar": False}
    result = mteb.evaluate(model, tasks, **options)
    return {each.task_name: float(each.get_score()) for each in result.task_results}


def world_tasks(num_rows: int = NUM_ROWS, seed: int = 0) -> list[Any]:
    """Captions to pictures (nDCG@10) and handwritten digits (accuracy), generated anew.

    Args:
        num_rows: queries of the first, test pictures of the second, 20 to 898.
        seed: of all that is drawn.

    Raises:
        ValueError: too few rows, or too many.
    """
    most = len(handwritten_digits()[0]) // 2
    if not 20 <= num_rows <= most:
        raise ValueError(
            f"num_rows is {num_rows}; two pictures of each of ten digits need 20, and {most} are half "
            "of all digits, whose other half is fitted on"
        )
    return [WorldPictures(num_rows, seed), WorldDigits(num_rows, seed)]


def _metadata(name: str, kind: str, category: str, modalities: list[str], main_score: str) -> Any:
    values: dict[str, Any] = {
        "name": name,
        "type": kind,
        "category": category,
        "modalities": modalities,
        "main_score": main_score,
        "description": "Generated pictures of the embedded world of parallel-decoupling.",
        "dataset": {"path": "generated", "revision": "1"},
        "eval_splits": ["test"],
        "eval_langs": ["eng-Latn"],
    }
    return TaskMetadata(**values)


class WorldPictures(AbsTaskRetrieval):
    """Find the picture of a caption among the pictures of all captions and one near miss of each."""

    metadata = _metadata("WorldPictures", "Any2AnyRetrieval", "t2i", ["text", "image"], "ndcg_at_10")

    def __init__(self, num_rows: int, seed: int, **options: Any) -> None:
        super().__init__(**options)
        self.num_rows, self.data_seed = num_rows, seed

    def load_data(self, num_proc: int | None = None, **options: Any) -> None:
        """Draw captions and pictures; equal captions share their pictures' relevance."""
        rng = np.random.default_rng(self.data_seed)
        rows = [caption_to_scene(rng) for _ in range(self.num_rows)]
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


class WorldDigits(AbsTaskClassification):
    """Name handwritten digits, which no training row shows, by logistic regression on embeddings."""

    metadata = _metadata("WorldDigits", "ImageClassification", "i2c", ["image"], "accuracy")
    input_column_name = "image"
    n_experiments = 3

    def __init__(self, num_rows: int, seed: int, **options: Any) -> None:
        super().__init__(**options)
        self.num_rows, self.data_seed = num_rows, seed

    def load_data(self, num_proc: int | None = None, **options: Any) -> None:
        """Choose test pictures and as many other ones to fit on, of each digit alike."""
        pictures, values = handwritten_digits()
        halves = train_test_split(
            range(len(pictures)),
            train_size=self.num_rows,
            test_size=self.num_rows,
            random_state=self.data_seed,
            stratify=values,
        )
        train, test = (
            Dataset.from_dict({"image": [pictures[n] for n in half], "label": [values[n] for n in half]})
            for half in halves
        )
        self.dataset = DatasetDict({"test": test, "train": train})
        self.data_loaded = True
