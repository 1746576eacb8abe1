from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.readers import read_eval_task
from parallel_decoupling.data.tasks import EvalTask, Task
from parallel_decoupling.model.build import build_encoder
from parallel_decoupling.retrieval.modes import path_columns
from parallel_decoupling.retrieval.sanity import (
    FinalNormCheck,
    TaskHealth,
    findings,
    prompt_mismatches,
    task_health,
)
from parallel_decoupling.retrieval.score import score_task
from tests.support.mmeb import save_tiny_mmeb


def aggregate(paths: torch.Tensor) -> torch.Tensor:
    return F.normalize(paths.mean(dim=1), dim=-1)


def health(query: torch.Tensor, candidate: torch.Tensor) -> TaskHealth:
    """Query n belongs to candidate n; all are candidates of each."""
    size = len(query)
    inputs = [RawInput(str(number)) for number in range(size)]
    rows = [[row, *(x for x in range(size) if x != row)] for row in range(size)]
    task = EvalTask(Task("toy", "vqa", True), inputs, inputs, list(range(size)), rows)
    score = score_task(task, path_columns(query, candidate, aggregate))
    return task_health(score, query, candidate, aggregate(candidate))


def checks(each: TaskHealth) -> list[str]:
    return [finding.check for finding in findings([each])]


def distinct(rows: int = 24, num_paths: int = 2, dim: int = 16) -> torch.Tensor:
    return F.normalize(torch.randn(rows, num_paths, dim), dim=-1)


def test_good_embeddings_give_no_finding() -> None:
    paths = distinct()
    assert checks(health(paths, paths)) == []


def test_random_scores_are_at_chance() -> None:
    each = health(distinct(), distinct())
    assert checks(each) == ["chance"]
    assert "toy" in findings([each])[0].detail


@pytest.mark.parametrize(("hits", "found"), [(0.10, True), (0.15, True), (0.17, False), (0.5, False)])
def test_chance_has_two_standard_errors(hits: float, found: bool) -> None:
    each = TaskHealth("toy", hits, 0.1, 100, None, None, None)  # standard error 0.03
    assert (checks(each) == ["chance"]) == found


def test_equal_paths_are_found_and_one_path_is_not() -> None:
    paths = distinct(num_paths=1)
    assert checks(health(paths, paths)) == []
    same = paths.expand(-1, 3, -1).contiguous()
    assert checks(health(same, same)) == ["collapsed_paths"]


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_equal_embeddings_of_different_inputs_are_found(noise: float) -> None:
    one = torch.randn(1, 1, 16)
    paths = F.normalize(one + noise * torch.randn(24, 1, 16), dim=-1)
    assert "collapsed_embeddings" in checks(health(paths, paths))


def test_embeddings_on_a_line_are_found() -> None:
    angle = torch.linspace(-0.7, 0.7, 24)
    line = torch.stack([torch.ones(24), angle], dim=1).unsqueeze(1)
    assert "collapsed_embeddings" in checks(health(line, line))


def test_unreadable_rows_do_not_count() -> None:
    paths = distinct()
    found = health(paths, paths)
    paths[3] = torch.nan
    assert health(paths, paths).path_cosine == pytest.approx(found.path_cosine, abs=0.05)


class PreNorm(nn.Module):
    """A backbone that gives the states before its language model's final norm."""

    def __init__(self, after: bool) -> None:
        super().__init__()
        self.language_model = nn.Module()
        self.language_model.norm = nn.RMSNorm(4)
        self.after = after

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        normed = self.language_model.norm(states)
        return normed if self.after else states


@pytest.mark.parametrize("after", [True, False])
def test_pooling_before_the_norm_is_found(after: bool) -> None:
    backbone = PreNorm(after)
    check = FinalNormCheck(backbone)
    assert check.findings() == []
    backbone(torch.randn(2, 3, 4))
    assert check.after_norm is after
    assert [finding.check for finding in check.findings()] == ([] if after else ["pre_norm_pooling"])
    assert not backbone._forward_hooks
    assert not backbone.language_model.norm._forward_hooks


def test_the_real_backbone_pools_after_the_norm(tiny_backbone_dir: str) -> None:
    from parallel_decoupling.retrieval.embedder import Embedder

    paths = {"num_paths": 2, "prefix_length": 3, "prefix_layers": 0, "prefix_init": "random"}
    encoder = build_encoder(tiny_backbone_dir, {}, {**paths, "aggregation": "mean", "seed": 0})
    check = FinalNormCheck(encoder.backbone)
    Embedder(encoder).encode(["a red picture", "blue"])
    assert check.after_norm is True


def test_changed_instructions_are_found_and_equal_ones_are_not(tmp_path: Path) -> None:
    data_dir = save_tiny_mmeb(tmp_path / "data")
    tasks = [read_eval_task(data_dir, name) for name in ("colours_i2t", "colours_t2i")]
    assert prompt_mismatches(data_dir, "original", tasks) == []
    for changed in (" what colour is the picture?\n", "\nname the colour of this picture\n"):
        other = [
            RawInput(row.text.replace("\nwhat colour is the picture?\n", changed)) for row in tasks[0].queries
        ]
        task = EvalTask(tasks[0].task, other, tasks[0].candidates, *_rows(tasks[0]))
        (found,) = prompt_mismatches(data_dir, "original", [task, tasks[1]])
        assert found.tasks == ("colours_i2t",)
        assert repr(changed)[1:-1] in found.detail
        assert "advice" in found.plain()
    assert prompt_mismatches(data_dir, "diverse_instruction", tasks) == []


def _rows(task: EvalTask) -> tuple[list[int], list[list[int]]]:
    return task.query_of_row, task.candidates_of_row
