"""Studies that are not runs: estimators on Gaussians, gradients at the prefixes, published scores."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel_decoupling.data.tasks import MMEB_TASKS, V2_TASKS
from parallel_decoupling.evaluation.leaderboard import write_leaderboard, write_score_files
from parallel_decoupling.evaluation.report import ScoreReport
from parallel_decoupling.evaluation.score import METRICS, TaskResult
from studies.estimator_figures import KIND_COLOURS
from studies.estimators import KINDS, Cell, cells, fitted_network, measure, run
from studies.prefix_gradients import gradients, with_network_of
from studies.published.audit import TaskScores, audit_row, audit_scores, read_scores, read_table
from tests.evaluation.test_report import PUBLISHED
from tests.support.fit import RecordingEmbedder, first_batch, make_trainer, small_data, small_embedder


def cell(**values: object) -> Cell:
    settings = {"rho": 0.6, "embed_dim": 3, "batch_size": 64, "cubed": False, "perfect_q": True, **values}
    return Cell(**settings)  # type: ignore[arg-type]


def test_exact_gradient_is_that_of_the_closed_form() -> None:
    """Gaussians y = R^T x + s noise have mutual information log det(I + R^T R / s^2) / 2."""
    rho, dim = 0.6, 3
    mixing = (rho * torch.eye(dim, dtype=torch.float64)).requires_grad_()
    information = torch.logdet(torch.eye(dim) + mixing.T @ mixing / (1 - rho**2)) / 2 / dim
    assert float(information.detach()) == pytest.approx(measured("vclub")["exact"])
    [gradient] = torch.autograd.grad(information, mixing)
    torch.testing.assert_close(gradient, rho * torch.eye(dim, dtype=torch.float64) / dim)


def measured(kind: str, draws: int = 200, **values: object) -> dict[str, float]:
    setting = cell(**values)
    return measure(kind, setting, fitted_network(setting, 5), draws)  # type: ignore[arg-type]


def test_with_a_true_q_vclub_is_at_its_limit_and_its_gradient_points_the_right_way() -> None:
    found = measured("vclub", batch_size=256)
    assert found["mean"] == pytest.approx(found["limit"], abs=0.02)
    assert found["bias"] == pytest.approx(found["mean"] - found["exact"])
    assert found["mean_gradient_cosine"] > 0.99
    assert found["gradient_cosine"] < found["mean_gradient_cosine"]


def test_run_writes_results_table_and_pictures(tmp_path: Path) -> None:
    run(tmp_path, rhos=(0.0, 0.5), embed_dims=(2,), batch_sizes=(8, 16), fit_steps=2, draws=3)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(cells((0.0, 0.5), (2,), (8, 16))) == 12
    assert len(results["rows"]) == 4 * (1 + 4 + 4)  # hsic, crosscov and orthogonal need no q
    table = (tmp_path / "table.md").read_text()
    assert table.count("\n| 0.5 |") == len(results["rows"]) / 2
    names = {file.name for file in tmp_path.glob("*.png")}
    assert names == {"estimates.png", "gradient_cosine.png", "gradient_noise.png"}
    assert len({KIND_COLOURS[kind] for kind in KINDS}) == len(KINDS)


def test_gradients_are_the_parts_of_that_of_a_training_step(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    options = {"mi_weight": 0.3, "aggregate_weight": 0.7, "optimizer": {"clip_norm": 0.0}}
    options |= {"mi": {"fit_steps": 1, "learning_rate": 1e-12, "warmup_steps": 0, "ramp_steps": 0}}
    module = small_embedder(tiny_backbone_dir, kind=RecordingEmbedder, **options)
    found = gradients(module, first_batch(module, tiny_mmeb_dir), with_network_of(module.mutual_information))
    prefixes = [name for name, _ in module.named_parameters() if "prefix" in name]
    make_trainer(tmp_path, max_steps=1).fit(module, small_data(tiny_mmeb_dir))
    assert isinstance(module, RecordingEmbedder)
    expected = torch.cat([module.gradients[name].flatten() for name in prefixes])
    torch.testing.assert_close(found["contrastive"] + 0.3 * found["vclub"], expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found["contrastive"], expected, rtol=1e-2)


PERCENT = {
    name: [float(value) for value in pair.split("/")]
    for name, pair in zip(PUBLISHED[::2], PUBLISHED[1::2], strict=True)
}


def scores(place: int = 0) -> dict[str, dict[str, float]]:
    return {name: {"hit@1": values[place] / 100} for name, values in PERCENT.items()}


def test_the_inconsistent_published_rows_are_found_and_no_others() -> None:
    audits = {audit.row.model: audit for audit in map(audit_row, read_table())}
    assert len(audits) == 44
    found = {model: audit.problems for model, audit in audits.items() if audit.problems}
    assert set(found) == {
        "VLM2Vec Qwen2-VL-2B HighRes",
        "UniME Phi-3.5-V",
        "UniME LLaVA-1.6 LowRes",
        "SigLIP base",
    }
    assert found["VLM2Vec Qwen2-VL-2B HighRes"] == ("printed overall 59.3, but its meta-tasks give 60.1",)
    for model, overall, weighted in (("UniME Phi-3.5-V", 64.2, 61.3), ("UniME LLaVA-1.6 LowRes", 66.6, 63.6)):
        (problem,) = found[model]
        assert f"printed overall {overall}, but its meta-tasks give {weighted}" in problem
        assert f"{overall} is the mean of the four meta-tasks" in problem
    assert found["SigLIP base"] == (
        "the meta-tasks give 30.7 but IND and OOD give 34.8: a meta-task cell must be wrong",
    )


def test_odd_task_scores_are_named() -> None:
    tasks = scores()
    del tasks["GQA"]
    tasks["CIFAR-100"] = {"hit@1": 0.5}
    tasks["DocVQA"] = {"hit@1": 0.5, "hit@5": 0.4, "num_correct": 400, "num_pred": 1000}
    tasks["EDIS"] = {"hit@1": 81.4}
    found = audit_scores(TaskScores(tasks))
    assert found.report is not None
    assert "CIFAR-100" not in found.report.tasks
    for words in ("CIFAR-100", "GQA", "DocVQA: 400 of 1000", "DocVQA: hit@k falls", "EDIS: not a fraction"):
        assert any(words in problem for problem in found.problems), words


def test_own_score_files_are_read_in_all_formats(tmp_path: Path) -> None:
    """Half of the rows of all 78 tasks are right, and nDCG@5 is a quarter; the first version has none."""
    metrics = {"aggregate": dict.fromkeys(METRICS, 0.5) | {"ndcg@5": 0.25}}
    about: dict[str, Any] = {"hits": {"aggregate": "1100"}, "metrics": metrics}
    tasks = MMEB_TASKS | V2_TASKS
    results = {name: TaskResult(task, 4, 0.1, {"aggregate": 0.5}, **about) for name, task in tasks.items()}
    report = ScoreReport(results)
    report.to_json_file(tmp_path / "scores.json")
    write_score_files(report.tasks, "aggregate", tmp_path / "files")
    write_leaderboard(report.tasks, "aggregate", tmp_path / "leaderboard.json", {})
    for place in (".", "scores.json", "files/v1", "files/v2", "leaderboard.json"):
        found = audit_scores(read_scores(tmp_path / place))
        assert found.report is not None
        means = {name: found.report.means[name]["score"] for name in ("overall", "video")}
        assert means == {"overall": 0.5, "video": 0.5}, place
        if place == "files/v1":
            (problem,) = found.problems
            assert problem.startswith("without their own metric, left out of the means: ")
            assert problem.count(", ") == 24
            continue
        assert found.problems == (), place
        assert found.report.means["visdoc"] == {"score": 0.25}, place
    with pytest.raises(ValueError, match="mixes score files of VLM2Vec v1 and v2"):
        read_scores(tmp_path / "files")
    task = replace(MMEB_TASKS["GQA"], meta_task="grounding")
    report.tasks["GQA"] = replace(report.tasks["GQA"], task=task)
    report.to_json_file(tmp_path / "scores.json")
    (problem,) = audit_scores(read_scores(tmp_path)).problems
    assert problem.startswith("GQA counts as grounding, MMEB has it in vqa")
