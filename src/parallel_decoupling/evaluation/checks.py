"""Signs that scores are misleading: chance, NaN, collapse, other images or prompts than in training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_decoupling.data.images import IMAGE_SETTINGS
from parallel_decoupling.data.tasks import EvalTask, read_tasks
from parallel_decoupling.evaluation.score import TaskResult
from parallel_decoupling.objective.statistics import effective_rank, path_cosine

SAMPLED_ROWS = 512
SAME = 0.99  # mean cosine from which paths, or the embeddings of different inputs, count as one
LOW_RANK = 2.0  # effective rank below which many embeddings lie on a line
FEWEST_ROWS = 8  # fewer embeddings say nothing about their spread
CHANCE_ERRORS = 2.0  # standard errors above chance that a score must exceed

ADVICE = {
    "chance": "hit@1 is not above that of a random choice. Check that the checkpoint was loaded "
    "(--ckpt_path), that the images reach the model, and that the prompts are those of training.",
    "non_finite": "embeddings are NaN or infinite, and their rows count as misses. Use trainer.precision "
    "bf16-mixed or 32-true in place of 16, and check the checkpoint's weights.",
    "collapsed_paths": "paths give nearly the same embedding: encode with one path, or train them apart "
    "(mi.kind orthogonal, a higher optimizer.prefix_learning_rate).",
    "collapsed_embeddings": "different inputs have nearly the same embedding. Lower the learning rate or "
    "mi_weight, and check that texts and images differ after tokenisation.",
    "other_images": "images are resized differently than in training. Use the checkpoint's image settings.",
    "other_prompts": "instructions differ from those of training. Use the checkpoint's tasks.json.",
}
Side = tuple[Tensor, Tensor]  # paths [U, N, D] and their aggregate [U, D']


@dataclass(frozen=True)
class Finding:
    """One thing that makes scores doubtful: what was seen, and in which tasks; none is the whole run."""

    check: str
    detail: str
    tasks: tuple[str, ...] = ()


def check_task(
    score: TaskResult, queries: Side, candidates: Side, *, missing: tuple[int, int] = (0, 0)
) -> list[Finding]:
    """Judge one task by its first column; ``missing`` inputs could not be read, and their rows are NaN."""
    found: dict[str, list[str]] = {}
    hit_at_1, chance = next(iter(score.hit_at_1.values())), score.chance
    error = (chance * (1 - chance) / score.num_queries) ** 0.5
    if hit_at_1 <= min(1.0, chance + CHANCE_ERRORS * error):
        found["chance"] = [f"{100 * hit_at_1:.1f} % (chance {100 * chance:.1f} %)"]
    for side, embeddings, unread in zip(("query", "candidate"), (queries, candidates), missing, strict=True):
        for check, seen in _check_embeddings(*embeddings, unread):
            found.setdefault(check, []).append(f"{side} {seen}")
    name = score.task.name
    return [Finding(check, f"{name} {', '.join(seen)}", (name,)) for check, seen in found.items()]


def findings(of_tasks: Sequence[Finding]) -> list[Finding]:
    """Join the findings of tasks: at most one per check, naming its tasks."""
    joined = []
    for check in ADVICE:
        if found := [each for each in of_tasks if each.check == check]:
            names = tuple(name for each in found for name in each.tasks)
            joined.append(Finding(check, "; ".join(each.detail for each in found), names))
    return joined


def check_images(trained: Mapping[str, Any], asked: Mapping[str, Any]) -> list[Finding]:
    """Compare the settings of the image policy; one that is absent counts as not set."""
    values = {name: (trained.get(name), asked.get(name)) for name in IMAGE_SETTINGS}
    changed = [f"{name}: trained {old}, asked {new}" for name, (old, new) in values.items() if old != new]
    return [Finding("other_images", "; ".join(changed))] if changed else []


def check_prompts(train_dir: str | Path, tasks: Sequence[EvalTask]) -> list[Finding]:
    """Compare the instructions of tasks with those that ``tasks.json`` of the training data has for them."""
    known = read_tasks(train_dir)
    found = []
    for task in (each.task for each in tasks):
        trained = known[task.name].source if task.name in known else None
        if trained is None or task.source is None or trained.train_file is None:
            continue
        for side in ("query", "candidate"):
            before, now = (getattr(source, f"{side}_instruction") for source in (trained, task.source))
            if before != now:
                detail = f"{task.name} {side}: trained {before!r:.100}, asked {now!r:.100}"
                found.append(Finding("other_prompts", detail, (task.name,)))
    return found


def _check_embeddings(paths_UND: Tensor, aggregate_UD: Tensor, unread: int) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    finite_U = paths_UND.flatten(1).isfinite().all(dim=1) & aggregate_UD.isfinite().all(dim=1)
    if broken := int((~finite_U).sum()) - unread:
        found.append(("non_finite", f"{broken} of {len(paths_UND) - unread} rows"))
    step = max(1, -(-int(finite_U.sum()) // SAMPLED_ROWS))
    sampled_UND, sampled_UD = paths_UND[finite_U][::step], aggregate_UD[finite_U][::step].float()
    if sampled_UND.shape[1] > 1 and len(sampled_UND):
        cosine_NN = path_cosine(sampled_UND)
        first, second = max(combinations(range(len(cosine_NN)), 2), key=lambda both: float(cosine_NN[both]))
        if (cosine := float(cosine_NN[first, second])) > SAME:
            found.append(("collapsed_paths", f"cosine {cosine:.3f} of paths {first} and {second}"))
    if len(sampled_UD) >= FEWEST_ROWS:
        unit_UD = F.normalize(torch.unique(sampled_UD, dim=0), dim=-1)
        count, total = len(unit_UD), float(unit_UD.double().sum(dim=0).square().sum())
        cosine = 1.0 if count == 1 else (total - count) / (count * (count - 1))
        rank = 1.0 if count == 1 else float(effective_rank(unit_UD))
        if cosine > SAME or rank < LOW_RANK:
            found.append(("collapsed_embeddings", f"cosine {cosine:.3f}, effective rank {rank:.1f}"))
    return found
