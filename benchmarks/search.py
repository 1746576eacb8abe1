"""Search of a million vectors: run as ``python -m benchmarks.search``.

D = 256, vectors in clusters as those of a model are. N = 1: a million items, by cosine. N = 4: 250,000 items
of four vectors, by MaxSim (the mean over the query's paths of its best cosine with an item's); faiss and
usearch have no such score, so they find ``REACH`` vectors for every path and the items of these are scored
again. Per engine: milliseconds of processor time for a query (a query at a time, one thread, top 10), recall
of the exact top 10, seconds to build, and bytes on disk. Exact engines have recall 1, and take turns for the
ratio below their lines; the approximate ones are widened until they reach ``RECALL`` or their widest
setting. Building usearch's graph takes longer than all else together (``--no-graph`` leaves it out). Needs
``pip install -e '.[bench]'``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from usearch.index import Index as USearch

from benchmarks.measure import report, rounds_of
from parallel_decoupling.evaluation.store import path_column
from parallel_decoupling.lance_index import LanceIndex, write_lance_index
from parallel_decoupling.search import MAXSIM, ExactIndex
from tests.support.stores import save_store

DIM, TOP, RECALL, REACH, LISTS = 256, 10, 0.95, 100, 1024
Find = Callable[[Tensor], list[list[int]]]  # queries [Q, N, D] to the numbers of the best items


def make_vectors(items: int, paths: int, seed: int) -> Tensor:
    """Return unit vectors ``[items, paths, D]`` around 10,000 centres, which do not depend on the seed."""
    centres = torch.randn(10_000, DIM, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    of_item = centres[torch.randint(0, len(centres), (items,), generator=generator)]
    noise = torch.randn(items, paths, DIM, generator=generator)
    return F.normalize(of_item[:, None] + 0.7 * noise, dim=-1)


def score_again(query_ND: Tensor, items_BND: Tensor, found: Sequence[int]) -> list[int]:
    """Order items by MaxSim."""
    candidates = torch.tensor(sorted(set(map(int, found))))
    scores = (items_BND[candidates] @ query_ND.T).amax(dim=1).mean(dim=1)
    return candidates[scores.argsort(descending=True)[:TOP]].tolist()


def of_vectors(items_BND: Tensor, find: Callable[[np.ndarray, int], np.ndarray]) -> Find:
    """Make a search of items from one of single vectors."""
    paths = items_BND.shape[1]

    def search(queries_QND: Tensor) -> list[list[int]]:
        if paths == 1:
            return [find(query.numpy(), TOP)[0].tolist() for query in queries_QND]
        found = (find(query.numpy(), REACH).ravel() // paths for query in queries_QND)
        return [score_again(q, items_BND, f[f >= 0]) for q, f in zip(queries_QND, found, strict=True)]

    return search


def of_index(index: ExactIndex | LanceIndex, paths: int) -> Find:
    """Make a search of items from an index of this package."""
    scoring = path_column(0) if paths == 1 else MAXSIM

    def search(queries_QND: Tensor) -> list[list[int]]:
        columns = [{path_column(n): query[None, n] for n in range(paths)} for query in queries_QND]
        hits = (index.search(query, TOP, scoring)[0] for query in columns)
        return [[int(hit.id) for hit in found] for found in hits]

    return search


def measure(name: str, find: Find, queries: Tensor, exact: list[list[int]] | None, **about: float) -> float:
    """Print the line of an engine, and return its recall."""
    find(queries[:2])
    start = time.process_time()
    found = find(queries)
    milliseconds = 1e3 * (time.process_time() - start) / len(queries)
    wanted = found if exact is None else exact
    recall = sum(len({*a} & {*b}) for a, b in zip(found, wanted, strict=True)) / (TOP * len(queries))
    built, size = f"{about['build']:>10.0f}", f"{about['size'] / 1e6:>10.0f}"
    print(f"{name:<44}{milliseconds:>12.2f}{recall:>9.3f}{built}{size}", flush=True)
    return recall


def bytes_of(place: Path) -> int:
    """Return the bytes of a file or of all files in a folder."""
    return sum(file.stat().st_size for file in (place.rglob("*") if place.is_dir() else [place]))


def compare(items: int, paths: int, queries: int, folder: Path, dtype: str, with_graph: bool) -> None:
    """Print the table of one number of paths."""
    vectors = make_vectors(items, paths, seed=1)
    asked = make_vectors(queries, paths, seed=2)
    flat = vectors.flatten(0, 1).numpy()
    print(f"\nN = {paths}: {items:,} items, {len(flat):,} vectors, {queries} queries, {dtype} on disk")
    print(f"{'engine':<44}{'ms a query':>12}{'recall':>9}{'build s':>10}{'MB':>10}")
    start = time.process_time()
    for _ in range(3):
        flat @ asked[0, 0].numpy()
    print(
        f"{'floor: one product with all vectors':<44}{1e3 * (time.process_time() - start) / 3 * paths:>12.2f}"
    )
    start = time.process_time()
    columns = [path_column(path) for path in range(paths)]
    options = {"columns": columns, "rows_per_shard": 131_072, "dtype": dtype}
    store = save_store(folder / "store", vectors, aggregate=vectors[:, 0], **options)
    about = {"build": time.process_time() - start, "size": float(bytes_of(folder / "store"))}
    ours = of_index(ExactIndex(store), paths)
    exact = ours(asked)
    measure("this package, exact", ours, asked, exact, **about)
    ways = {"this package": partial(ours, asked), "faiss": flat_lists(vectors, flat, asked, exact)}
    report(rounds_of(ways, rounds=3)[0], "faiss", {})
    del ours, ways
    inverted(vectors, flat, asked, exact)
    if with_graph:
        graph(vectors, flat, asked, exact)
    for kind in (None, "IVF_SQ") if paths == 1 else (None,):
        start = time.process_time()
        place = folder / f"lance_{kind}"
        write_lance_index(str(store.folder), str(place), kind)
        about = {"build": time.process_time() - start, "size": float(bytes_of(place))}
        name = f"LanceDB through this package, {kind or 'exact'}"
        measure(name, of_index(LanceIndex(place), paths), asked, exact, **about)


def flat_lists(
    vectors: Tensor, flat: np.ndarray, asked: Tensor, exact: list[list[int]]
) -> Callable[[], list[list[int]]]:
    """Compare with all vectors in faiss; return that search."""
    start = time.process_time()
    index = faiss.IndexFlatIP(DIM)
    index.add(flat)
    about = {"build": time.process_time() - start, "size": float(flat.nbytes)}
    find = of_vectors(vectors, lambda q, k: index.search(q, k)[1])
    measure("faiss, exact", find, asked, exact, **about)
    return partial(find, asked)


def inverted(vectors: Tensor, flat: np.ndarray, asked: Tensor, exact: list[list[int]]) -> None:
    """Widen faiss's inverted lists of 8-bit vectors until they are as good as wanted."""
    start = time.process_time()
    index = faiss.index_factory(DIM, f"IVF{LISTS},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(flat[:: max(1, len(flat) // (40 * LISTS))])
    index.add(flat)
    about = {"build": time.process_time() - start, "size": float(len(flat) * (DIM + 8))}
    for probes in (8, 32, 128):
        index.nprobe = probes
        find = of_vectors(vectors, lambda q, k: index.search(q, k)[1])
        if measure(f"faiss, IVF{LISTS},SQ8, {probes} lists", find, asked, exact, **about) >= RECALL:
            return


def graph(vectors: Tensor, flat: np.ndarray, asked: Tensor, exact: list[list[int]]) -> None:
    """Widen usearch's graph of 8-bit vectors until it is as good as wanted."""
    start = time.process_time()
    index = USearch(ndim=DIM, metric="cos", dtype="i8", connectivity=16, expansion_add=48)
    index.add(np.arange(len(flat)), flat, threads=1)
    about = {"build": time.process_time() - start, "size": float(index.serialized_length)}
    for width in (48, 192, 768):
        index.expansion_search = width
        find = of_vectors(vectors, lambda q, k: np.atleast_2d(index.search(q, k, threads=1).keys))
        if measure(f"usearch, graph of int8, width {width}", find, asked, exact, **about) >= RECALL:
            return


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the store")
    parser.add_argument("--graph", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    for paths in (1, 4):
        with tempfile.TemporaryDirectory() as folder:
            given = options.queries, Path(folder), options.dtype, options.graph and paths == 1
            compare(options.vectors // paths, paths, *given)


if __name__ == "__main__":
    main()
