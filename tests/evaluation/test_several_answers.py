"""A task with several right answers from its files to training, report, score files and comparison."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parallel_decoupling.evaluation.compare import compare
from parallel_decoupling.evaluation.report import ScoreReport
from parallel_decoupling.evaluation.score import METRICS
from tests.support.fit import Recorder, RecordingEmbedder, make_trainer, small_data, small_embedder
from tests.support.mmeb import add_judged_task, save_tiny_mmeb


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = save_tiny_mmeb(tmp_path_factory.mktemp("mmeb") / "data")
    add_judged_task(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tiny_backbone_dir: str, data_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    wanted: dict[str, Any] = {"default": None, "both": ["overall", "shown"], "alone": ["shades"]}
    for name, names in wanted.items():
        data = small_data(data_dir, eval_tasks=names)
        make_trainer(folder / name).test(small_embedder(tiny_backbone_dir), data, verbose=False)
    return folder


def report(runs: Path, name: str) -> ScoreReport:
    return ScoreReport.from_json_file(runs / name / "scores.json")


def test_a_group_has_a_mean_of_its_own_and_changes_no_other(runs: Path) -> None:
    default, both, alone = (report(runs, name) for name in ("default", "both", "alone"))
    assert list(default.tasks) == ["colours_i2t", "colours_t2i"]
    assert {name: both.means[name] for name in default.means} == default.means
    assert both.metric_means == default.metric_means
    assert both.means["shown"] == alone.means["shown"] == both.tasks["shades"].score
    result = both.tasks["shades"]
    assert result.score == {column: metrics["ndcg@5"] for column, metrics in result.metrics.items()}
    assert (result.num_queries, result.answers) == (4, 6)
    assert result.score["aggregate"] == pytest.approx(np.mean(result.values["aggregate"]))
    assert list(result.metrics["aggregate"]) == list(METRICS)
    assert alone.headline == "shown"
    assert "mean_of_meta_tasks" not in alone.means
    rows = {row[0].removesuffix(" !"): row for row in both.task_grid().rows}
    assert rows["shades, ndcg@5"][1:4] == ["IND", "4", ""]
    assert rows["mean of shown"][4] == rows["shades, ndcg@5"][4] == f"{100 * result.score['aggregate']:.1f}"
    assert "shown" in alone.mode_grid().headings
    default_content, content = (
        json.loads((runs / name / "scores.json").read_text()) for name in ("default", "both")
    )
    assert content["tasks"]["colours_i2t"] == default_content["tasks"]["colours_i2t"]
    assert "values" not in default_content


def test_score_files_hold_what_is_known_of_several_answers(runs: Path) -> None:
    folder = runs / "both" / "score_files" / "v2"
    score = json.loads((folder / "shades_score.json").read_text())
    kinds = ("hit", "mrr", "ndcg_linear", "recall")
    assert score.keys() == {f"{kind}@{k}" for kind in kinds for k in (1, 5, 10)} | {"num_pred", "num_data"}
    line = json.loads((folder / "shades_pred.jsonl").read_text().splitlines()[0])
    assert len(line["prediction"]) == 10
    assert len(line["label"]) == len(line["rel_scores"]) == 6
    assert set(line["rel_scores"]) == {1.0, 2.0}


def test_runs_are_compared_by_the_tasks_own_metric(runs: Path, tmp_path: Path) -> None:
    for name in ("both", "alone"):
        before = report(runs, name)
        result = before.tasks["shades"]
        changed = {
            column: [min(1.0, each + 0.25) for each in values] for column, values in result.values.items()
        }
        metrics = {
            column: {**each, "ndcg@5": float(np.mean(changed[column]))}
            for column, each in result.metrics.items()
        }
        after = replace(
            before, tasks={**before.tasks, "shades": replace(result, values=changed, metrics=metrics)}
        )
        other = tmp_path / name
        other.mkdir()
        after.to_json_file(other / "scores.json")
        found = compare([str(runs / name), str(other / "scores.json")], str(tmp_path / f"{name}_page"))
        difference = next(iter(found.differences.values())).tasks["shades"]
        gains = np.subtract(changed["aggregate"], result.values["aggregate"])
        assert difference.difference == pytest.approx(gains.mean())
        draws = np.random.default_rng(0).choice(gains, (20_000, len(gains))).mean(axis=1)
        assert [difference.low, difference.high] == pytest.approx(
            np.quantile(draws, (0.025, 0.975)), abs=0.02
        )
        assert "mean of shown" in {row[0] for row in found.grid().rows}
        (other / "scores.json").write_text(
            (other / "scores.json").read_text().replace('"metric": "ndcg@5"', '"metric": "ndcg@10"')
        )
        with pytest.raises(ValueError, match="shades, aggregate: ndcg@10 is not the mean of the values"):
            ScoreReport.from_json_file(other / "scores.json")


def test_training_takes_several_positives_and_a_teacher_in_any_chunks(
    tiny_backbone_dir: str, data_dir: str, tmp_path: Path
) -> None:
    results = []
    for number, chunk in enumerate((None, 3)):
        options: dict[str, Any] = {
            "query_chunk_size": chunk,
            "candidate_chunk_size": chunk,
            "symmetric": True,
        }
        module = small_embedder(tiny_backbone_dir, kind=RecordingEmbedder, teacher_weight=0.5, **options)
        data = small_data(data_dir, train_subsets=["overall", "shades"], positives=2, hard_negatives=1)
        recorder = Recorder()
        make_trainer(tmp_path / str(number), recorder, max_steps=2).fit(module, data)
        assert isinstance(module, RecordingEmbedder)
        results.append((recorder.values, module.history))
    (values, gradients), (chunked, chunked_gradients) = results
    assert [each["train/loss"] for each in chunked] == pytest.approx(
        [each["train/loss"] for each in values], rel=1e-4
    )
    for ours, theirs in zip(gradients, chunked_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=5e-5)
    plain = small_embedder(tiny_backbone_dir, symmetric=True)
    recorder = Recorder()
    make_trainer(tmp_path, recorder, max_steps=1).fit(plain, data)
    assert recorder.values[0]["train/loss"] < values[0]["train/loss"], "the teacher adds to it"
    with pytest.raises(
        ValueError, match="No training subset has a teacher's scores. Add a column teacher_scores"
    ):
        make_trainer(tmp_path, max_steps=1).fit(module, small_data(data_dir))
