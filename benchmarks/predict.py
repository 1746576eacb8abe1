"""Rows per second of ``predict`` against three ways to encode the same rows in a loop of one's own.

Run as ``OMP_NUM_THREADS=1 python -m benchmarks.predict`` from the repository root. Per round, one after the
other on the same rows and with the same weights:

- predict: a whole ``Trainer.predict``, from the file of rows to the Parquet files;
- loop: ``encode([row])`` for every row; list: ``encode(rows)`` with predict's batch size; neither writes;
- sentence-transformers: ``SentenceTransformer.encode(rows)`` with that batch size, of this package's module
  for it, or (texts and the bare backbone only) of its own ``Transformer`` and ``Pooling`` on the backbone's
  folder, in float32 as the others.

The model is the package's tiny backbone: bare (one path without prefix) or with three paths. Rows are texts
of 3 to 60 words, or those, pictures of 32 to 128 pixels a side, and both. Numbers are medians over the
rounds of the other's seconds over predict's, by the clock and of the processor (steadier where the machine
does other work): more than 1 is in favour of predict. Wants about ten minutes.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch import Trainer
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from parallel_decoupling import model as model_package
from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.evaluation.run import EmbeddingWriter
from parallel_decoupling.evaluation.store import Keeper
from parallel_decoupling.sentence_transformers import as_sentence_transformer
from parallel_decoupling.training.module import PDFEmbedder

WORDS = ("a", "the", "red", "blue", "small", "large", "circle", "square", "star", "left", "right", "of")
SIDES = (32, 48, 64, 96, 128)
MODELS: dict[str, dict[str, Any]] = {
    "bare backbone": {
        "num_paths": 1,
        "prefix_length": 0,
        "aggregate_weight": 0.0,
        "adapter": {"kind": "frozen"},
    },
    "three paths": {"num_paths": 3, "prefix_length": 8, "prefix_init": "random"},
}
TINY_DIR = Path(model_package.__file__).parent / "tiny"


def save_rows(folder: Path, count: int, *, mixed: bool) -> Path:
    """Write a table of rows and its pictures."""
    rng, texts, images = random.Random(0), [], []
    folder.mkdir()
    for row in range(count):
        kind = rng.choice(("text", "image", "both")) if mixed else "text"
        texts.append("" if kind == "image" else " ".join(rng.choices(WORDS, k=rng.randint(3, 60))))
        images.append("" if kind == "text" else f"{row}.png")
        if images[-1]:
            Image.effect_noise((rng.choice(SIDES), rng.choice(SIDES)), 60).save(folder / images[-1])
    pq.write_table(pa.table({"text": texts, "image": images}), folder / "rows.parquet")
    return folder / "rows.parquet"


def as_inputs(table_file: Path) -> list[dict[str, str]]:
    """Return the rows as ``encode`` takes them."""
    cells = pq.read_table(table_file).to_pylist()
    files = [{**row, "image": str(table_file.parent / row["image"]) if row["image"] else ""} for row in cells]
    return [{name: cell for name, cell in row.items() if cell} for row in files]


def predict(module: PDFEmbedder, table_file: Path, batch_size: int) -> None:
    """Make a whole run without command line and loading."""
    with tempfile.TemporaryDirectory() as folder:
        data = MMEBDataModule(predict_source=str(table_file), eval_batch_size=batch_size)
        keeper = Keeper(folder, module.about)
        data.connect(module, keeper)
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        options: dict[str, Any] = {
            "accelerator": "cpu",
            "default_root_dir": folder,
            **dict.fromkeys(quiet, False),
        }
        trainer = Trainer(callbacks=[EmbeddingWriter(data, keeper)], **options)
        trainer.predict(module, data, return_predictions=False)
        assert len(list(Path(folder).rglob("*.parquet"))) == 1


def ways(module: PDFEmbedder, table_file: Path, batch_size: int) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name."""
    inputs = as_inputs(table_file)
    bare, texts_only = module.encoder.num_paths == 1, all("image" not in row for row in inputs)
    same = as_sentence_transformer(module.embedder, 0 if bare else "aggregate")
    options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": False}
    timed: dict[str, Callable[[], Any]] = {
        "predict": lambda: predict(module, table_file, batch_size),
        "loop": lambda: [module.encode([row], paths="all") for row in inputs],
        "list": lambda: module.encode(inputs, paths="all", batch_size=batch_size, show_progress=False),
        "sentence-transformers, our module": lambda: same.encode(inputs, **options),
    }
    if bare and texts_only:
        transformer = Transformer(str(TINY_DIR), model_kwargs={"dtype": "float32"})
        pooling = Pooling(module.encoder.embed_dim, "lasttoken")
        stock = SentenceTransformer(modules=[transformer, pooling], device="cpu")
        texts = [row["text"] for row in inputs]
        timed["sentence-transformers, its own"] = lambda: stock.encode(texts, **options)
    return timed


def measure(timed: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return seconds by the clock and of the processor in every round; a first round does not count."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in timed}
    for number in range(rounds + 1):
        for name, call in timed.items():
            began = time.perf_counter(), time.process_time()
            call()
            if number:
                seconds[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return seconds


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=32)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    lines = ["| model | rows | predict, rows/s | against | time | processor time |", "| --- " * 6 + "|"]
    with tempfile.TemporaryDirectory() as folder:
        files = {
            name: save_rows(Path(folder) / name, options.rows, mixed=name == "mixed")
            for name in ("texts", "mixed")
        }
        for model, settings in MODELS.items():
            module = PDFEmbedder(backbone="tiny", mi={"kind": "none"}, mi_weight=0.0, **settings).eval()
            for kind, table_file in files.items():
                seconds = measure(ways(module, table_file, options.batch_size), options.rounds)
                own = seconds["predict"]
                speed = options.rows / statistics.median(clock for clock, _ in own)
                for name, values in list(seconds.items())[1:]:
                    ratios = [
                        statistics.median(
                            value[of] / mine[of] for value, mine in zip(values, own, strict=True)
                        )
                        for of in (0, 1)
                    ]
                    cells = (model, kind, f"{speed:.0f}", name, *(f"{ratio:.2f}" for ratio in ratios))
                    lines.append(f"| {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
