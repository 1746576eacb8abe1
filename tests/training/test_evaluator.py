"""Validation, test and prediction on the tiny benchmark."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from parallel_decoupling.data.collate import EvalBatch
from parallel_decoupling.data.readers import read_eval_task
from parallel_decoupling.data.tasks import EvalTask
from parallel_decoupling.evaluation.report import ScoreReport
from parallel_decoupling.training import evaluator
from parallel_decoupling.training.evaluation import Evaluation, TaskEmbeddings, git_commit
from parallel_decoupling.training.module import PDFEmbedder
from tests.support.fit import make_trainer, small_data, small_embedder

TASKS = ("colours_i2t", "colours_t2i")


@pytest.fixture
def task(tiny_mmeb_dir: str) -> EvalTask:
    return read_eval_task(tiny_mmeb_dir, "colours_i2t")


def batch_of(side: str, indices: list[int]) -> EvalBatch:
    return EvalBatch(None, side, torch.tensor(indices))  # type: ignore[arg-type]


def test_rows_land_in_their_place_whatever_the_order(task: EvalTask) -> None:
    rows = TaskEmbeddings(task, lambda value: value)
    query, candidate = torch.randn(len(task.queries), 2, 3), torch.randn(len(task.candidates), 2, 3)
    rows.add(batch_of("candidate", [3, 1]), candidate[[3, 1]])
    rows.add(batch_of("query", [2, 0, 1, 3]), query[[2, 0, 1, 3]])
    assert rows.complete() is None
    rows.add(batch_of("candidate", [0, 2]), candidate[[0, 2]])
    found = rows.complete()
    assert found is not None
    assert torch.equal(found[0], query)
    assert torch.equal(found[1], candidate)


def test_rows_that_two_ranks_encoded_count_once(task: EvalTask) -> None:
    rows = TaskEmbeddings(task, lambda value: value * 2)  # two ranks with the same rows
    query, candidate = torch.randn(len(task.queries), 1, 3), torch.randn(len(task.candidates), 1, 3)
    rows.add(batch_of("query", [0, 1, 2, 3]), query)
    rows.add(batch_of("candidate", [0, 1, 2, 3]), candidate)
    found = rows.complete()
    assert found is not None
    assert torch.equal(found[0], query)


def test_ranks_with_one_side_each_take_part_in_the_same_collectives(task: EvalTask) -> None:
    asked: dict[str, list[torch.Size]] = {"query": [], "candidate": []}
    for side, shapes in asked.items():

        def reduce(value: torch.Tensor, shapes: list[torch.Size] = shapes) -> torch.Tensor:
            shapes.append(value.shape)
            return value + 1 if value.ndim == 1 else value  # as if the other rank had all the rest

        rows = TaskEmbeddings(task, reduce)
        rows.add(batch_of(side, [0, 1, 2, 3]), torch.randn(4, 2, 3))
        assert rows.complete() is not None
    assert asked["query"] == asked["candidate"]


def test_perfect_embeddings_score_one_and_a_cut_task_has_no_score(task: EvalTask) -> None:
    evaluation = Evaluation([task, task], lambda paths: paths.mean(dim=1), lambda value: value)
    perfect = torch.eye(4).unsqueeze(1)
    evaluation.add(0, batch_of("query", [0, 1, 2, 3]), perfect)
    order = [task.candidates_of_row[row][0] for row in range(4)]
    evaluation.add(0, batch_of("candidate", order), perfect)
    evaluation.add(1, batch_of("query", [0]), perfect[:1])
    with pytest.warns(UserWarning, match="not all rows"):
        evaluation.finish_task()
    assert len(evaluation.scores) == 1
    assert evaluation.scores[0].hits["aggregate"].all()
    assert evaluation.scores[0].hits["path_0"].all()


def test_a_test_run_writes_and_logs_the_scores_of_its_embeddings(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    module = small_embedder(tiny_backbone_dir)
    trainer = make_trainer(tmp_path, logger=TensorBoardLogger(tmp_path, name="", version=""))
    trainer.test(module, small_data(tiny_mmeb_dir, eval_batch_size=3), verbose=False)
    report = ScoreReport.from_json_file(tmp_path / "scores.json")
    assert list(report.tasks) == list(TASKS)
    assert report.columns == ["aggregate", "path_0", "path_1", "mean", "concat", "maxsim"]
    for name in TASKS:
        rows = read_eval_task(tiny_mmeb_dir, name)
        similarity = module.similarity(
            module.encode(rows.queries, paths="aggregate"), module.encode(rows.candidates, paths="aggregate")
        )
        hits = [
            int(similarity[query, row].argmax()) == 0
            for query, row in zip(rows.query_of_row, rows.candidates_of_row, strict=True)
        ]
        assert report.tasks[name].hit_at_1["aggregate"] == sum(hits) / 4
        logged = trainer.callback_metrics[f"test/{name}/hit_at_1"]
        assert logged == pytest.approx(report.tasks[name].hit_at_1["aggregate"])
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["run"]["model"]["num_paths"] == 2
    assert content["run"]["data"]["data_dir"] == tiny_mmeb_dir
    assert content["run"]["global_step"] == 0
    assert (tmp_path / "scores.csv").is_file()
    assert list((tmp_path / "projector").rglob("tensors.tsv"))


def test_validation_scores_only_its_tasks(tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    data = small_data(tiny_mmeb_dir, validation_tasks=["colours_t2i"])
    trainer.validate(small_embedder(tiny_backbone_dir), data, verbose=False)
    assert "val/colours_t2i/hit_at_1" in trainer.callback_metrics
    assert "val/overall" in trainer.callback_metrics
    assert "val/colours_i2t/hit_at_1" not in trainer.callback_metrics


def test_predictions_are_the_embeddings_of_every_task(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    module = small_embedder(tiny_backbone_dir)
    data = small_data(tiny_mmeb_dir, eval_batch_size=3)
    make_trainer(tmp_path).predict(module, datamodule=data, return_predictions=False)
    for name in TASKS:
        content = torch.load(tmp_path / "predictions" / f"{name}.pt", weights_only=True)
        rows = read_eval_task(tiny_mmeb_dir, name)
        torch.testing.assert_close(content["query"], module.encode(rows.queries), rtol=1e-4, atol=1e-5)
        expected = module.encode(rows.candidates, paths="aggregate")
        torch.testing.assert_close(content["candidate_aggregate"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [{"limit_predict_batches": 1}, {"fast_dev_run": True}])
def test_a_prediction_of_limited_batches_is_an_error(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path, limit: dict[str, Any]
) -> None:
    data = small_data(tiny_mmeb_dir, eval_batch_size=3)
    with pytest.raises(ValueError, match="colours_i2t: not all rows were encoded.*limit_predict_batches"):
        make_trainer(tmp_path, **limit).predict(
            small_embedder(tiny_backbone_dir), datamodule=data, return_predictions=False
        )


def test_loaders_without_a_datamodule_are_an_error(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    module, data = small_embedder(tiny_backbone_dir), small_data(tiny_mmeb_dir)
    data.connect(module.encoder.processor, module.encoder.image_token)
    data.setup("test")
    with pytest.raises(ValueError, match="datamodule=MMEBDataModule"):
        make_trainer(tmp_path).test(module, dataloaders=data.test_dataloader(), verbose=False)


def test_lightnings_sanity_check_of_several_tasks_is_quiet(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    data = small_data(tiny_mmeb_dir, validation_tasks=list(TASKS), eval_batch_size=1)
    trainer = make_trainer(tmp_path, max_steps=1, num_sanity_val_steps=2, val_check_interval=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not all rows")
        trainer.fit(small_embedder(tiny_backbone_dir), data)
    assert "val/overall" in trainer.callback_metrics


def test_a_test_writes_score_files_modes_and_warnings(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(tmp_path)
    trainer.test(small_embedder(tiny_backbone_dir), small_data(tiny_mmeb_dir), verbose=False)
    report = ScoreReport.from_json_file(tmp_path / "scores.json")
    assert list(report.modes) == report.columns
    encoding = {name: mode["milliseconds_per_item"] for name, mode in report.modes.items()}
    assert encoding["path_0"] == encoding["path_1"] > 0
    assert encoding["aggregate"] == encoding["maxsim"] > 0
    assert report.modes["maxsim"]["bytes_per_item"] == 2 * report.modes["aggregate"]["bytes_per_item"]
    for name in TASKS:
        for file in (f"v1/{name}_score.json", f"v2/{name}_score.json", f"v1/{name}_pred.txt"):
            assert (tmp_path / "score_files" / file).is_file()
    assert report.path_cosine is not None
    assert report.path_cosine[0][0] == pytest.approx(1)
    assert all(result.rows_sha256 for result in report.tasks.values())
    (chance,) = [warning for warning in report.warnings if warning["check"] == "chance"]
    assert set(chance["tasks"]) == set(TASKS), "random weights and four candidates"
    shown = capsys.readouterr().out
    assert "WARNING: chance" in shown
    assert "inference modes" in shown
    assert "ms/item" in shown


def test_images_of_another_size_than_in_training_are_reported(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(small_embedder(tiny_backbone_dir), small_data(tiny_mmeb_dir))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    for size, details in ((None, []), ("low", ["image_size: trained None, asked low"])):
        module, data = small_embedder(tiny_backbone_dir), small_data(tiny_mmeb_dir, image_size=size)
        make_trainer(tmp_path).test(module, data, ckpt_path=tmp_path / "one.ckpt", verbose=False)
        report = ScoreReport.from_json_file(tmp_path / "scores.json")
        found = [each["detail"] for each in report.warnings if each["check"] == "other_images"]
        assert found == details
    loaded = PDFEmbedder.load_from_checkpoint(tmp_path / "one.ckpt")
    make_trainer(tmp_path).test(loaded, small_data(tiny_mmeb_dir, image_size="low"), verbose=False)
    report = ScoreReport.from_json_file(tmp_path / "scores.json")
    assert "image_size: trained None, asked low" in str(report.warnings), "also without ckpt_path"


def test_scores_are_written_before_the_checks(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise ValueError("training rows cannot be read")

    monkeypatch.setattr(evaluator, "check_prompts", fail)
    module = small_embedder(tiny_backbone_dir)
    module.steps_done = 1
    with pytest.raises(ValueError, match="cannot be read"):
        make_trainer(tmp_path).test(module, small_data(tiny_mmeb_dir), verbose=False)
    assert set(ScoreReport.from_json_file(tmp_path / "scores.json").tasks) == set(TASKS)


def test_outside_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None
