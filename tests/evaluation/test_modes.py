from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.tasks import EvalTask, Task
from parallel_decoupling.evaluation.encode import similarity
from parallel_decoupling.evaluation.modes import (
    EncodingTimes,
    encoding_times,
    mode_costs,
    path_columns,
    similarities,
)
from parallel_decoupling.evaluation.score import score_task


def paths(rows: int, num_paths: int = 3, dim: int = 4) -> torch.Tensor:
    return F.normalize(torch.randn(rows, num_paths, dim), dim=-1)


def test_columns_are_the_aggregate_then_every_path_then_the_other_modes() -> None:
    query, candidate = paths(2), paths(5)
    columns = path_columns(query, candidate, lambda embeddings: embeddings.flatten(1))
    assert list(columns) == ["aggregate", "path_0", "path_1", "path_2", "mean", "concat", "maxsim"]
    assert columns["aggregate"][1].shape == (5, 12)
    assert torch.equal(columns["path_1"][0], query[:, 1])


def test_one_path_has_no_other_modes() -> None:
    assert list(path_columns(paths(2, 1), paths(5, 1), lambda z: z[:, 0])) == ["aggregate", "path_0"]


def test_concat_is_the_mean_cosine_of_aligned_paths() -> None:
    query, candidate = paths(6), paths(9)
    ours = [F.normalize(side, dim=-1) for side in path_columns(query, candidate, lambda z: z[:, 0])["concat"]]
    by_hand = sum(query[:, path] @ candidate[:, path].T for path in range(3)) / 3
    torch.testing.assert_close(similarities(*ours), by_hand)
    torch.testing.assert_close(similarities(*ours), similarity(query, candidate))


def test_maxsim_equals_a_loop_and_is_never_below_concat() -> None:
    query, candidate = paths(6), paths(9)
    found = similarities(query, candidate)
    for q in range(6):
        for c in range(9):
            best = [max(float(x @ y) for y in candidate[c]) for x in query[q]]
            assert float(found[q, c]) == pytest.approx(sum(best) / 3, abs=1e-6)
    assert (found >= similarity(query, candidate) - 1e-6).all()


def test_maxsim_is_scored_like_its_similarities_and_keeps_ties() -> None:
    query, candidate = paths(4), paths(6)
    candidate[3] = candidate[2]  # of rows 2 and 3 the positives tie
    rows = [[row, *(x for x in range(6) if x != row)] for row in range(4)]
    inputs = [RawInput(str(number)) for number in range(6)]
    task = EvalTask(Task("toy", "vqa", True), inputs[:4], inputs, [0, 1, 2, 3], rows)
    ranks = score_task(task, path_columns(query, candidate, lambda z: z.mean(dim=1))).ranks["maxsim"]
    scores = similarities(query, candidate)
    for row in range(4):
        ahead = sum(
            bool(scores[row, x] > scores[row, row] + 1e-6 or x == {2: 3, 3: 2}.get(row))
            for x in range(6)
            if x != row
        )
        assert ranks[row] == 1 + ahead


def test_costs_follow_the_shapes() -> None:
    costs = mode_costs({"path_0": torch.Size([8]), "concat": torch.Size([24]), "maxsim": torch.Size([3, 8])})
    assert [cost["bytes_per_item"] for cost in costs.values()] == [32, 96, 96]
    assert all(cost["microseconds_per_query"] > 0 for cost in costs.values())


def test_every_kind_of_encoding_is_warmed_up_and_an_outlier_does_not_count() -> None:
    calls: list[Sequence[int] | None] = []

    def encode(chosen: Sequence[int] | None) -> torch.Tensor:
        calls.append(chosen)
        time.sleep(1.0 if calls.count(chosen) in (1, 3) else 0.01)
        return torch.zeros(1)

    times = encoding_times(encode, num_items=1)
    assert calls == [(0,)] * 4 + [None] * 4
    assert max(times.one_path, times.all_paths) < 500


def test_encoding_one_path_and_all_of_them_are_timed_apart() -> None:
    def encode(chosen: Sequence[int] | None) -> torch.Tensor:
        time.sleep(0.01 if chosen == (0,) else 0.05)
        return torch.zeros(2, 1)

    times = encoding_times(encode, num_items=2)
    assert times.one_path >= 5
    assert times.all_paths >= 25
    assert times.one_path < times.all_paths
    shapes = {"aggregate": torch.Size([8]), "path_1": torch.Size([8]), "maxsim": torch.Size([3, 8])}
    costs = mode_costs(shapes, EncodingTimes(1.5, 4.0))
    assert [cost["encoding_milliseconds_per_item"] for cost in costs.values()] == [4.0, 1.5, 4.0]
    assert "encoding_milliseconds_per_item" not in mode_costs(shapes)["maxsim"]
