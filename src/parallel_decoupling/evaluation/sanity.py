"""Signs that scores are not what they seem: chance, NaN, collapse, pooling before the norm, other prompts.

Here: the checks, each with what to do about it. Deliberately elsewhere: when they run (``training``), how the
report shows them (``report``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel_decoupling.batch import IMAGE_PLACEHOLDER
from parallel_decoupling.data.readers import TrainSubset
from parallel_decoupling.data.tasks import EvalTask, Task, find_train_subsets, read_tasks, task_of_subset
from parallel_decoupling.evaluation.score import TaskScore
from parallel_decoupling.objective.statistics import effective_rank, path_cosine

Check = Literal[
    "chance",
    "non_finite",
    "collapsed_paths",
    "collapsed_embeddings",
    "pre_norm_pooling",
    "prompt_mismatch",
]

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
INSTRUCTION_ENDS = ':.?!"\n'
"""An instruction that a text follows ends with one of these."""
SPECIAL_TOKEN = re.compile(r"<[^<>\s]+>|\[/?[A-Z]+\]")
PROMPT_ROWS = 64
PARAPHRASED_SPLIT = "diverse_instruction"
"""MMEB's training split whose rows have no common instruction."""

ADVICE: dict[Check, str] = {
    "chance": (
        "hit@1 is no better than a random choice. Check that the checkpoint was loaded (--ckpt_path), that "
        "the images reach the model, and that the prompts are those of training."
    ),
    "non_finite": (
        "embeddings are NaN or infinite, and their rows count as misses. Use trainer.precision bf16-mixed or "
        "32-true in place of 16, and check the checkpoint's weights."
    ),
    "collapsed_paths": (
        "paths give nearly the same embedding, so a second one costs as much again and adds little: encode "
        "with one path, or train them apart (mi.kind orthogonal, a higher optimizer.prefix_learning_rate) "
        "and compare the scores. train/path_cosine shows it early."
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
class SideHealth:
    """What the checks need to know of the queries or the candidates of one task.

    Attributes:
        side: ``"query"`` or ``"candidate"``.
        num_rows: embeddings that should be there.
        non_finite: those of them with a NaN or an infinite value.
        path_cosine: mean cosine between the two most similar paths of the same input; None with one path.
        paths: those two.
        mean_cosine: between aggregates of different inputs; None for a few.
        effective_rank: of the aggregates; None for a few.
    """

    side: str
    num_rows: int
    non_finite: int = 0
    path_cosine: float | None = None
    paths: tuple[int, int] = (0, 0)
    mean_cosine: float | None = None
    effective_rank: float | None = None


@dataclass(frozen=True)
class TaskHealth:
    """What the checks need to know of one task.

    Attributes:
        task: its name.
        hit_at_1: of the first column.
        chance: of a random choice.
        num_queries: rows scored.
        sides: queries and candidates.
    """

    task: str
    hit_at_1: float
    chance: float
    num_queries: int
    sides: tuple[SideHealth, ...] = ()


def task_health(score: TaskScore, sides: Iterable[SideHealth]) -> TaskHealth:
    """Put together what is known of a scored task."""
    hits = next(iter(score.hits.values()))
    return TaskHealth(score.task.name, float(hits.float().mean()), score.chance, len(hits), tuple(sides))


def side_health(side: str, paths: Tensor, aggregate_UD: Tensor, num_missing: int = 0) -> SideHealth:
    """Measure one side of a task; costs a singular value decomposition of a few hundred rows.

    Args:
        side: ``"query"`` or ``"candidate"``.
        paths: ``[U, N, D]``; rows that are not finite are left out of all but their count.
        aggregate_UD: of these paths.
        num_missing: rows that could not be read, which are NaN and no fault of the model.
    """
    finite_U = paths.flatten(1).isfinite().all(dim=1) & aggregate_UD.isfinite().all(dim=1)
    sampled, num_paths = _sample(paths[finite_U]), paths.shape[1]
    closest, pair = None, (0, 0)
    if num_paths > 1 and len(sampled):
        cosine_NN = path_cosine(sampled)
        pair = max(combinations(range(num_paths), 2), key=lambda both: float(cosine_NN[both]))
        closest = float(cosine_NN[pair])
    aggregates = _sample(aggregate_UD[finite_U].float())
    mean_cosine = rank = None
    if len(aggregates) >= FEWEST_ROWS:
        unit = F.normalize(torch.unique(aggregates, dim=0), dim=-1)
        count, total = len(unit), float(unit.double().sum(dim=0).square().sum())
        mean_cosine = 1.0 if count == 1 else (total - count) / (count * (count - 1))
        rank = 1.0 if count == 1 else float(effective_rank(unit))
    non_finite = int((~finite_U).sum()) - num_missing
    return SideHealth(side, len(paths) - num_missing, non_finite, closest, pair, mean_cosine, rank)


def findings(tasks: Sequence[TaskHealth]) -> list[Finding]:
    """Judge the tasks of a run.

    A score is at chance up to two standard errors of a random choice above it.

    Returns:
        At most one finding per check, naming its tasks.
    """
    details: dict[Check, dict[str, list[str]]] = {}
    for task in tasks:
        if task.hit_at_1 <= _chance_limit(task):
            seen = f"{100 * task.hit_at_1:.1f} % (chance {100 * task.chance:.1f} %)"
            details.setdefault("chance", {})[task.task] = [seen]
        for side in task.sides:
            for check, seen in _side_findings(side):
                details.setdefault(check, {}).setdefault(task.task, []).append(seen)
    return [
        Finding(
            check,
            "; ".join(f"{task} {', '.join(seen)}" for task, seen in details[check].items()),
            tuple(details[check]),
        )
        for check in ADVICE
        if check in details
    ]


def _side_findings(side: SideHealth) -> list[tuple[Check, str]]:
    found: list[tuple[Check, str]] = []
    if side.non_finite:
        found.append(("non_finite", f"{side.side} {side.non_finite} of {side.num_rows} rows"))
    if side.path_cosine is not None and side.path_cosine > SAME:
        first, second = side.paths
        found.append(
            ("collapsed_paths", f"{side.side} cosine {side.path_cosine:.3f} of paths {first} and {second}")
        )
    cosine, rank = side.mean_cosine, side.effective_rank
    if cosine is not None and rank is not None and (cosine > SAME or rank < LOW_RANK):
        seen = f"{side.side} cosine {cosine:.3f}, effective rank {rank:.1f}"
        found.append(("collapsed_embeddings", seen))
    return found


def _chance_limit(each: TaskHealth) -> float:
    error = (each.chance * (1 - each.chance) / each.num_queries) ** 0.5
    return each.chance + CHANCE_ERRORS * error if each.chance < 1 else 1.0


def _sample(rows: Tensor) -> Tensor:
    """Evenly spaced rows."""
    return rows[:: max(1, -(-len(rows) // SAMPLED_ROWS))]


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

    @property
    def waiting(self) -> bool:
        """Whether it still watches for its first call."""
        return bool(self._hooks)

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

    The instructions of your own data are in ``tasks.json``. Of MMEB's finished prompts they are guessed: what
    the first prompts of a side have in common at their start or end, up to a mark that ends a sentence.
    Subsets that are not there are passed over.

    Args:
        data_dir: of training.
        split: of training; nothing is missing from paraphrased instructions.
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
        name = task.task.name
        if name not in subset_of:
            continue
        found = _own_mismatch(known[name], task.task)
        if found is None:
            subset = TrainSubset(data_dir, subset_of[name], split, must_exist=False)
            rows = [subset[row] for row in range(0, len(subset), max(1, len(subset) // PROMPT_ROWS))]
            paraphrased = split == PARAPHRASED_SPLIT
            found = {
                side: _mismatch([row.text for row in trained], [row.text for row in asked], paraphrased)
                for side, trained, asked in (
                    ("query", [row.query for row in rows], task.queries[:PROMPT_ROWS]),
                    ("candidate", [row.candidate for row in rows], task.candidates[:PROMPT_ROWS]),
                )
            }
        details += [f"{name} {side}: {seen}" for side, seen in found.items() if seen]
        where += [name for seen in found.values() if seen]
    if not details:
        return []
    return [Finding("prompt_mismatch", "; ".join(details), tuple(dict.fromkeys(where)))]


def _own_mismatch(trained: Task, asked: Task) -> dict[str, str] | None:
    """What differs by side for a task whose instructions are in ``tasks.json``; None for another one."""
    ours, theirs = trained.source, asked.source
    if ours is None or theirs is None or ours.train_file is None or theirs.eval_file is None:
        return None
    sides = {
        "query": (ours.query_instruction, theirs.query_instruction),
        "candidate": (ours.candidate_instruction, theirs.candidate_instruction),
    }
    return {side: _difference(*both) if both[0] != both[1] else "" for side, both in sides.items()}


def _mismatch(trained: Sequence[str], asked: Sequence[str], paraphrased: bool) -> str:
    """How the prompts of evaluation differ from those of training; "" if they do not."""
    for backwards in (False, True):
        ours, theirs = _instruction(trained, backwards), _instruction(asked, backwards)
        if ours and theirs:
            common = len(os.path.commonprefix([text[::-1] if backwards else text for text in (ours, theirs)]))
            differ = common < min(len(ours), len(theirs))
        else:
            instruction, others = ours or theirs, asked if ours else trained
            has = str.endswith if backwards else str.startswith
            absent = bool(instruction) and not any(has(text, instruction) for text in others)
            differ = absent and not (theirs and paraphrased)
        if differ:
            return _difference(ours, theirs)
    endings = [{_ending(text) for text in texts} for texts in (trained, asked)]
    if endings[0].isdisjoint(endings[1]):
        return _difference(*("".join(min(each)) for each in endings)) + " at the end"
    return ""


def _instruction(texts: Sequence[str], backwards: bool) -> str:
    """The common start (or end) of texts up to the last mark that ends a sentence.

    "" for a single text, and if it is too short to be an instruction.
    """
    if len(texts) < 2:
        return ""
    common = os.path.commonprefix(sorted({text[::-1] if backwards else text for text in texts}))
    common = common[: 1 + max(common.rfind(mark) for mark in INSTRUCTION_ENDS)]
    common = common[::-1] if backwards else common
    return common if len(common.replace(IMAGE_PLACEHOLDER, "").strip()) >= SHORTEST_INSTRUCTION else ""


def _ending(text: str) -> tuple[str, str]:
    """Special tokens of a text, as chat templates add, and the whitespace at its end."""
    special = SPECIAL_TOKEN.findall(text.replace(IMAGE_PLACEHOLDER, ""))
    return " ".join(special), text[len(text.rstrip()) :]


def _difference(trained: str, asked: str) -> str:
    return f"trained {_short(trained)}, asked {_short(asked)}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:97]}...")
