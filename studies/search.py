"""What a search costs and finds: every scoring, precision and number of dimensions on 100,000 items.

Items: pictures of generated scenes, embedded with a trained model, and distractors made from them: a real
item plus half the difference of two others, on all paths alike, which keeps the directions in which the
embeddings spread and how the paths go together. Queries: captions of some of the scenes.

Measured for each: bytes per item that the first comparison reads; recall@10, the share of the ten best by
exact float32 search with the same scoring and all dimensions; truth@10, the share of queries with a picture
of the caption's scene among the ten; milliseconds of a single query, the median.
"""

from __future__ import annotations

import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import torch
from lancedb.index import IvfPq
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor
from tqdm import tqdm

from parallel_decoupling.diagnostics.scenes import CAPTION_INSTRUCTION
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.index.lance_index import TABLE, LanceIndex
from parallel_decoupling.index.protocol import Index
from parallel_decoupling.index.quantization import QUANTIZERS
from parallel_decoupling.index.scoring import aggregate, unit
from parallel_decoupling.index.settings import AGGREGATE, MAXSIM, SUM, Precision
from parallel_decoupling.index.torch_index import TorchIndex
from parallel_decoupling.world.scenes import render, sample_scene
from studies.plots import DPI

NUM_ITEMS, NUM_SCENES, NUM_QUERIES = 100_000, 10_000, 200
TOP_K = 10
SCORINGS = ("path_0", AGGREGATE, SUM, MAXSIM)
PRECISIONS: tuple[Precision, ...] = ("float32", "int8", "binary")
COLOURS = {"path_0": "#0072b2", AGGREGATE: "#d55e00", SUM: "#009e73", MAXSIM: "#cc79a7"}
MARKERS = {"float32": "o", "int8": "s", "binary": "^", "pq": "D"}


@dataclass(frozen=True)
class World:
    """Items and queries; the first items are the scenes, the first queries their captions.

    Attributes:
        items: ``[B, N, D]``, unit norm.
        queries: ``[Q, N, D]``, unit norm.
        right: per query the items that show its caption's scene.
    """

    items: Tensor
    queries: Tensor
    right: list[set[int]]


@dataclass(frozen=True)
class Contender:
    """One way to search.

    Attributes:
        system: library and kind of search.
        scoring: see ``IndexSettings.scorings``.
        precision: of the first comparison.
        oversample: how many times ``TOP_K`` are scored again in float32.
        dimensions: of each path.
        bytes_per_item: that the first comparison reads; of an approximate index all that it stores.
    """

    system: str
    scoring: str
    precision: str
    oversample: int
    dimensions: int
    bytes_per_item: float


@dataclass(frozen=True)
class Measurement:
    """What a contender found in how much time."""

    recall_at_10: float
    truth_at_10: float
    milliseconds: float


Best = Callable[[int], list[int]]
"""From the number of a query to the ``TOP_K`` best items."""
Expected = Mapping[str, list[list[int]]]
"""By scoring: the best items of every query, exactly."""
Results = dict[Contender, Measurement]


def run(output_dir: Path, checkpoint: str = "runs/demo/checkpoints/last.ckpt") -> None:
    """Measure everything and write ``results.csv``, ``table.md`` and ``search.png``.

    Args:
        output_dir: is there already.
        checkpoint: of the model that embeds the scenes.
    """
    torch.set_num_threads(1)
    world = make_world(checkpoint)
    exact = _torch_index(world.items)
    expected = {
        scoring: [[int(hit.id) for hit in hits] for hits in exact.search(world.queries, TOP_K, scoring)]
        for scoring in SCORINGS
    }
    results: Results = {}
    parts = (measure_torch, measure_numpy, measure_lance, measure_plain_lance)
    for measure_some in tqdm(parts, unit="part", disable=not sys.stderr.isatty()):
        results |= measure_some(world, expected)
    write_results(results, output_dir, world)


def make_world(checkpoint: str) -> World:
    """Embed the scenes and captions, and add distractors."""
    embedder = Embedder.from_pretrained(checkpoint)
    rng = np.random.default_rng(11)
    scenes = [sample_scene(rng) for _ in range(NUM_SCENES)]
    pictures = [render(scene) for scene in scenes]
    instruction = "Represent the given picture"
    real = embedder.encode_candidate(pictures, instruction=instruction, batch_size=64)
    captions = [scene.caption() for scene in scenes]
    queries = embedder.encode_query(captions[:NUM_QUERIES], instruction=CAPTION_INSTRUCTION)
    shows: dict[str, set[int]] = {}
    for row, caption in enumerate(captions):
        shows.setdefault(caption, set()).add(row)
    base, plus, minus = rng.integers(0, NUM_SCENES, size=(3, NUM_ITEMS - NUM_SCENES))
    distractors = real[base] + 0.5 * (real[plus] - real[minus])
    items = unit(torch.cat([real, distractors]), "item")
    right = [shows[caption] for caption in captions[:NUM_QUERIES]]
    return World(items, unit(queries, "query"), right)


def measure_torch(world: World, expected: Expected) -> Results:
    """The built-in index: precisions, shortlists and truncated vectors."""
    full = world.items.shape[2]
    results: Results = {}
    for dimensions in (full, full // 2, full // 4):
        part = World(world.items[..., :dimensions], world.queries[..., :dimensions], world.right)
        for precision in PRECISIONS:
            for oversample in _oversamples(precision, dimensions == full):
                index = _torch_index(part.items, precision, oversample)
                size = _bytes_per_vector(precision, dimensions)
                for scoring in SCORINGS:
                    bytes_per_item = size * _columns(scoring, part)
                    contender = Contender("torch", scoring, precision, oversample, dimensions, bytes_per_item)
                    best = _search(index, part, scoring)
                    results[contender] = measure(best, world, expected[scoring])
    return results


def measure_numpy(world: World, expected: Expected) -> Results:
    """What one writes without an index: a matrix product and a partial sort."""
    results: Results = {}
    dimensions = world.items.shape[2]
    for scoring, (items, queries) in single_vectors(world).items():
        matrix, rows = items.contiguous().numpy(), queries.contiguous().numpy()

        def best(query: int, matrix: np.ndarray = matrix, rows: np.ndarray = rows) -> list[int]:
            scores = matrix @ rows[query]
            top = np.argpartition(-scores, TOP_K)[:TOP_K]
            return [int(row) for row in top[np.argsort(-scores[top])]]

        contender = Contender("numpy", scoring, "float32", 1, dimensions, 4.0 * matrix.shape[1])
        results[contender] = measure(best, world, expected[scoring])
    return results


def measure_lance(world: World, expected: Expected) -> Results:
    """The index on LanceDB: exact, and approximate in three precisions."""
    results: Results = {}
    dimensions = world.items.shape[2]
    kinds: list[tuple[bool, Precision]] = [(False, "float32"), *((True, name) for name in PRECISIONS)]
    for approximate, precision in kinds:
        with tempfile.TemporaryDirectory() as folder:
            index = LanceIndex(folder, approximate, precision)
            index.add(range(len(world.items)), world.items)
            index.save(folder)
            sizes = _index_bytes(folder)
            for scoring in SCORINGS:
                read = _bytes_per_vector("float32", dimensions) * _columns(scoring, world)
                name = "lance approximate" if approximate else "lance exact"
                size = sizes[scoring] / len(world.items) if approximate else read
                contender = Contender(name, scoring, precision, 4, dimensions, size)
                results[contender] = measure(_search(index, world, scoring), world, expected[scoring])
    return results


def measure_plain_lance(world: World, expected: Expected) -> Results:
    """One vector per item in LanceDB without this package: brute force, and its default index."""
    items, queries = single_vectors(world)[AGGREGATE]
    dimensions = items.shape[1]
    with tempfile.TemporaryDirectory() as folder:
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(items.flatten().numpy()), dimensions)
        rows = pa.table({"id": pa.array(range(len(items))), "vector": vectors})
        table = lancedb.connect(folder).create_table(TABLE, rows)

        def best(query: int) -> list[int]:
            search: Any = table.search(queries[query].numpy(), query_type="vector")
            search = search.distance_type("cosine").limit(TOP_K).select(["id", "_distance"])
            return [int(row) for row in search.to_arrow()["id"].to_pylist()]

        exact = Contender("plain lance exact", AGGREGATE, "float32", 1, dimensions, 4.0 * dimensions)
        results = {exact: measure(best, world, expected[AGGREGATE])}
        table.create_index("vector", config=IvfPq(distance_type="cosine"))
        size = _index_bytes(folder)["vector"] / len(items)
        approximate = Contender("plain lance approximate", AGGREGATE, "pq", 1, dimensions, size)
        results[approximate] = measure(best, world, expected[AGGREGATE])
    return results


def measure(best: Best, world: World, expected: Sequence[Sequence[int]]) -> Measurement:
    """Run every query on its own."""
    times, recall, truth = [], 0, 0
    for query, (right, wanted) in enumerate(zip(world.right, expected, strict=True)):
        start = time.perf_counter()
        found = best(query)
        times.append(time.perf_counter() - start)
        recall += len(set(found) & set(wanted))
        truth += bool(right & set(found))
    count = len(expected)
    return Measurement(recall / (TOP_K * count), truth / count, 1000 * statistics.median(times))


def single_vectors(world: World) -> dict[str, tuple[Tensor, Tensor]]:
    """By scoring that one vector per item can do: ``[B, D']`` of the items and ``[Q, D']`` of the queries."""
    weights = (1 / world.items.shape[1],) * world.items.shape[1]
    return {
        "path_0": (world.items[:, 0], world.queries[:, 0]),
        AGGREGATE: (aggregate(world.items, weights), aggregate(world.queries, weights)),
        SUM: (world.items.flatten(1), world.queries.flatten(1)),
    }


def write_results(results: Results, output_dir: Path, world: World) -> None:
    """Write the numbers and the picture."""
    rows = [
        {key: _rounded(value) for key, value in {**asdict(contender), **asdict(measurement)}.items()}
        for contender, measurement in results.items()
    ]
    with (output_dir / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(results).savefig(output_dir / "search.png", dpi=DPI)
    table = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    table += ["| " + " | ".join(row.values()) + " |" for row in rows]
    note = (
        f"{len(world.items):,} items with {world.items.shape[1]} paths of {world.items.shape[2]} dimensions, "
        f"{NUM_SCENES:,} of them pictures; {len(world.right)} queries, one by one; one thread. "
        "docs/search.md says what follows from it."
    )
    (output_dir / "table.md").write_text(f"{note}\n\n" + "\n".join(table) + "\n", encoding="utf-8")


def draw(results: Results) -> Figure:
    """Left: what codes and truncation lose for their bytes. Right: what is found in how much time."""
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    full = max(contender.dimensions for contender in results)
    for one, measurement in results.items():
        style: dict[str, Any] = {
            "color": COLOURS[one.scoring],
            "marker": MARKERS[one.precision],
            "linestyle": "",
            "markersize": 7,
        }
        if one.system == "torch" and one.precision != "float32" and one.oversample != 4:
            continue
        if one.system == "torch":
            faded = 1.0 if one.dimensions == full else 0.35
            left.plot(one.bytes_per_item, measurement.recall_at_10, alpha=faded, **style)
        if one.dimensions == full:
            fill = "white" if "lance" in one.system else COLOURS[one.scoring]
            right.plot(measurement.milliseconds, measurement.truth_at_10, markerfacecolor=fill, **style)
    left.set(
        xscale="log",
        xlabel="bytes per item in the first comparison",
        ylabel="recall@10 against exact float32",
    )
    left.set_title(
        f"torch index, shortlist of {4 * TOP_K} (faded: half and a quarter of the dimensions)", fontsize=10
    )
    right.set(xscale="log", xlabel="milliseconds per query (median)", ylabel="truth@10")
    right.set_title("all systems, all dimensions (hollow: LanceDB)", fontsize=10)
    handles = [
        Line2D([], [], color=colour, marker="o", linestyle="", label=name) for name, colour in COLOURS.items()
    ]
    handles += [
        Line2D([], [], color="#666666", marker=marker, linestyle="", label=name)
        for name, marker in MARKERS.items()
    ]
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _torch_index(items: Tensor, precision: Precision = "float32", oversample: int = 4) -> TorchIndex:
    index = TorchIndex(precision, oversample)
    index.add(range(len(items)), items)
    return index


def _search(index: Index, world: World, scoring: str) -> Best:
    def best(query: int) -> list[int]:
        (hits,) = index.search(world.queries[query : query + 1], TOP_K, scoring)
        return [int(hit.id) for hit in hits]

    return best


def _oversamples(precision: Precision, full: bool) -> tuple[int, ...]:
    if precision == "float32":
        return (1,)  # nothing to score again
    return (1, 4, 16) if full else (4,)


def _bytes_per_vector(precision: Precision, dimensions: int) -> float:
    """What a code of one vector takes."""
    return float(sum(part.nbytes for part in QUANTIZERS[precision].encode(torch.ones(1, dimensions))))


def _columns(scoring: str, world: World) -> int:
    """Vectors per item that a scoring compares."""
    return world.items.shape[1] if scoring in (SUM, MAXSIM) else 1


def _index_bytes(folder: str) -> dict[str, int]:
    """Size of LanceDB's index of each column."""
    table = lancedb.connect(folder).open_table(TABLE)
    return {config.columns[0]: config.size_bytes or 0 for config in table.list_indices()}


def _rounded(value: str | float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
