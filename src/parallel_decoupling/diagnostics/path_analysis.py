"""The whole analysis of one model's paths: numbers, a table, ``paths.json`` and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.table import Table
from torch import Tensor

from parallel_decoupling import files
from parallel_decoupling.batch import IMAGE_PLACEHOLDER, RawInput
from parallel_decoupling.data.images import load_image
from parallel_decoupling.data.readers import read_eval_task
from parallel_decoupling.data.tasks import chosen, find_eval_tasks
from parallel_decoupling.diagnostics import measures, patch_maps
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.plots import new_figure
from parallel_decoupling.evaluation.report import ScoreReport, console, find_scores, percent, text_table
from parallel_decoupling.model.encoder import ParallelEncoder
from parallel_decoupling.model.run_checkpoint import run_dir_of
from parallel_decoupling.world.scenes import render

PATHS_FILE = "paths.json"
EMBEDDED = "mini-mmeb"  # how the name of the embedded benchmark's folder begins
INSTRUCTION = "Represent the given picture"
SCENES, MAPPED, SHOWN = 600, 64, 4  # scenes of each kind, pictures with maps, pictures in figures
MATRICES = ("cosine", "centred_cosine", "cka", "shuffled_cka")  # of PathSimilarity, for every pair of paths


@dataclass(frozen=True)
class PathAnalysis:
    """What is found about a model's paths; ``None`` and empty parts are explained in ``notes``."""

    num_paths: int
    num_inputs: int
    similarity: measures.PathSimilarity
    probes: dict[str, measures.ProbeResult]
    errors: measures.ErrorAgreement | None
    attention: Tensor | None  # [N, Y, 3], mean over inputs of the shares of patch_maps.GROUPS
    change: Tensor  # [N], mean of 1 - cosine of an embedding with and without a patch
    maps: dict[str, list[Tensor]]  # by kind, of each picture [N, height, width]
    map_correlation: dict[str, Tensor]  # by kind [N, N], of paths over patches
    pictures: list[Image.Image]
    notes: list[str] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)


def analyse_paths(run: str, output_dir: str | None = None, data_dir: str | None = None) -> None:
    """Print how the paths of a trained model differ, and write ``paths.json`` and pictures.

    Args:
        run: a run folder, a checkpoint or an exported folder.
        output_dir: folder of the files; by default the folder paths in that of the run.
        data_dir: by default the data that the model was trained on.
    """
    embedder = Embedder.from_pretrained(run).to("cuda" if torch.cuda.is_available() else "cpu")
    data_dir = data_dir or embedder.run.get("data", {}).get("data_dir")
    if data_dir is None:
        raise ValueError(f"{run} does not name the data of its training; give data_dir")
    report = find_scores(run, embedder.run)
    world = Path(data_dir).name.startswith(EMBEDDED)
    analysis = analyse_world(embedder, report) if world else analyse_data(embedder, data_dir, report)
    folder = Path(output_dir) if output_dir else run_dir_of(run) / "paths"
    write_json(analysis, folder / PATHS_FILE)
    for name, figure in figures(analysis).items():
        with files.atomic_write(folder / f"{name}.png") as unfinished:
            figure.savefig(unfinished, dpi=150)
    terminal = console()
    terminal.print(table(analysis))
    for line in (*(f"left out: {note}" for note in analysis.notes), f"written to {folder}"):
        terminal.print(line, markup=False, highlight=False, soft_wrap=True)


def analyse_world(embedder: Embedder, report: ScoreReport | None, *, scenes: int = SCENES) -> PathAnalysis:
    """Analyse a model on so many scenes of each kind of the embedded world, whose factors are known."""
    probes: dict[str, measures.ProbeResult] = {}
    pictures: list[list[Image.Image]] = []
    embeddings: list[Tensor] = []
    for drawn, labels in (measures.crowded_scenes(scenes), measures.counted_scenes(scenes)):
        pictures.append([render(scene) for scene in drawn])
        paths_BND = embedder.encode(pictures[-1], instruction=INSTRUCTION, paths="all")
        embeddings.append(paths_BND)
        columns = {f"path_{path}": each for path, each in enumerate(paths_BND.unbind(1))}
        if len(columns) > 1:
            columns["aggregate"] = embedder.encoder.aggregate(paths_BND.to(embedder.device)).detach().cpu()
        probes |= {factor: measures.probe(columns, each) for factor, each in labels.items()}
    mixed = [picture for pair in zip(*pictures, strict=True) for picture in pair][:MAPPED]
    inputs = [RawInput(f"{IMAGE_PLACEHOLDER}\n{INSTRUCTION}\n", (picture,)) for picture in mixed]
    return _analyse(embedder, torch.cat(embeddings), inputs, report, probes)


def analyse_data(embedder: Embedder, data_dir: str | Path, report: ScoreReport | None) -> PathAnalysis:
    """Analyse a model on queries with one image, evenly from all evaluation tasks of a folder."""
    tasks, inputs = chosen(None, find_eval_tasks(data_dir), data_dir), []
    for name in tasks:
        found = read_eval_task(data_dir, name, limit=-(-SCENES // len(tasks))).queries
        inputs += [query for query in found if len(query.images) == 1]
    if len(inputs) < 3:
        raise ValueError(f"{data_dir}: fewer than 3 evaluation queries have an image; give another data_dir")
    return _analyse(embedder, embedder.encode(inputs, paths="all"), inputs[:MAPPED], report, {})


def _analyse(
    embedder: Embedder,
    embeddings_BND: Tensor,
    mapped: list[RawInput],
    report: ScoreReport | None,
    probes: dict[str, measures.ProbeResult],
) -> PathAnalysis:
    notes, attention = [], None
    pictures = [load_image(item.images[0]) for item in mapped[: len(mapped) // 4 or 1]]
    changes_BNHW = patch_maps.patch_contributions(embedder, pictures, INSTRUCTION)
    maps = {"contributions": [*changes_BNHW]}
    if not probes:
        notes.append("probes: the data is not the embedded world, whose factors are known")
    if isinstance(embedder.encoder, ParallelEncoder):
        attention, maps["attention"] = patch_maps.attention_maps(embedder, mapped)
    if not maps.get("attention"):
        notes.append("attention maps: this model has no language model, or its image tokens form no grid")
    if report is None:
        notes.append("errors: the run has no scores.json of this checkpoint; test writes it")
    maps = {kind: of_pictures for kind, of_pictures in maps.items() if of_pictures}
    return PathAnalysis(
        num_paths=embeddings_BND.shape[1],
        num_inputs=len(embeddings_BND),
        similarity=measures.path_similarity(embeddings_BND),
        probes=probes,
        errors=None if report is None else measures.error_agreement(report),
        attention=attention,
        change=changes_BNHW.mean(dim=(0, 2, 3)),
        maps=maps,
        map_correlation={kind: patch_maps.map_agreement(of_pictures) for kind, of_pictures in maps.items()},
        pictures=pictures[:SHOWN],
        notes=notes,
        run=embedder.run,
    )


def write_json(analysis: PathAnalysis, json_file: Path) -> None:
    """Write every number, unrounded, except single maps."""
    content = {key: value for key, value in vars(analysis).items() if key not in ("maps", "pictures")}

    def plain(value: Any) -> Any:
        return vars(value) if is_dataclass(value) else np.asarray(value).tolist()

    files.write_json(json_file, content, plain)


def table(analysis: PathAnalysis) -> Table:
    """Tabulate every number by path; what compares two paths is the mean over the other paths."""
    found, errors, num_paths = analysis.similarity, analysis.errors, analysis.num_paths
    rows = {"effective rank": [f"{rank:.1f}" for rank in found.rank.tolist()]}
    rows["change without a patch"] = [f"{change:.4f}" for change in analysis.change.tolist()]
    if analysis.attention is not None:
        for group, share_N in zip(patch_maps.GROUPS, analysis.attention.mean(dim=1).T.tolist(), strict=True):
            rows[f"attention to {group}, %"] = [percent(share) for share in share_N]
    for factor, result in analysis.probes.items():
        accuracies = list(zip(result.accuracy.values(), result.spread.values(), strict=True))
        cells = [f"{percent(mean)} ± {percent(spread)}" for mean, spread in accuracies[:num_paths]]
        rows[f"probe of {factor}, % (majority {percent(result.majority)})"] = cells
    caption = f"Side by side, the paths have effective rank {found.joined_rank:.1f}."
    if num_paths > 1:
        matrices = {name.replace("_", " "): getattr(found, name) for name in MATRICES}
        matrices |= {f"{kind} maps": matrix_NN for kind, matrix_NN in analysis.map_correlation.items()}
        if errors is not None:
            matrices["misses, kappa"] = torch.from_numpy(errors.kappa)
            matrices["margins, correlation"] = torch.from_numpy(errors.margins)
        angles_NN = torch.zeros(num_paths, num_paths, dtype=torch.float64)
        angles_NN[tuple(found.pairs.T)] = found.angles.mean(dim=1)
        matrices["mean principal angle"] = angles_NN + angles_NN.T
        for name, matrix_NN in matrices.items():
            others_N = (matrix_NN.sum(dim=1) - matrix_NN.diagonal()) / (num_paths - 1)
            rows[name] = [f"{value:.3f}" for value in others_N.tolist()]
        caption += f" The mean angle of random subspaces is {float(found.chance_angles.mean()):.0f} degrees."
    if errors is not None:
        scores = (f"{name.replace('_', ' ')} {percent(score)}" for name, score in errors.scores.items())
        caption += f" hit@1 in percent: {', '.join(scores)}."
    headings = ["", *(f"path {path}" for path in range(num_paths))]
    return text_table("Paths", headings, [[name, *cells] for name, cells in rows.items()], caption=caption)


def figures(analysis: PathAnalysis) -> dict[str, Figure]:
    """Return a picture of every kind of maps, by file name without suffix."""
    return {kind: maps_figure(analysis.pictures, maps, kind) for kind, maps in analysis.maps.items()}


def maps_figure(pictures: Sequence[Image.Image], maps: Sequence[Tensor], title: str) -> Figure:
    """Draw pictures (rows) and each path's map ``[N, height, width]``; a row has one colour scale."""
    num_columns = 1 + len(maps[0])
    figure = new_figure(2.2 * num_columns + 1.0, 2.15 * len(pictures) + 0.8)
    grid = figure.subplots(len(pictures), num_columns, squeeze=False)
    for cells, picture, map_NHW in zip(grid, pictures, maps, strict=False):
        cells[0].imshow(picture)
        extent = (-0.5, picture.width - 0.5, picture.height - 0.5, -0.5)
        for path, map_HW in enumerate(map_NHW):
            cells[1 + path].imshow(picture.convert("L"), cmap="gray", vmin=-160, vmax=255)
            options = {"vmin": 0, "vmax": float(map_NHW.max()), "cmap": "YlOrRd", "alpha": 0.65}
            drawn = cells[1 + path].imshow(map_HW.numpy(), extent=extent, **options)
            grid[0, 1 + path].set_title(f"path {path}", fontsize=11)
        figure.colorbar(drawn, ax=cells[-1], shrink=0.85, format="{x:.2g}")
        for axes in cells:
            axes.set_axis_off()
    figure.suptitle(title, fontsize=12)
    return figure
