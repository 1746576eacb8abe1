"""The whole analysis of one model's paths: numbers, tables, ``paths.json`` and pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, RawInput
from parallel_decoupling.data.images import load_image
from parallel_decoupling.data.readers import read_eval_task
from parallel_decoupling.data.tasks import find_eval_tasks
from parallel_decoupling.diagnostics import patch_maps
from parallel_decoupling.diagnostics.error_agreement import ErrorAgreement, error_agreement
from parallel_decoupling.diagnostics.probes import ProbeResult, counted_scenes, crowded_scenes, probe
from parallel_decoupling.diagnostics.similarity import PathSimilarity, path_similarity
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.report import SCORES_FILE, Grid, ScoreReport, percent
from parallel_decoupling.model.encoder import ParallelEncoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PATHS_FILE, EMBEDDED = "paths.json", "mini-mmeb"
"""What is written, and how the name of the embedded benchmark's folder begins."""
INSTRUCTION, SCENES, MAPPED, SHOWN = "Represent the given picture", 600, 64, 4
"""What is asked of scenes, scenes of each kind, pictures whose attention is read, pictures in figures."""


@dataclass(frozen=True)
class PathAnalysis:
    """What is found about a model's paths; ``None`` and empty parts are explained in ``notes``."""

    num_paths: int
    num_inputs: int
    similarity: PathSimilarity
    probes: dict[str, ProbeResult]
    attention: patch_maps.AttentionMaps | None
    contributions: Tensor
    errors: ErrorAgreement | None
    pictures: list[Image.Image]
    notes: list[str] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)


def analyse_paths(run: str, output_dir: str | None = None, data_dir: str | None = None) -> None:
    """Print tables of how the paths of a trained model differ, and write ``paths.json`` and pictures.

    Args:
        run: a run folder, a checkpoint, or an exported folder.
        output_dir: where the files go; by default the folder ``paths`` of the run.
        data_dir: the data with the pictures to look at; by default that of the training.

    Raises:
        ValueError: the model does not say on what data it was trained.
    """
    from rich.console import Console

    embedder = Embedder.from_pretrained(run).to("cuda" if torch.cuda.is_available() else "cpu")
    run_dir = Path(run) if Path(run).is_dir() else Path(run).resolve().parent
    run_dir = run_dir.parent if run_dir.name == "checkpoints" else run_dir
    data_dir = data_dir or embedder.run.get("data", {}).get("data_dir")
    if data_dir is None:
        raise ValueError(f"{run} does not name the data of its training; give data_dir")
    report = find_scores(run_dir, embedder.run)
    world = Path(data_dir).name.startswith(EMBEDDED)
    analysis = analyse_world(embedder, report) if world else analyse_data(embedder, data_dir, report)
    folder = Path(output_dir) if output_dir else run_dir / "paths"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(analysis, folder / PATHS_FILE)
    for name, figure in figures(analysis).items():
        figure.savefig(folder / f"{name}.png", dpi=150)
    console = Console()
    console.print(*(table.terminal() for table in tables(analysis)), sep="\n")
    for line in (*(f"left out: {note}" for note in analysis.notes), f"written to {folder}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def find_scores(run_dir: Path, run: dict[str, Any]) -> ScoreReport | None:
    """Return the scores of exactly these weights, from the run's folder or one inside it; None without."""
    files = [*run_dir.glob(SCORES_FILE), *run_dir.glob(f"*/{SCORES_FILE}")]
    reports = [ScoreReport.from_json_file(file) for file in files]
    return next((report for report in reports if progress(report.run) == progress(run)), None)


def analyse_world(embedder: Embedder, report: ScoreReport | None, *, scenes: int = SCENES) -> PathAnalysis:
    """Analyse a model on scenes of the embedded world, whose factors are known.

    Args:
        embedder: the model.
        report: its scores, or None.
        scenes: drawn of each kind, at least 80 so that every value is there often enough for a probe.
    """
    embeddings: list[Tensor] = []
    probes: dict[str, ProbeResult] = {}
    kinds = crowded_scenes(scenes), counted_scenes(scenes)
    for kind in kinds:
        paths_BND = embedder.encode(kind.pictures, instruction=INSTRUCTION, paths="all")
        embeddings.append(paths_BND)
        columns = {f"path_{path}": paths_BND[:, path] for path in range(paths_BND.shape[1])}
        if len(columns) > 1:
            aggregate_BD = embedder.encoder.aggregate(paths_BND.to(embedder.device)).detach().cpu()
            columns = {"aggregate": aggregate_BD, **columns}
        probes |= {factor: probe(columns, labels, factor) for factor, labels in kind.labels.items()}
    pictures = [kind.pictures[index] for index in range(MAPPED // 2) for kind in kinds]
    inputs = [RawInput(f"{IMAGE_PLACEHOLDER}\n{INSTRUCTION}\n", (picture,)) for picture in pictures]
    return _analyse(embedder, torch.cat(embeddings), inputs, report, probes)


def analyse_data(embedder: Embedder, data_dir: str | Path, report: ScoreReport | None) -> PathAnalysis:
    """Analyse a model on queries with one image, evenly from all evaluation tasks of a folder."""
    tasks, inputs = find_eval_tasks(data_dir), []
    share = -(-SCENES // max(1, len(tasks)))
    for name in tasks:
        found = read_eval_task(data_dir, name, limit=share).queries
        inputs += [query for query in found if len(query.images) == 1]
    if len(inputs) < 3:
        raise ValueError(f"{data_dir}: fewer than 3 evaluation queries have an image; give another data_dir")
    analysis = _analyse(embedder, embedder.encode(inputs, paths="all"), inputs[:MAPPED], report, {})
    analysis.notes.insert(0, "probes: the data is not the embedded world, whose factors are known")
    return analysis


def _analyse(
    embedder: Embedder,
    embeddings_BND: Tensor,
    mapped: list[RawInput],
    report: ScoreReport | None,
    probes: dict[str, ProbeResult],
) -> PathAnalysis:
    notes, attention = [], None
    if isinstance(embedder.encoder, ParallelEncoder):
        attention = patch_maps.attention_maps(embedder, mapped)
        if not attention.patches:
            notes.append("attention maps: the image tokens of this backbone form no grid of patches")
    else:
        notes.append("attention: an OpenCLIP model has no language model whose pooled token could be read")
    if report is None:
        notes.append("errors: the run has no scores.json of this checkpoint; test writes it")
    pictures = [load_image(item.images[0]) for item in mapped[: len(mapped) // 4 or 1]]
    return PathAnalysis(
        num_paths=embeddings_BND.shape[1],
        num_inputs=len(embeddings_BND),
        similarity=path_similarity(embeddings_BND),
        probes=probes,
        attention=attention,
        contributions=patch_maps.patch_contributions(embedder, pictures, instruction=INSTRUCTION),
        errors=None if report is None else error_agreement(report),
        pictures=pictures[:SHOWN],
        notes=notes,
        run=embedder.run,
    )


def write_json(analysis: PathAnalysis, json_file: Path) -> None:
    """Write every number, unrounded, except single maps; nan becomes null."""
    content = {key: value for key, value in vars(analysis).items() if key != "pictures"}
    content["contributions"] = {"mean_change": analysis.contributions.mean(dim=(0, 2, 3))}
    maps = {"contributions": list(analysis.contributions)}
    if analysis.attention is not None:
        content["attention"] = {"mass_by_path_and_layer": analysis.attention.mass}
        maps["attention"] = analysis.attention.patches
    for name, values in maps.items():
        if values:
            same, different = patch_maps.map_agreement(values)
            content[name] |= {"map_correlation": same, "map_correlation_of_different_pictures": different}
    text = json.dumps(content, indent=1, default=_plain, allow_nan=False)
    json_file.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return vars(value)
    array = np.asarray(value).astype(object)
    array[np.isnan(np.asarray(value))] = None
    return array.tolist()


def tables(analysis: PathAnalysis) -> list[Grid]:
    """Return all tables that the analysis has numbers for."""
    similarity, errors, attention = analysis.similarity, analysis.errors, analysis.attention
    changes = analysis.contributions.mean(dim=(0, 2, 3)).tolist()
    columns = {
        "effective rank": [f"{rank:.1f}" for rank in similarity.rank.tolist()],
        "mean change without a patch": [f"{change:.4f}" for change in changes],
    }
    if attention is not None:
        for group, share_N in zip(patch_maps.GROUPS, attention.mass.mean(dim=1).T.tolist(), strict=True):
            columns[f"attention to {group}, %"] = [percent(share) for share in share_N]
    caption = f"Side by side, the paths have effective rank {similarity.joined_rank:.1f}."
    found = [_grid("Each path", map(str, range(analysis.num_paths)), columns, caption)]
    if analysis.num_paths > 1:
        matrices: dict[str, Any] = {
            "cosine": similarity.cosine,
            "cosine, centred": similarity.centred_cosine,
            "linear CKA": similarity.cka,
            "linear CKA, shuffled": similarity.shuffled_cka,
            "contributions": patch_maps.map_agreement(list(analysis.contributions))[0],
        }
        if attention is not None and attention.patches:
            matrices["attention maps"] = patch_maps.map_agreement(attention.patches)[0]
        if errors is not None:
            matrices["misses, kappa"] = errors.kappa
        pairs = similarity.pairs.tolist()
        columns = {name: [f"{float(cells[i][j]):.3f}" for i, j in pairs] for name, cells in matrices.items()}
        columns["mean angle"] = [f"{angle:.0f}" for angle in similarity.angles.mean(dim=1).tolist()]
        chance = float(similarity.chance_angles.mean())
        caption = f"Shuffled: what unrelated paths would have. Random subspaces: {chance:.0f} degrees."
        found.append(_grid("Pairs of paths", (f"{i} and {j}" for i, j in pairs), columns, caption))
    if analysis.probes:
        results = analysis.probes.values()
        columns = {"majority": [percent(result.majority) for result in results]}
        for name in next(iter(results)).accuracy:
            columns[name] = [f"{percent(p.accuracy[name])} ± {percent(p.spread[name])}" for p in results]
        found.append(_grid("Linear probes, accuracy in percent", analysis.probes, columns))
    if errors is not None:
        rows = {**errors.tasks, "mean of tasks": errors.scores}
        columns = {name: [percent(row[name]) for row in rows.values()] for name in errors.scores}
        caption = "The oracle counts a query as right if any path is right."
        found.append(_grid("hit@1 in percent", rows, columns, caption))
    return found


def _grid(title: str, names: Iterable[str], columns: Mapping[str, list[str]], caption: str = "") -> Grid:
    rows = [list(row) for row in zip(names, *columns.values(), strict=True)]
    return Grid(title, ["", *columns], rows, caption=caption)


def figures(analysis: PathAnalysis) -> dict[str, Figure]:
    """Return all pictures that the analysis has numbers for, by file name without suffix."""
    from parallel_decoupling.diagnostics import path_figures
    from parallel_decoupling.evaluation.plots import path_matrices_figure

    drawn: dict[str, Figure] = {}
    if analysis.num_paths > 1:
        names = ("cosine", "centred_cosine", "cka", "shuffled_cka")
        matrices = {name.replace("_", " "): getattr(analysis.similarity, name) for name in names}
        drawn["similarity"] = path_matrices_figure(matrices)
        drawn["principal_angles"] = path_figures.angles_figure(analysis.similarity)
    if analysis.probes:
        drawn["probes"] = path_figures.probes_figure(analysis.probes)
    title = "change of the embedding without a patch (1 - cosine)"
    maps = {"contributions": (title, list(analysis.contributions))}
    if (attention := analysis.attention) is not None:
        drawn["attention_mass"] = path_figures.attention_mass_figure(attention)
        if attention.patches:
            maps["attention_maps"] = ("attention of the pooled token to the image", attention.patches)
    for name, (title, values) in maps.items():
        drawn[name] = path_figures.maps_figure(analysis.pictures, values[:SHOWN], title)
    return drawn
