"""Measure how noisy the gradient is that an encoder's prefixes take from each estimator.

``python -m studies prefix_gradients`` takes two runs of the study ``help``: one with vCLUB, and one without
a penalty, in which q was only fitted. It trains those that are missing, some minutes each; the rest takes
some minutes.
``studies.estimators`` asks the same of Gaussians, where the exact gradient is known.

Batches of the run's training rows, in an order that the run has not seen, go through the trained encoder.
Each gives one gradient of the contrastive terms (as in the loss) and one of every estimator (weight 1, q as
the run has fitted it) with respect to all prefixes. Over these batches:

- noise: root of the summed variance over the norm of the mean gradient;
- one against the others: cosine between a batch's gradient and the mean of all others, the mean over batches;
- size: norm of the mean gradient, in units of that of the contrastive terms;
- agreement: cosine between the mean gradient and that of the contrastive terms; below 0 a step along one
  undoes a part of the other.

Norms of means are without what the noise adds to them.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from matplotlib.ticker import LogLocator, NullLocator
from rich.progress import track
from torch import Tensor, nn

from parallel_decoupling.batch import PairBatch
from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.evaluation.plots import COLOURS, clean_axes, new_figure
from parallel_decoupling.model.run_checkpoint import read_checkpoint
from parallel_decoupling.objective.vclub import MutualInformation
from parallel_decoupling.training.grad_cache import encode_in_chunks
from parallel_decoupling.training.module import PDFEmbedder
from parallel_decoupling.training.terms import contrastive_terms, gather_pairs, mutual_information_terms
from studies.estimators import KINDS, norm_and_variance
from studies.results import code_version, commit_name
from studies.study import Run, load_study
from studies.study_plots import DPI, shared_legend
from studies.worker import ensure_scored

STUDY, CELLS, SEED = "help", ("pdf", "without_mim"), 4
ORDER_SEED, NUM_BATCHES = 1_000_000, 24
CONTRASTIVE = "contrastive"
Gradients = Mapping[str, Tensor]
"""By term, with respect to all W numbers of the prefixes: ``[W]`` of one batch, ``[S, W]`` of S batches."""


def run(output_dir: Path) -> None:
    """Train what is missing of the study's runs, then measure and write results, table and picture.

    Args:
        output_dir: must exist; gets ``results.json``, ``table.md`` and ``gradients.png``.
    """
    study = load_study(STUDY)
    runs = [Run(STUDY, study.cells[cell], SEED) for cell in CELLS]
    for each in runs:
        ensure_scored(each)
    torch.set_num_threads(1)
    write(output_dir, {each.name: each.folder / "checkpoints" / "last.ckpt" for each in runs})


def write(output_dir: Path, checkpoints: Mapping[str, Path], num_batches: int = NUM_BATCHES) -> None:
    """Measure checkpoints, by name, and write results, table and picture."""
    start, commit = time.perf_counter(), commit_name(*code_version())
    rows = [
        {"run": name, **row}
        for name, file in checkpoints.items()
        for row in measure(*_loaded(file, num_batches))
    ]
    results = {
        "study": "prefix_gradients",
        "command": "python -m studies prefix_gradients",
        "commit": commit,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "seconds": round(time.perf_counter() - start, 1),
        "batches": num_batches,
        "rows": rows,
    }
    (output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (output_dir / "table.md").write_text(_table(results), encoding="utf-8")
    _write_figure(rows, output_dir / "gradients.png")


def _loaded(checkpoint_file: Path, num_batches: int) -> tuple[PDFEmbedder, list[PairBatch]]:
    """Load a trained module, without dropout, and batches of its training rows in another order."""
    module = PDFEmbedder.load_from_checkpoint(checkpoint_file, map_location="cpu").eval()
    data = MMEBDataModule(**read_checkpoint(checkpoint_file)["data"]).connect(module)
    data.prepare_data()
    data.setup("fit")  # the run's seed draws its rows
    data.seed = ORDER_SEED
    return module, list(islice(data.train_dataloader(), num_batches))


def measure(module: PDFEmbedder, batches: Sequence[PairBatch]) -> list[dict[str, Any]]:
    """Measure noise, size and agreement of the gradients, one row per term.

    Args:
        module: with several paths, and a fitted q for the kinds that need one.
        batches: at least 2.
    """
    estimators = with_network_of(module.mutual_information)
    tracked: Iterable[PairBatch] = track(batches, description="batches")
    per_batch = [gradients(module, batch, estimators) for batch in tracked]
    gradient_SW = {term: torch.stack([each[term] for each in per_batch]).double() for term in per_batch[0]}
    return [summary(term, gradient_SW) for term in gradient_SW]


def with_network_of(fitted: MutualInformation) -> dict[str, MutualInformation]:
    """Return every kind of estimator; those that need a q take the fitted one."""
    found = {}
    for kind in KINDS:
        estimator = MutualInformation(kind, num_paths=fitted.num_paths, embed_dim=fitted.embed_dim)
        if estimator.needs_fit:
            assert fitted.network is not None, "the run has no q"
            estimator.network = fitted.network
        found[kind] = estimator
    return found


def gradients(
    module: PDFEmbedder, batch: PairBatch, estimators: Mapping[str, MutualInformation]
) -> Gradients:
    """Return the gradients of one batch by term: ``contrastive`` and every estimator."""
    query, candidate = (
        encode_in_chunks(module.encoder, inputs, chunk_size=None, seed_parts=(0,)).embeddings
        for inputs in (batch.query, batch.candidate)
    )
    pairs = gather_pairs(query, candidate, batch.candidate_ids, module.encoder.aggregate, module.nested_dims)
    weight, options = module.hparams["aggregate_weight"], {"symmetric": module.hparams["symmetric"]}
    path_N, aggregate = contrastive_terms(pairs, module.temperature, with_aggregate=weight > 0, **options)
    terms = {CONTRASTIVE: path_N.mean() + weight * aggregate}
    terms |= {kind: mutual_information_terms(each, pairs).mean() for kind, each in estimators.items()}
    prefixes = module.encoder.parameter_groups()["prefixes"]
    return {
        term: torch.cat([part.flatten() for part in torch.autograd.grad(value, prefixes, retain_graph=True)])
        for term, value in terms.items()
    }


def summary(term: str, gradient_SW: Gradients) -> dict[str, Any]:
    """Return one row of the table, from S batches."""
    own_SW, reference_SW = gradient_SW[term], gradient_SW[CONTRASTIVE]
    norm, variance = norm_and_variance(own_SW)
    reference_norm, _ = norm_and_variance(reference_SW)
    cosine = nn.functional.cosine_similarity
    others_SW = (own_SW.sum(dim=0) - own_SW) / (len(own_SW) - 1)
    return {
        "term": term,
        "noise": math.sqrt(variance) / norm if norm else None,
        "one_against_others": float(cosine(own_SW, others_SW, dim=1).mean()),
        "size": norm / reference_norm if reference_norm else None,
        "agreement": float(cosine(own_SW.mean(dim=0), reference_SW.mean(dim=0), dim=0)),
    }


COLUMNS = {
    "noise": "noise",
    "one_against_others": "one against the others",
    "size": "size",
    "agreement": "agreement",
}
"""Measured values and their headings."""


def _table(results: Mapping[str, Any]) -> str:
    lines = [
        f"`{results['command']}`, commit {results['commit']}, {results['machine']}, {results['seconds']} s; "
        f"{results['batches']} batches per run.",
        "",
        f"| run | term | {' | '.join(COLUMNS.values())} |",
        "| --- | --- |" + " ---: |" * len(COLUMNS),
    ]
    for row in results["rows"]:
        values = [f"{row[key]:.2f}" if row[key] is not None else "–" for key in COLUMNS]
        lines.append(f"| {row['run']} | {row['term']} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def _write_figure(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw noise and agreement of every term, with a colour per run."""
    runs, terms = (list(dict.fromkeys(row[key] for row in rows)) for key in ("run", "term"))
    panels = {
        "noise": "noise over the norm of the mean, logarithmic",
        "agreement": "cosine to the contrastive gradient",
    }
    figure = new_figure(10.0, 1.6 + 0.42 * len(terms))
    for axes, (key, title) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for name, colour in zip(runs, COLOURS[1:], strict=False):
            known = [row for row in rows if row["run"] == name and row[key] is not None]
            places = [terms.index(row["term"]) for row in known]
            axes.plot([row[key] for row in known], places, "o", color=colour, label=name)
        axes.set_xlabel(title)
        axes.set_yticks(range(len(terms)), terms)
        clean_axes(axes, "x")
    figure.axes[0].set_xscale("log")
    figure.axes[0].margins(x=0.1)
    figure.axes[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    figure.axes[0].xaxis.set_minor_locator(NullLocator())
    figure.axes[0].xaxis.set_major_formatter("{x:g}")
    figure.axes[0].invert_yaxis()
    shared_legend(figure, len(runs))
    figure.savefig(file, dpi=DPI)
