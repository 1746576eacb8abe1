from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.tasks import EvalTask, Source, Task
from parallel_decoupling.evaluation.checks import Finding, check_images, check_prompts, check_task, findings
from parallel_decoupling.evaluation.score import TaskScore, path_columns, score_task
from tests.support.scores import values_of_ranks


def aggregate(paths: torch.Tensor) -> torch.Tensor:
    return F.normalize(paths.mean(dim=1), dim=-1)


def found_in(query: torch.Tensor, candidate: torch.Tensor, missing: int = 0) -> list[Finding]:
    """Query n belongs to candidate n; all are candidates of each."""
    size = len(query)
    inputs = [RawInput(str(number)) for number in range(size)]
    rows = [[row, *(x for x in range(size) if x != row)] for row in range(size)]
    task = EvalTask(Task("toy", "vqa", True), inputs, inputs, list(range(size)), rows)
    score = score_task(task, path_columns(query, candidate, aggregate))
    sides = ((query, aggregate(query)), (candidate, aggregate(candidate)))
    return check_task(score, *sides, missing=(missing, 0))


def checks(query: torch.Tensor, candidate: torch.Tensor) -> list[str]:
    return [finding.check for finding in findings(found_in(query, candidate))]


def distinct(rows: int = 24, num_paths: int = 2, dim: int = 16) -> torch.Tensor:
    return F.normalize(torch.randn(rows, num_paths, dim), dim=-1)


def test_good_embeddings_give_no_finding() -> None:
    paths = distinct()
    assert checks(paths, paths) == []


@pytest.mark.parametrize(("hits", "found"), [(10, True), (15, True), (17, False), (50, False)])
def test_chance_has_two_standard_errors(hits: int, found: bool) -> None:
    ranks = {"aggregate": 2 - (torch.arange(100) < hits).long()}
    values = {name: values_of_ranks(rank_R) for name, rank_R in ranks.items()}
    score = TaskScore(Task("toy", "vqa", True), values, torch.zeros(100, 10), 0.1)  # standard error 0.03
    paths = distinct()
    seen = check_task(score, (paths, aggregate(paths)), (paths, aggregate(paths)))
    assert [finding.check for finding in seen] == ["chance"] * found


@pytest.mark.parametrize("equal", [2, 3, 4])
def test_the_two_most_similar_of_several_paths_count(equal: int) -> None:
    paths = distinct(num_paths=4)
    paths[:, 1:equal] = paths[:, :1]
    (found,) = found_in(paths, paths)
    assert found.check == "collapsed_paths"
    assert found.detail == "toy query cosine 1.000 of paths 0 and 1, candidate cosine 1.000 of paths 0 and 1"


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("side", ["query", "candidate"])
def test_equal_embeddings_of_different_inputs_are_found_on_both_sides(noise: float, side: str) -> None:
    one, good = torch.randn(1, 1, 16), distinct(num_paths=1)
    same = F.normalize(one + noise * torch.randn(24, 1, 16), dim=-1)
    found = found_in(same, good) if side == "query" else found_in(good, same)
    (collapsed,) = [each for each in found if each.check == "collapsed_embeddings"]
    assert collapsed.detail.startswith(f"toy {side} cosine")
    assert "," in collapsed.detail
    assert collapsed.detail.count("cosine") == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_are_counted_beyond_the_missing_ones(value: float) -> None:
    paths = distinct()
    query, candidate = paths.clone(), paths.clone()
    query[:2] = torch.nan
    assert "non_finite" not in [each.check for each in found_in(query, candidate, missing=2)]
    query[5, 1, 3] = candidate[7, 0, 0] = candidate[8] = value
    (found,) = [each for each in found_in(query, candidate, missing=2) if each.check == "non_finite"]
    assert found.detail == "toy query 1 of 22 rows, candidate 2 of 24 rows"


def test_embeddings_that_are_all_nan_are_a_finding_and_not_an_error() -> None:
    paths = torch.full((24, 2, 16), torch.nan)
    assert checks(paths, paths) == ["chance", "non_finite"]


def test_another_image_policy_than_in_training_is_found() -> None:
    trained = {"image_size": None, "max_pixels": 100, "batch_size": 3}
    assert check_images(trained, {"max_pixels": 100, "batch_size": 4}) == []
    (found,) = check_images(trained, {"image_size": "low"})
    assert found == Finding(
        "other_images", "image_size: trained None, asked low; max_pixels: trained 100, asked None"
    )


def test_instructions_are_compared_as_tasks_json_has_them(tmp_path: Path) -> None:
    entry = {
        "meta_task": "vqa",
        "in_distribution": True,
        "train_file": "own.csv",
        "query_instruction": "Find",
        "columns": {"query_text": "q", "candidate_text": "c"},
    }
    (tmp_path / "tasks.json").write_text(json.dumps({"own": entry}))
    source = Source(eval_file=tmp_path / "own.csv", query_instruction="Find it")
    both = [RawInput("a"), RawInput("b")]
    task = EvalTask(Task("own", "vqa", True, source=source), both, both, [0], [[0, 1]])
    (found,) = check_prompts(tmp_path, [task])
    assert found == Finding("other_prompts", "own query: trained 'Find', asked 'Find it'", ("own",))
    same = replace(task, task=replace(task.task, source=replace(source, query_instruction="Find")))
    unknown = replace(task, task=replace(task.task, name="other"))
    finished = replace(task, task=Task("GQA", "vqa", False))
    assert check_prompts(tmp_path, [same, unknown, finished]) == []
