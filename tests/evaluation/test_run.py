"""Validation and test: scores, files, warnings, embeddings that are kept, tasks with several answers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from parallel_decoupling.data.readers import read_eval_task
from parallel_decoupling.evaluation.compare import compare
from parallel_decoupling.evaluation.report import ScoreReport
from parallel_decoupling.evaluation.run import evaluate
from parallel_decoupling.evaluation.score import METRICS
from parallel_decoupling.training.module import PDFEmbedder
from tests.support.fit import Recorder, RecordingEmbedder, kept_data, make_trainer, small_data, small_embedder
from tests.support.mmeb import add_judged_task, save_tiny_mmeb
from tests.support.processes import run_ranks
from tests.support.stores import table_rows

TASKS = ("colours_i2t", "colours_t2i")


@pytest.fixture
def module(tiny_backbone_dir: str) -> PDFEmbedder:
    return small_embedder(tiny_backbone_dir)


def test_the_scores_are_there_before_anything_that_shows_them(
    module: PDFEmbedder, tiny_mmeb_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("parallel_decoupling.evaluation.report.leaderboard.write_score_files", fail)
    with pytest.raises(OSError, match="disk full"):
        make_trainer(tmp_path).test(module, small_data(tiny_mmeb_dir))
    assert list(ScoreReport.from_json_file(tmp_path / "scores.json").tasks) == list(TASKS)
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".html", ".png")]


def test_a_test_run_writes_and_logs_the_scores_of_its_embeddings(
    module: PDFEmbedder, tiny_mmeb_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(tmp_path, logger=TensorBoardLogger(tmp_path, name="", version=""))
    trainer.test(module, small_data(tiny_mmeb_dir, eval_batch_size=3))
    report = ScoreReport.from_json_file(tmp_path / "scores.json")
    assert list(report.tasks) == list(TASKS)
    assert report.columns == ["aggregate", "path_0", "path_1", "mean", "concat", "maxsim"]
    for name in TASKS:
        rows = read_eval_task(tiny_mmeb_dir, name)
        similarity = module.similarity(module.encode(rows.queries), module.encode(rows.candidates))
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
    for name in ("leaderboard.json", f"score_files/v2/image/{TASKS[0]}_pred.jsonl"):
        assert (tmp_path / name).is_file()
    assert list(report.modes) == report.columns
    assert all(result.rows_sha256 for result in report.tasks.values())
    (chance,) = [warning for warning in report.warnings if warning["check"] == "chance"]
    assert set(chance["tasks"]) == set(TASKS), "random weights and four candidates"
    shown = capsys.readouterr().out
    assert "WARNING: chance" in shown
    assert "inference modes" in shown


def test_evaluate_needs_no_trainer_and_a_trainer_alone_says_that_nothing_is_scored(
    module: PDFEmbedder, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "accelerator": "cpu"}
    report = evaluate(module, tiny_mmeb_dir, default_root_dir=tmp_path / "function", **quiet)
    make_trainer(tmp_path / "trainer").test(module, small_data(tiny_mmeb_dir))
    assert report.means == ScoreReport.from_json_file(tmp_path / "trainer" / "scores.json").means
    alone = Trainer(default_root_dir=tmp_path / "alone", logger=False, **quiet)
    with pytest.warns(UserWarning, match="Nothing scores this test: add .*Scoring"):
        alone.test(module, datamodule=small_data(tiny_mmeb_dir).connect(module), verbose=False)
    assert not (tmp_path / "alone" / "scores.json").exists()


def test_a_task_that_limited_batches_cut_has_no_score(
    module: PDFEmbedder, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, limit_test_batches=1)
    with pytest.warns(UserWarning, match="colours_i2t: not all rows were encoded"):
        trainer.test(module, small_data(tiny_mmeb_dir, eval_batch_size=3))
    assert not (tmp_path / "scores.json").exists()


def test_images_of_another_size_than_in_training_are_reported(
    trained_run: Path, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    file = trained_run / "checkpoints" / "last.ckpt"
    for size, details in (("low", []), (None, ["image_size: trained low, asked None"])):
        module, data = PDFEmbedder.load_from_checkpoint(file), small_data(tiny_mmeb_dir, image_size=size)
        make_trainer(tmp_path).test(module, data, ckpt_path=file)
        report = ScoreReport.from_json_file(tmp_path / "scores.json")
        assert [each["detail"] for each in report.warnings if each["check"] == "other_images"] == details


def test_skipped_evaluation_rows_are_left_out_of_the_score_and_counted(
    module: PDFEmbedder, tmp_path: Path
) -> None:
    data_dir = Path(save_tiny_mmeb(tmp_path / "data"))
    whole, cut = small_data(str(data_dir), eval_batch_size=3), small_data(str(data_dir), eval_batch_size=3)
    cut.missing_images = "skip"
    make_trainer(tmp_path / "whole").test(module, whole)
    (data_dir / "MMEB-eval" / "red_0.png").unlink()  # a query of i2t, a candidate of t2i
    with pytest.raises(ValueError, match="no image file 'red_0.png'"):
        small_data(str(data_dir)).setup("test")
    with pytest.warns(UserWarning, match="1 queries and 0 candidates cannot be embedded; 1 of 4 rows"):
        make_trainer(tmp_path / "cut").test(module, cut)
    before, after = (ScoreReport.from_json_file(tmp_path / name / "scores.json") for name in ("whole", "cut"))
    for task in TASKS:
        assert (before.tasks[task].num_queries, before.tasks[task].num_skipped) == (4, 0)
        assert (after.tasks[task].num_queries, after.tasks[task].num_skipped) == (3, 1)
    hits = before.tasks["colours_i2t"].hits["aggregate"]
    assert after.tasks["colours_i2t"].hits["aggregate"] == hits[1:], "the other rows are scored as before"
    assert after.tasks["colours_t2i"].chance == pytest.approx(1 / 3), "a lost candidate is in no list"


class Counting(Callback):
    """Counts encoded rows, and can stop in the second batch of a loader as if killed."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.rows, self.stop_at = 0, stop_at

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Tensor, batch: Any, *args: Any
    ) -> None:
        if self.stop_at is not None and args == (1, self.stop_at):
            raise KeyError("killed")
        self.rows += len(batch.rows)


def run(
    module: PDFEmbedder, data_dir: str, folder: Path, kept: Path, stop_at: int | None = None, **settings: Any
) -> int:
    counting = Counting(stop_at)
    data = kept_data(module, kept, data_dir, **settings)
    make_trainer(folder, counting).test(module, data)
    return counting.rows


def scores(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "scores.json").read_text())
    return {name: content[name] for name in ("means", "tasks", "metric_means", "warnings")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.parquet"))}


def test_a_stopped_test_resumes_with_what_is_not_kept(
    module: PDFEmbedder, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    three: dict[str, Any] = {"eval_batch_size": 3}
    make_trainer(tmp_path / "plain").test(module, small_data(tiny_mmeb_dir, **three))
    assert run(module, tiny_mmeb_dir, tmp_path / "whole", tmp_path / "whole" / "kept", **three) == 16
    with pytest.raises(KeyError, match="killed"):
        run(module, tiny_mmeb_dir, tmp_path / "run", kept, stop_at=3, **three)
    assert list(contents(kept)) == [
        f"colours_{name}/embeddings-00000.parquet" for name in ("i2t/candidate", "i2t/query", "t2i/query")
    ]
    assert (
        run(module, tiny_mmeb_dir, tmp_path / "run", kept, **three) == 4
    )  # the candidates of the second task
    assert scores(tmp_path / "run") == scores(tmp_path / "plain")
    assert contents(kept) == contents(tmp_path / "whole" / "kept")
    assert run(module, tiny_mmeb_dir, tmp_path / "run", kept, **three) == 0
    assert scores(tmp_path / "run") == scores(tmp_path / "plain")


def test_other_weights_or_pictures_are_encoded_again(module: PDFEmbedder, tmp_path: Path) -> None:
    data_dir, kept = save_tiny_mmeb(tmp_path / "data"), tmp_path / "kept"
    assert run(module, data_dir, tmp_path, kept) == 16
    picture = Path(data_dir) / "MMEB-eval" / "red_0.png"
    content = bytearray(picture.read_bytes())
    other = next(file for file in picture.parent.glob("*.png") if file.read_bytes() != content)
    picture.write_bytes(other.read_bytes())
    assert run(module, data_dir, tmp_path, kept) == 8, "one side of each task shows it"
    picture.write_bytes(content)
    assert run(module, data_dir, tmp_path, kept, image_size="low") == 16
    with torch.no_grad():
        module.encoder.parameter_groups()["prefixes"][0].view(-1)[0] += 1e-6
    assert run(module, data_dir, tmp_path, kept, image_size="low") == 16


def test_what_was_skipped_does_not_serve_a_run_that_skips_nothing(
    module: PDFEmbedder, tmp_path: Path
) -> None:
    data_dir, kept = save_tiny_mmeb(tmp_path / "data"), tmp_path / "kept"
    (Path(data_dir) / "MMEB-eval" / "red_0.png").write_bytes(b"not a picture")
    for rows in (14, 0):
        with pytest.warns(UserWarning, match="1 of 4 rows"):
            assert run(module, data_dir, tmp_path, kept, missing_images="skip") == rows
    with pytest.raises(ValueError, match="Cannot read image .*red_0.png"):
        run(module, data_dir, tmp_path, kept)


def run_on(backbone: str, data_dir: str, folder: Path, strategy: str, **settings: Any) -> None:
    module = small_embedder(backbone)
    trainer = make_trainer(folder, devices=1 if strategy == "auto" else 2, strategy=strategy)
    trainer.test(module, kept_data(module, folder / "kept", data_dir, **settings))


@pytest.mark.parametrize(
    ("strategy", "batch_size", "query_limit"),
    [("ddp", 8, None), pytest.param("fsdp2", 3, None, marks=pytest.mark.slow), ("ddp", 1, 3)],
)
def test_two_processes_embed_and_score_exactly_like_one_and_each_other(
    tiny_backbone_dir: str,
    tiny_mmeb_dir: str,
    tmp_path: Path,
    strategy: str,
    batch_size: int,
    query_limit: int | None,
) -> None:
    """Batches of 8 leave one process a batch without rows; the files are the same to the last byte."""
    args = tiny_backbone_dir, tiny_mmeb_dir
    settings = {"eval_batch_size": batch_size, "query_limit": query_limit}
    run_on(*args, tmp_path / "one", "auto", **settings)

    def two() -> None:
        run_on(*args, tmp_path / "two", strategy, **settings)

    run_ranks(two, timeout=60)
    whole = contents(tmp_path / "one")
    assert len(whole) == 4
    assert contents(tmp_path / "two") == whole
    assert scores(tmp_path / "two") == scores(tmp_path / "one")
    lost = next((tmp_path / "two" / "kept").rglob("*.parquet"))
    lost.unlink()
    (tmp_path / "two" / "scores.json").unlink()
    run_ranks(two, timeout=60)
    assert contents(tmp_path / "two") == whole, "two processes resume what two have left"
    assert scores(tmp_path / "two") == scores(tmp_path / "one")


@pytest.fixture(scope="module")
def judged_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = save_tiny_mmeb(tmp_path_factory.mktemp("mmeb") / "data")
    add_judged_task(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tiny_backbone_dir: str, judged_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    wanted: dict[str, Any] = {"default": None, "both": ["overall", "shown"], "alone": ["shades"]}
    for name, names in wanted.items():
        data = small_data(judged_dir, eval_tasks=names)
        make_trainer(folder / name).test(small_embedder(tiny_backbone_dir), data)
    return folder


def report_of(runs: Path, name: str) -> ScoreReport:
    return ScoreReport.from_json_file(runs / name / "scores.json")


def test_a_group_has_a_mean_of_its_own_and_changes_no_other(runs: Path) -> None:
    default, both, alone = (report_of(runs, name) for name in ("default", "both", "alone"))
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
    rows = {row[0].removesuffix(" !"): row for row in table_rows(both.task_table())}
    assert rows["shades, ndcg@5"][1:4] == ["IND", "4", ""]
    assert rows["mean of shown"][4] == rows["shades, ndcg@5"][4] == f"{100 * result.score['aggregate']:.1f}"
    assert "shown" in [str(column.header) for column in alone.mode_table().columns]
    default_content, content = (
        json.loads((runs / name / "scores.json").read_text()) for name in ("default", "both")
    )
    assert content["tasks"]["colours_i2t"] == default_content["tasks"]["colours_i2t"]
    assert "values" not in default_content


def test_score_files_hold_what_is_known_of_several_answers(runs: Path) -> None:
    folder = runs / "both" / "score_files" / "v2" / "image"
    score = json.loads((folder / "shades_score.json").read_text())
    kinds = ("hit", "mrr", "ndcg_linear", "recall")
    assert score.keys() == {f"{kind}@{k}" for kind in kinds for k in (1, 5, 10)} | {"num_pred", "num_data"}
    line = json.loads((folder / "shades_pred.jsonl").read_text().splitlines()[0])
    assert len(line["prediction"]) == 10
    assert len(line["label"]) == len(line["rel_scores"]) == 6
    assert set(line["rel_scores"]) == {1.0, 2.0}


def test_runs_are_compared_by_the_tasks_own_metric(runs: Path, tmp_path: Path) -> None:
    for name in ("both", "alone"):
        before = report_of(runs, name)
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
        assert "mean of shown" in {row[0] for row in table_rows(found.table())}


def test_training_takes_several_positives_and_a_teacher_in_any_chunks(
    tiny_backbone_dir: str, judged_dir: str, tmp_path: Path
) -> None:
    data = small_data(judged_dir, train_subsets=["overall", "shades"], positives=2, hard_negatives=1)
    options: dict[str, Any] = {"kind": RecordingEmbedder, "teacher_weight": 0.5, "symmetric": True}
    histories, losses = [], []
    for number, chunk in enumerate((None, 3)):
        module, recorder = small_embedder(tiny_backbone_dir, chunk_size=chunk, **options), Recorder()
        make_trainer(tmp_path / str(number), recorder, max_steps=2).fit(module, data)
        histories.append(module.history)
        losses.append([each["train/loss"] for each in recorder.values])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    torch.testing.assert_close(*histories, rtol=5e-3, atol=5e-5)
    plain = small_embedder(tiny_backbone_dir, symmetric=True)
    recorder = Recorder()
    make_trainer(tmp_path, recorder, max_steps=1).fit(plain, data)
    assert recorder.values[0]["train/loss"] < losses[0][0], "the teacher adds to it"
    with pytest.raises(
        ValueError, match="No training subset has a teacher's scores. Add a column teacher_scores"
    ):
        make_trainer(tmp_path, max_steps=1).fit(module, small_data(judged_dir))
