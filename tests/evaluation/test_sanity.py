from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.readers import read_eval_task
from parallel_decoupling.data.sources import Source
from parallel_decoupling.data.tasks import EvalTask, Task
from parallel_decoupling.evaluation.modes import path_columns
from parallel_decoupling.evaluation.sanity import (
    FinalNormCheck,
    SideHealth,
    TaskHealth,
    findings,
    prompt_mismatches,
    side_health,
    task_health,
)
from parallel_decoupling.evaluation.score import score_task
from parallel_decoupling.model.encoder import build_encoder
from tests.data.mmeb_files import train_row, write_image, write_train
from tests.support.mmeb import save_tiny_mmeb


def aggregate(paths: torch.Tensor) -> torch.Tensor:
    return F.normalize(paths.mean(dim=1), dim=-1)


def health(query: torch.Tensor, candidate: torch.Tensor, missing: int = 0) -> TaskHealth:
    """Query n belongs to candidate n; all are candidates of each."""
    size = len(query)
    inputs = [RawInput(str(number)) for number in range(size)]
    rows = [[row, *(x for x in range(size) if x != row)] for row in range(size)]
    task = EvalTask(Task("toy", "vqa", True), inputs, inputs, list(range(size)), rows)
    score = score_task(task, path_columns(query, candidate, aggregate))
    sides = (("query", query, missing), ("candidate", candidate, 0))
    return task_health(score, [side_health(name, each, aggregate(each), lost) for name, each, lost in sides])


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
    each = TaskHealth("toy", hits, 0.1, 100)  # standard error 0.03
    assert (checks(each) == ["chance"]) == found


def test_equal_paths_are_found_and_one_path_is_not() -> None:
    paths = distinct(num_paths=1)
    assert checks(health(paths, paths)) == []
    same = paths.expand(-1, 3, -1).contiguous()
    assert checks(health(same, same)) == ["collapsed_paths"]


@pytest.mark.parametrize("equal", [2, 3, 4])
def test_the_two_most_similar_of_several_paths_count(equal: int) -> None:
    paths = distinct(num_paths=4)
    paths[:, 1:equal] = paths[:, :1]
    (found,) = findings([health(paths, paths)])
    assert found.check == "collapsed_paths"
    assert found.detail == "toy query cosine 1.000 of paths 0 and 1, candidate cosine 1.000 of paths 0 and 1"


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("side", ["query", "candidate"])
def test_equal_embeddings_of_different_inputs_are_found_on_both_sides(noise: float, side: str) -> None:
    one, good = torch.randn(1, 1, 16), distinct(num_paths=1)
    same = F.normalize(one + noise * torch.randn(24, 1, 16), dim=-1)
    found = findings([health(same, good) if side == "query" else health(good, same)])
    (collapsed,) = [each for each in found if each.check == "collapsed_embeddings"]
    assert collapsed.detail.startswith(f"toy {side} cosine")
    assert "," in collapsed.detail
    assert collapsed.detail.count("cosine") == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_are_counted_beyond_the_missing_ones(value: float) -> None:
    paths = distinct()
    query, candidate = paths.clone(), paths.clone()
    query[:2] = torch.nan
    assert "non_finite" not in checks(health(query, candidate, missing=2))
    query[5, 1, 3] = candidate[7, 0, 0] = candidate[8] = value
    (found,) = [
        each for each in findings([health(query, candidate, missing=2)]) if each.check == "non_finite"
    ]
    assert found.detail == "toy query 1 of 22 rows, candidate 2 of 24 rows"


def test_embeddings_that_are_all_nan_are_a_finding_and_not_an_error() -> None:
    paths = torch.full((24, 2, 16), torch.nan)
    assert checks(health(paths, paths)) == ["chance", "non_finite"]


def test_an_aggregate_that_is_not_finite_counts() -> None:
    paths = distinct()
    each = side_health("query", paths, torch.full((24, 16), torch.nan))
    assert each == SideHealth("query", 24, 24)


def test_embeddings_on_a_line_are_found() -> None:
    angle = torch.linspace(-0.7, 0.7, 24)
    line = torch.stack([torch.ones(24), angle], dim=1).unsqueeze(1)
    assert "collapsed_embeddings" in checks(health(line, line))


def test_unreadable_rows_do_not_count() -> None:
    paths = distinct()
    found = health(paths, paths)
    paths[3] = torch.nan
    again = health(paths, paths, missing=1)
    assert again.sides[0].path_cosine == pytest.approx(found.sides[0].path_cosine, abs=0.05)


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
    from parallel_decoupling.evaluation.embedder import Embedder

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


INST = "<|image_1|>\nRepresent the image with the following question:"
PLAIN = [f"<|image_1|>\n{text}\n" for text in ("How many?", "What is a dog?", "Is a dog there?")]
ASKED = [f"{INST} {text}\n" for text in ("How many?", "Where is it?", "Is a dog there?")]
WHAT = [f"{INST} What is a {text}?\n" for text in ("dog", "cat", "house")]
WHICH = [f"{INST} Which of the {text}?\n" for text in ("dogs", "cats")]
CLASSIFY = ["<|image_1|>\nIdentify the object shown in the image\n"] * 3


@pytest.mark.parametrize(
    ("trained", "asked", "found"),
    [
        (ASKED, ASKED, False),
        (WHAT, WHICH, False),  # questions share a start, the instruction is the same
        (WHAT, ASKED, False),
        (ASKED, WHAT, False),
        (PLAIN, [f"<|image_1|>\nWhat is a {text}\n" for text in ("house", "bird")], False),
        (["a photo of it", "a dog"], ["a cat", "a house", "a bird"], False),
        (ASKED, PLAIN, True),  # the instruction is dropped
        (PLAIN, ASKED, True),  # ... or added
        (CLASSIFY, ["<|image_1|>\n"] * 3, True),
        (ASKED, [text.replace("following ", "") for text in ASKED], True),
        (ASKED, [text.replace("\n", " ", 1) for text in ASKED], True),
        (ASKED, [text.rstrip() for text in ASKED], True),  # the trailing newline
        (CLASSIFY, [text.rstrip() for text in CLASSIFY], True),
        (["a dog", "two cats"], ["a cat\n", "a house\n"], True),
        (ASKED, [f"{text}<|im_end|>\n<|im_start|>assistant\n" for text in ASKED], True),
        (PLAIN, [f"[INST] {text}" for text in PLAIN], True),
        (PLAIN, [f"{text}Answer in one word:\n" for text in PLAIN], True),
        (ASKED, ASKED[:1], False),
    ],
)
def test_instructions_and_endings_are_compared_and_questions_are_not(
    trained: list[str], asked: list[str], found: bool, tmp_path: Path
) -> None:
    write_image(tmp_path / "MMEB-train" / "0.jpg")
    rows = [train_row(text, "a", qry_image_path="0.jpg" if "image_1" in text else "") for text in trained]
    write_train(tmp_path, "GQA", rows)
    queries = [RawInput(text) for text in asked]
    task = EvalTask(Task("GQA", "vqa", False), queries, [RawInput("a"), RawInput("b")], [0], [[0, 1]])
    got = prompt_mismatches(tmp_path, "original", [task])
    assert [each.check for each in got] == ["prompt_mismatch"] * found


def test_training_pictures_need_not_be_there(tmp_path: Path) -> None:
    """Instructions are texts: scores must not depend on pictures that are not scored."""
    write_train(tmp_path, "GQA", [train_row(text, "a", qry_image_path="gone.jpg") for text in ASKED])
    both = [RawInput("a"), RawInput("b")]
    task = EvalTask(Task("GQA", "vqa", False), [RawInput(text) for text in PLAIN], both, [0], [[0, 1]])
    (found,) = prompt_mismatches(tmp_path, "original", [task])
    assert found.tasks == ("GQA",)


def test_paraphrased_instructions_are_none_that_training_lacks(tmp_path: Path) -> None:
    rows = [train_row(f"{text} q{number}\n", "a") for number, text in enumerate("abcdefgh")]
    write_train(tmp_path, "GQA", rows, "diverse_instruction")
    queries = [RawInput(f"Represent the question: {text}\n") for text in "xyz"]
    task = EvalTask(Task("GQA", "vqa", False), queries, [RawInput("a"), RawInput("b")], [0], [[0, 1]])
    assert prompt_mismatches(tmp_path, "diverse_instruction", [task]) == []


def test_own_instructions_are_compared_as_they_are_written(tmp_path: Path) -> None:
    source = Source(eval_file=tmp_path / "own.csv", query_instruction="Find it")
    entry = {
        "meta_task": "vqa",
        "in_distribution": True,
        "train_file": "own.csv",
        "query_instruction": "Find",
    }
    entry["columns"] = {"query_text": "q", "candidate_text": "c"}
    (tmp_path / "tasks.json").write_text(json.dumps({"own": entry}))
    (tmp_path / "own.csv").write_text("q,c\nx,y\n")
    both = [RawInput("a"), RawInput("b")]
    task = EvalTask(Task("own", "vqa", True, source=source), both, both, [0], [[0, 1]])
    (found,) = prompt_mismatches(tmp_path, "original", [task])
    assert found.detail == "own query: trained 'Find', asked 'Find it'"
    same = replace(task.task, source=replace(source, query_instruction="Find"))
    assert prompt_mismatches(tmp_path, "original", [replace(task, task=same)]) == []


def _rows(task: EvalTask) -> tuple[list[int], list[list[int]]]:
    return task.query_of_row, task.candidates_of_row
