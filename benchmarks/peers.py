"""Other libraries on the same backbone, batch and data: run as ``python -m benchmarks.peers``.

Training: a GradCache step of text pairs (embeddings, InfoNCE, gradients, AdamW) with LoRA and with all
weights, against sentence-transformers' ``CachedMultipleNegativesRankingLoss``; both get tensors, and their
losses are printed. Evaluation of a task in MMEB's layout, from the tables to its score, against

- VLM2Vec's loop, written anew after its ``eval.py`` and ``src/model/processor.py`` (github.com/TIGER-AI-Lab/
  VLM2Vec, commits 1640113 and 1e402c4): unique rows in no order, each through the processor by itself, padded
  to the longest of a batch, through the model with its language-model head, kept as pickles, scored by row;
- the same loop without the head, which the embeddings do not need;
- sentence-transformers' ``encode`` of the unique rows: its own modules on the backbone's folder for texts;
  this package's module for pictures with texts, which its own refuse for this model.

``predict`` is compared with ``encode`` of a list as well. Contenders take turns; a line is the median over
the rounds of the other's processor time over ours and its smallest and largest; more than 1 is in favour of
this package. The floor of an evaluation is what its forward passes alone take in it.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import random
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning.pytorch import Trainer
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText

from benchmarks.measure import forward_seconds, report, rounds_of
from parallel_decoupling.batch import IMAGE_PLACEHOLDER, EncoderInputs
from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.evaluation.run import EmbeddingWriter, Scoring
from parallel_decoupling.evaluation.store import Keeper
from parallel_decoupling.model.adapters import add_adapters
from parallel_decoupling.model.backbone import TINY_BACKBONE_DIR
from parallel_decoupling.objective.contrastive import info_nce
from parallel_decoupling.sentence_transformers import as_sentence_transformer
from parallel_decoupling.training.grad_cache import encode_in_chunks
from parallel_decoupling.training.module import PDFEmbedder
from parallel_decoupling.world.benchmark import ensure_benchmark

ONE_PATH: dict[str, Any] = {"num_paths": 1, "prefix_length": 0, "aggregate_weight": 0.0, "mi_weight": 0.0}
WORDS = ("a", "the", "red", "blue", "small", "large", "circle", "square", "star", "left", "right", "of")
PAIRS, CHUNK, TEMPERATURE, BATCH = 128, 32, 0.05, 64
SHORT = "Short_texts"
TASKS = ("Scene_t2i", SHORT)
Tensors = dict[str, torch.Tensor]


def texts(count: int, longest: int, seed: int) -> list[str]:
    """Return texts of 3 to ``longest`` words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, longest))) for _ in range(count)]


def embedder(kind: str) -> PDFEmbedder:
    """Return the tiny backbone alone: one path without a prefix."""
    return PDFEmbedder("tiny", adapter={"kind": kind}, mi={"kind": "none"}, **ONE_PATH)


def stock() -> SentenceTransformer:
    """Return the same backbone in sentence-transformers' own modules."""
    transformer = Transformer(str(TINY_BACKBONE_DIR), model_kwargs={"dtype": "float32"})
    width = transformer.get_embedding_dimension()
    return SentenceTransformer(modules=[transformer, Pooling(width, "lasttoken"), Normalize()], device="cpu")


def training_steps(kind: str) -> dict[str, Callable[[], float]]:
    """Return a GradCache step of both, on the same tensors; each gives its loss."""
    ours, theirs = embedder(kind), stock()
    add_adapters(theirs[0].auto_model, ours.encoder.backbone.family, ours.encoder.backbone.adapter)
    theirs.train()
    rows = [texts(PAIRS, 60, seed) for seed in (0, 1)]
    queries, candidates, both = (
        dict(ours.encoder.processor(text=text, padding=True, return_tensors="pt"))
        for text in (*rows, [*rows[0], *rows[1]])
    )
    inputs, own = EncoderInputs(both, ({},) * (2 * PAIRS)), torch.arange(PAIRS)
    loss = CachedMultipleNegativesRankingLoss(theirs, scale=1 / TEMPERATURE, mini_batch_size=CHUNK)
    optimizers = [
        torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
        for model in (ours.encoder, theirs)
    ]

    def step() -> float:
        encoding = encode_in_chunks(ours.encoder, inputs, chunk_size=CHUNK, seed_parts=(0,))
        query, candidate = encoding.embeddings.split(PAIRS)
        value = info_nce(query, candidate, positive=own, candidate_ids=own, temperature=TEMPERATURE).mean()
        value.backward()
        encoding.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        return value.item()

    def peer_step() -> float:
        value = loss([{**queries}, {**candidates}], torch.arange(PAIRS))
        value.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        return float(value)

    return {"ours": step, "sentence-transformers": peer_step}


def save_short_task(folder: Path) -> None:
    """Write a task of short texts in MMEB's layout: 500 queries among ten candidates each."""
    queries, pool = texts(500, 12, 2), texts(500, 12, 3)
    rng, rows = random.Random(4), {"qry_text": queries, "qry_img_path": [""] * 500}
    candidates = [rng.sample(pool, 10) for _ in queries]
    columns = {**rows, "tgt_text": candidates, "tgt_img_path": [[""] * 10 for _ in queries]}
    file = folder / "MMEB-eval" / SHORT / "test-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    pq.write_table(pa.table(columns), file)


def trainer(folder: str, callback: Any) -> Trainer:
    """Return a quiet trainer."""
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    return Trainer(**options, callbacks=[callback], **dict.fromkeys(quiet, False))


def our_test(module: PDFEmbedder, data_dir: Path, task: str) -> float:
    """Run ``test`` on one task, files included; return hit@1."""
    with tempfile.TemporaryDirectory() as folder:
        data = MMEBDataModule(str(data_dir), eval_tasks=[task], eval_batch_size=BATCH)
        data.connect(module)
        scoring = Scoring(data)
        trainer(folder, scoring).test(module, data, verbose=False)
        assert scoring.report is not None
        return scoring.report.tasks[task].hit_at_1["aggregate"]


def read_task(data_dir: Path, task: str) -> tuple[list[dict[str, Any]], list[list[tuple[str, str]]]]:
    """Return the rows of a task, and the unique inputs of both sides as text and file."""
    rows = pq.read_table(next((data_dir / "MMEB-eval" / task).glob("test-*.parquet"))).to_pylist()
    queries = {(row["qry_text"], row["qry_img_path"]) for row in rows}
    candidates = {pair for row in rows for pair in zip(row["tgt_text"], row["tgt_img_path"], strict=True)}
    return rows, [list(queries), list(candidates)]


def read_image(data_dir: Path, file: str) -> Image.Image | None:
    """Open a picture, if the row has one."""
    return Image.open(data_dir / "MMEB-eval" / file).convert("RGB") if file else None


def vlm2vec(model: Any, processor: Any, data_dir: Path, task: str) -> float:
    """Encode and score a task in the order of VLM2Vec's scripts; return hit@1."""
    rows, sides = read_task(data_dir, task)

    def collate(pairs: list[tuple[str, str]]) -> Tensors:
        each = []
        for text, file in pairs:
            image = read_image(data_dir, file)
            text = text.replace(IMAGE_PLACEHOLDER, processor.image_token)
            images = None if image is None else [image]
            each.append(processor(text=[text], images=images, return_tensors="pt"))
        ids = {"input_ids": [one["input_ids"][0].tolist() for one in each]}
        batch = dict(processor.tokenizer.pad(ids, return_tensors="pt"))
        for name in ("pixel_values", "image_grid_thw"):
            if parts := [one[name] for one in each if name in one]:
                batch[name] = torch.cat(parts)
        kinds = batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        return {**batch, "mm_token_type_ids": kinds.long()}

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, side) for side in ("qry", "tgt")]
        for file, pairs in zip(files, sides, strict=True):
            found = []
            with torch.no_grad():
                for batch in DataLoader(pairs, BATCH, collate_fn=collate):  # type: ignore[arg-type]
                    states = model(**batch, return_dict=True, output_hidden_states=True).hidden_states[-1]
                    found.append(torch.nn.functional.normalize(states[:, -1], dim=-1).float().numpy())
            file.write_bytes(pickle.dumps((np.concatenate(found), pairs)))
        both = [dict(zip(pairs, vectors, strict=True)) for vectors, pairs in map(_unpickle, files)]
        return score_rows(rows, *both)


def _unpickle(file: Path) -> Any:
    return [*pickle.loads(file.read_bytes())]


def score_rows(
    rows: list[dict[str, Any]], queries: Mapping[Any, Any], candidates: Mapping[Any, Any]
) -> float:
    """Return hit@1, row by row."""
    hits = 0
    for row in rows:
        pairs = zip(row["tgt_text"], row["tgt_img_path"], strict=True)
        scores = (
            np.stack([candidates[pair] for pair in pairs]) @ queries[row["qry_text"], row["qry_img_path"]]
        )
        hits += int(scores.argmax()) == 0
    return hits / len(rows)


def sentence_transformers(model: SentenceTransformer, data_dir: Path, task: str) -> float:
    """Encode the unique rows and score them; return hit@1."""
    rows, sides = read_task(data_dir, task)
    both = []
    for pairs in sides:
        inputs: list[Any] = []
        for text, file in pairs:
            image = read_image(data_dir, file)
            told = text.replace(f"{IMAGE_PLACEHOLDER}\n", "")
            inputs.append(text if image is None else {"text": told, "image": image})
        both.append(dict(zip(pairs, model.encode(inputs, batch_size=BATCH), strict=True)))
    return score_rows(rows, *both)


def our_predict(module: PDFEmbedder, table_file: Path) -> None:
    """Run ``predict``, from a table to the files of embeddings."""
    with tempfile.TemporaryDirectory() as folder:
        data = MMEBDataModule(predict_source=str(table_file), eval_batch_size=BATCH)
        keeper = Keeper(folder, module.about)
        data.connect(module, keeper)
        trainer(folder, EmbeddingWriter(data, keeper)).predict(module, data, return_predictions=False)


def main() -> None:
    """Measure and print all ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("train", "test", "predict"), help="one part")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    parts = {"train": print_training, "test": print_evaluation, "predict": print_predict}
    for name, part in parts.items():
        if options.only in (None, name):
            part(options.rounds)


def print_training(rounds: int) -> None:
    """Print the ratios of a training step."""
    for kind in ("lora", "full"):
        steps = training_steps(kind)
        seconds, losses = rounds_of(steps, rounds)
        print(f"GradCache, {kind}: {PAIRS} pairs in chunks of {CHUNK}, first losses {losses}")
        report(seconds, "ours", {"sentence-transformers": 1.6})


def print_evaluation(rounds: int) -> None:
    """Print the ratios of the evaluation of single tasks."""
    module = embedder("frozen").eval()
    peer, processor, floor = stock(), module.encoder.processor, forward_seconds(module)
    whole = AutoModelForImageTextToText.from_pretrained(TINY_BACKBONE_DIR, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_short_task(Path(folder))
        for task in TASKS:
            data_dir = Path(folder) if task == SHORT else ensure_benchmark()
            floor.clear()
            ways: dict[str, Callable[[], float]] = {"ours": partial(our_test, module, data_dir, task)}
            ways["VLM2Vec's loop"] = partial(vlm2vec, whole, processor, data_dir, task)
            ways["VLM2Vec's loop without head"] = partial(vlm2vec, whole.model, processor, data_dir, task)
            model = peer if task == SHORT else as_sentence_transformer(module.embedder, 0)
            ways["sentence-transformers"] = partial(sentence_transformers, model, data_dir, task)
            seconds, scores = rounds_of(ways, rounds)
            print(f"evaluation of {task}, hit@1 {scores}; floor {sum(floor) / (rounds + 1):.3f} s")
            report(seconds, "ours", {"VLM2Vec's loop": 1.5, "sentence-transformers": 1.2})


def print_predict(rounds: int) -> None:
    """Print the ratios of ``predict`` on texts."""
    module, peer = embedder("frozen").eval(), stock()
    for longest in (6, 60):
        rows = texts(512, longest, 5)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.parquet"
            pq.write_table(pa.table({"text": rows}), file)
            ways = {
                "predict": partial(our_predict, module, file),
                "encode of a list": partial(module.encode, rows, batch_size=BATCH, show_progress=False),
                "sentence-transformers": partial(peer.encode, rows, batch_size=BATCH),
            }
            print(f"predict of 512 texts of 3 to {longest} words")
            report(rounds_of(ways, rounds)[0], "predict", {"sentence-transformers": 1.2})


if __name__ == "__main__":
    main()
