"""Everything that this layer can say about one model's paths, in one call.

Here: which inputs are embedded, and what is left out when a model or its data do not allow a part.
Elsewhere: the measures (the other modules), tables and files (``tables``), pictures (``figures``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.images import load_image
from parallel_decoupling.data.readers import read_eval_task
from parallel_decoupling.data.tasks import find_eval_tasks
from parallel_decoupling.diagnostics.attention import AttentionMaps, attention_maps
from parallel_decoupling.diagnostics.contributions import Contributions, patch_contributions
from parallel_decoupling.diagnostics.errors import ErrorOverlap, error_overlap
from parallel_decoupling.diagnostics.probes import ProbeResult, probe
from parallel_decoupling.diagnostics.scenes import (
    CAPTION_INSTRUCTION,
    FACTORS,
    INSTRUCTION,
    FactorScenes,
    counted_scenes,
    crowded_scenes,
)
from parallel_decoupling.diagnostics.similarity import PathSimilarity, path_similarity
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.report import ScoreReport
from parallel_decoupling.evaluation.user_inputs import to_raw_inputs
from parallel_decoupling.model.encoder import ParallelEncoder

SCENES = 600
"""Scenes of each of the two kinds, and inputs of other data."""
MAPPED = 64
"""Pictures whose attention is read; a quarter of them for the slower contributions."""
SHOWN = 4
"""Pictures in the figures of maps."""


@dataclass(frozen=True)
class PathAnalysis:
    """What ``analyse_paths`` found; ``None`` and empty parts are explained in ``notes``.

    Attributes:
        num_paths: N.
        num_inputs: inputs behind ``similarity``.
        similarity: of the paths' embeddings.
        probes: by factor.
        attention: over ``pictures`` and more.
        contributions: over ``pictures`` and more.
        errors: from the run's scores.
        pictures: the first ones of ``attention`` and ``contributions``.
        notes: what was left out, and why.
        run: what trained the weights, plain values: ``Embedder.run``, and the file name of the checkpoint.
    """

    num_paths: int
    num_inputs: int
    similarity: PathSimilarity
    probes: dict[str, ProbeResult]
    attention: AttentionMaps | None
    contributions: Contributions
    errors: ErrorOverlap | None
    pictures: list[Image.Image]
    notes: list[str] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)


def analyse_world(embedder: Embedder, report: ScoreReport | None, *, scenes: int = SCENES) -> PathAnalysis:
    """Analyse a model on scenes of the embedded world, whose factors are known.

    Args:
        embedder: in evaluation mode.
        report: of the same model; None leaves out the errors.
        scenes: drawn of each kind, at least 80 so that every value is there often enough for a probe.
    """
    kinds = (crowded_scenes(scenes), counted_scenes(scenes))
    embeddings: list[torch.Tensor] = []
    probes: dict[str, ProbeResult] = {}
    for kind in kinds:
        embeddings_BND = embedder.encode(kind.pictures, instruction=INSTRUCTION)
        embeddings.append(embeddings_BND)
        columns = {f"path_{path}": embeddings_BND[:, path] for path in range(embeddings_BND.shape[1])}
        if len(columns) > 1:
            columns = {"aggregate": embedder.encoder.aggregate(embeddings_BND).detach(), **columns}
        probes |= {factor: probe(columns, labels, factor) for factor, labels in kind.labels.items()}
    mapped = _alternate(kinds, MAPPED)
    inputs = to_raw_inputs([picture for picture, _ in mapped], INSTRUCTION)
    captions = [f"{CAPTION_INSTRUCTION} {caption}\n" for _, caption in mapped]
    return _analyse(
        embedder,
        torch.cat(embeddings),
        inputs,
        report,
        {factor: probes[factor] for factor in FACTORS},
        captions,
    )


def analyse_inputs(
    embedder: Embedder, inputs: Sequence[RawInput], report: ScoreReport | None
) -> PathAnalysis:
    """Analyse a model on any inputs: no probes and no change of scores, as no factor or caption is known.

    Args:
        embedder: in evaluation mode.
        inputs: each with one image, at least 3.
        report: of the same model; None leaves out the errors.
    """
    mapped = list(inputs[:MAPPED])
    analysis = _analyse(embedder, embedder.encode(inputs), mapped, report, {}, None)
    analysis.notes.insert(0, "probes and changes of the score: the data is not the embedded world")
    return analysis


def benchmark_inputs(data_dir: str | Path, count: int = SCENES) -> list[RawInput]:
    """Queries with one image from all evaluation tasks of a folder, evenly.

    Raises:
        ValueError: there are none.
    """
    tasks = find_eval_tasks(data_dir)
    share = -(-count // max(1, len(tasks)))
    queries = []
    for name in tasks:
        found = read_eval_task(data_dir, name, limit=share).queries
        queries += [query for query in found if len(query.images) == 1][:share]
    if len(queries) < 3:
        raise ValueError(
            f"{data_dir}: fewer than 3 evaluation queries have an image; name another data folder"
        )
    return queries[:count]


def _analyse(
    embedder: Embedder,
    embeddings_BND: torch.Tensor,
    mapped: Sequence[RawInput],
    report: ScoreReport | None,
    probes: dict[str, ProbeResult],
    captions: Sequence[str] | None,
) -> PathAnalysis:
    notes = []
    attention = None
    if isinstance(embedder.encoder, ParallelEncoder):
        attention = attention_maps(embedder.encoder, mapped, images=embedder.images)
        if not attention.patches:
            notes.append("attention maps: the image tokens of this backbone are no grid of patches")
    else:
        notes.append("attention: an OpenCLIP model has no language model whose pooled token could be read")
    few = list(mapped[: len(mapped) // 4 or 1])
    pictures = [load_image(item.images[0]) for item in few]
    contributions = patch_contributions(
        embedder,
        pictures,
        instruction=None if captions is None else INSTRUCTION,
        texts=None if captions is None else captions[: len(few)],
    )
    if report is None:
        notes.append("errors: the run has no scores.json of this checkpoint; lightning test writes it")
    return PathAnalysis(
        num_paths=embeddings_BND.shape[1],
        num_inputs=len(embeddings_BND),
        similarity=path_similarity(embeddings_BND),
        probes=probes,
        attention=attention,
        contributions=contributions,
        errors=None if report is None else error_overlap(report),
        pictures=pictures[:SHOWN],
        notes=notes,
        run=embedder.run,
    )


def _alternate(kinds: Sequence[FactorScenes], count: int) -> list[tuple[Image.Image, str]]:
    """Pictures and captions of all kinds in turn."""
    return [
        (kind.pictures[index], kind.scenes[index].caption())
        for index in range(count // len(kinds))
        for kind in kinds
    ]
