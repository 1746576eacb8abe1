"""Signs that scores are not what they seem: chance, collapse, pooling before the norm, other prompts.

Here: the checks, each with what to do about it. Deliberately elsewhere: when they run (``training``), how the
report shows them (``report``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel_decoupling.batch import IMAGE_PLACEHOLDER
from parallel_decoupling.data.readers import TrainSubset
from parallel_decoupling.data.tasks import EvalTask, find_train_subsets, read_tasks, task_of_subset
from parallel_decoupling.objective.statistics import effective_rank, path_cosine
from parallel_decoupling.retrieval.score import TaskScore

Check = Literal["chance", "collapsed_paths", "collapsed_embeddings", "pre_norm_pooling", "prompt_mismatch"]

SAMPLED_ROWS = 512
SAME = 0.99
"""Mean cosine from which paths, or the embeddings of different inputs, count as one."""
LOW_RANK = 2.0
"""Effective rank below which many embeddings lie on a line."""
FEWEST_ROWS = 8
"""Fewer embeddings say nothing about their spread."""
CHANCE_ERRORS = 2.0
"""Standard errors above chance up to which a score is no better than chance."""
SHORTEST_INSTRUCTION = 12
PROMPT_ROWS = 64

ADVICE: dict[Check, str] = {
    "chance": (
        "hit@1 is no better than a random choice. Check that the checkpoint was loaded (--ckpt_path), that "
        "the images reach the model, and that the prompts are those of training."
    ),
    "collapsed_paths": (
        "all paths give the same embedding, so N paths cost N times as much and add nothing. Raise "
        "optimizer.prefix_learning_rate or mi_weight; look at train/path_cosine."
    ),
    "collapsed_embeddings": (
        "different inputs have nearly the same embedding. Lower the learning rate or mi_weight, and check "
        "that texts and images differ after tokenisation."
    ),
    "pre_norm_pooling": (
        "the pooled state is not the output of the final norm, which is known to cost 2 to 7 points. Give "
        "the backbone's family the base model's language model, whose last_hidden_state is after the norm."
    ),
    "prompt_mismatch": (
        "instructions of evaluation and training differ. Use the data and the split that the checkpoint was "
        "trained with, or expect lower scores."
    ),
}


@dataclass(frozen=True)
class Finding:
    """One thing that makes scores doubtful.

    Attributes:
        check: what was looked at.
        detail: what was seen, with numbers.
        tasks: where; empty for the whole run.
    """

    check: Check
    detail: str
    tasks: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """Plain values for ``scores.json``, with the advice."""
        return {**asdict(self), "tasks": list(self.tasks), "advice": ADVICE[self.check]}


@dataclass(frozen=True)
class TaskHealth:
    """What the checks need to know of one task.

    Attributes:
        task: its name.
        hit_at_1: of the first column.
        chance: of a random choice.
        num_queries: rows scored.
        path_cosine: mean cosine between different paths of the same input; None with one path.
        mean_cosine: between aggregates of different candidates; None for a few.
        effective_rank: of the candidates' aggregates; None for a few.
    """

    task: str
    hit_at_1: float
    chance: float
    num_queries: int
    path_cosine: float | None
    mean_cosine: float | None
    effective_rank: float | None


def task_health(score: TaskScore, query: Tensor, candidate: Tensor, aggregate_UD: Tensor) -> TaskHealth:
    """Measure one task; costs a singular value decomposition of a few hundred rows.

    Args:
        score: of the task.
        query: ``[Uq, N, D]``; rows that could not be read are NaN and left out.
        candidate: ``[Uc, N, D]``.
        aggregate_UD: of the candidates.
    """
    paths = torch.cat([_sample(query), _sample(candidate)])
    num_paths = paths.shape[1]
    between = None
    if num_paths > 1 and len(paths):
        cosine_NN = path_cosine(paths)
        between = float((cosine_NN.sum() - cosine_NN.trace()) / (num_paths * (num_paths - 1)))
    unit = F.normalize(torch.unique(_sample(aggregate_UD.float()), dim=0), dim=-1)
    mean_cosine = rank = None
    if len(aggregate_UD) >= FEWEST_ROWS and len(unit):
        count = len(unit)
        total = float(unit.double().sum(dim=0).square().sum())
        mean_cosine = 1.0 if count == 1 else (total - count) / (count * (count - 1))
        rank = 1.0 if count == 1 else float(effective_rank(unit))
    hits = next(iter(score.hits.values()))
    hit_at_1 = float(hits.float().mean())
    return TaskHealth(score.task.name, hit_at_1, score.chance, len(hits), between, mean_cosine, rank)


def findings(tasks: Sequence[TaskHealth]) -> list[Finding]:
    """Judge the tasks of a run.

    A score is at chance up to two standard errors of a random choice above it.

    Returns:
        At most one finding per check, naming its tasks.
    """

    def found(
        check: Check, detail: Callable[[TaskHealth], str], where: Iterable[TaskHealth]
    ) -> list[Finding]:
        hit = list(where)
        if not hit:
            return []
        return [Finding(check, "; ".join(map(detail, hit)), tuple(each.task for each in hit))]

    return [
        *found(
            "chance",
            lambda each: f"{each.task} {100 * each.hit_at_1:.1f} % (chance {100 * each.chance:.1f} %)",
            (each for each in tasks if each.hit_at_1 <= _chance_limit(each)),
        ),
        *found(
            "collapsed_paths",
            lambda each: f"{each.task} cosine {each.path_cosine:.3f}",
            (each for each in tasks if each.path_cosine is not None and each.path_cosine > SAME),
        ),
        *found(
            "collapsed_embeddings",
            lambda each: (
                f"{each.task} cosine {each.mean_cosine:.3f}, effective rank {each.effective_rank:.1f}"
            ),
            (
                each
                for each in tasks
                if each.mean_cosine is not None
                and each.effective_rank is not None
                and (each.mean_cosine > SAME or each.effective_rank < LOW_RANK)
            ),
        ),
    ]


def _chance_limit(each: TaskHealth) -> float:
    error = (each.chance * (1 - each.chance) / each.num_queries) ** 0.5
    return each.chance + CHANCE_ERRORS * error if each.chance < 1 else 1.0


def _sample(rows: Tensor) -> Tensor:
    """Evenly spaced finite rows."""
    finite = rows[rows.flatten(1).isfinite().all(dim=1)]
    return finite[:: max(1, -(-len(finite) // SAMPLED_ROWS))]


class FinalNormCheck:
    """Whether a backbone's output is its final norm's output: watches one forward call.

    Args:
        backbone: calling it gives ``[R, L, D]`` states; its ``language_model`` has the norm.

    Attributes:
        after_norm: None until a call was seen, or if no module is recognised as the final norm.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.after_norm: bool | None = None
        self._normed: list[Tensor] = []
        self._hooks = []
        language_model = getattr(backbone, "language_model", None)
        norm = None if language_model is None else getattr(language_model, "norm", None)
        if isinstance(norm, nn.Module):
            self._hooks = [
                norm.register_forward_hook(lambda module, args, output: self._normed.append(output.detach())),
                backbone.register_forward_hook(lambda module, args, output: self._compare(output)),
            ]

    def _compare(self, states: Tensor) -> None:
        if self._normed:
            normed = self._normed[-1]
            self.after_norm = normed.shape == states.shape and torch.equal(normed, states)
        self.remove()

    def remove(self) -> None:
        """Stop watching; it also stops by itself after the first call."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._normed = [], []

    def findings(self) -> list[Finding]:
        """A finding if the states were not the norm's output."""
        if self.after_norm is not False:
            return []
        return [Finding("pre_norm_pooling", "output of the backbone differs from that of its final norm")]


def prompt_mismatches(data_dir: str | Path, split: str, tasks: Sequence[EvalTask]) -> list[Finding]:
    """Compare the instructions of evaluation tasks with those of the training subsets of the same name.

    An instruction is what the first prompts of a side have in common, image placeholder and whitespace
    included. Where it is short (paraphrased instructions, plain texts) or a subset is not there, nothing is
    said.

    Args:
        data_dir: of training.
        split: of training.
        tasks: to be scored.
    """
    known = read_tasks(data_dir)
    subset_of = {}
    for name in find_train_subsets(data_dir, split):
        trained_task = task_of_subset(known, name)
        if trained_task is not None:
            subset_of[trained_task.name] = name
    details, where = [], []
    for task in tasks:
        subset_name = subset_of.get(task.task.name)
        if subset_name is None:
            continue
        subset = TrainSubset(data_dir, subset_name, split)
        rows = [subset[row] for row in range(0, len(subset), max(1, len(subset) // PROMPT_ROWS))]
        for side, trained, asked in (
            ("query", [row.query.text for row in rows], [row.text for row in task.queries[:PROMPT_ROWS]]),
            (
                "candidate",
                [row.candidate.text for row in rows],
                [row.text for row in task.candidates[:PROMPT_ROWS]],
            ),
        ):
            ours, theirs = _instruction(trained), _instruction(asked)
            if ours and theirs and not (ours.startswith(theirs) or theirs.startswith(ours)):
                details.append(f"{task.task.name} {side}: trained {_short(ours)}, asked {_short(theirs)}")
                where.append(task.task.name)
    if not details:
        return []
    return [Finding("prompt_mismatch", "; ".join(details), tuple(dict.fromkeys(where)))]


def _instruction(texts: Sequence[str]) -> str:
    """The common start of texts, "" if it is too short to be an instruction."""
    distinct = sorted(set(texts))
    if len(distinct) == 1 and len(texts) == 1:
        return ""
    start = os.path.commonprefix(distinct)
    return start if len(start.replace(IMAGE_PLACEHOLDER, "").strip()) >= SHORTEST_INSTRUCTION else ""


def _short(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:97]}...")
