from __future__ import annotations

import json
from pathlib import Path

import pytest

from parallel_decoupling import cli
from parallel_decoupling.data.tasks import MMEB_TASKS
from parallel_decoupling.retrieval.audit import audit_row, audit_scores
from parallel_decoupling.retrieval.published import PublishedRow, read_table
from parallel_decoupling.retrieval.score_files import TaskScores
from tests.retrieval.test_report import PUBLISHED

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


def test_correcting_a_row_makes_it_consistent() -> None:
    row = next(row for row in read_table() if row.model == "VLM2Vec Qwen2-VL-2B HighRes")
    assert not audit_row(PublishedRow(row.model, {**row.means, "overall": 60.1})).problems
    assert audit_row(PublishedRow(row.model, {**row.means, "overall": 60.3})).problems


def test_a_wrong_split_is_told_from_a_wrong_meta_task() -> None:
    row = next(row for row in read_table() if row.model == "E5-V")
    (problem,) = audit_row(PublishedRow("x", {**row.means, "in_distribution": 25.0})).problems
    assert "IND or OOD cell must be wrong" in problem


@pytest.mark.parametrize(("place", "overall"), [(0, 59.7), (1, 65.4)])
def test_published_task_scores_aggregate_to_the_published_means(place: int, overall: float) -> None:
    report, problems = audit_scores(TaskScores("leaderboard", scores(place)))
    assert report is not None
    assert 100 * report.means["overall"]["hit@1"] == pytest.approx(overall, abs=0.05)
    assert not problems


def test_odd_task_scores_are_named() -> None:
    tasks = scores()
    del tasks["GQA"]
    tasks["CIFAR-100"] = {"hit@1": 0.5}
    tasks["DocVQA"] = {"hit@1": 0.5, "hit@5": 0.4, "num_correct": 400, "num_pred": 1000}
    tasks["EDIS"] = {"hit@1": 81.4}
    report, problems = audit_scores(TaskScores("leaderboard", tasks))
    assert report is not None
    assert "CIFAR-100" not in report.tasks
    for words in ("CIFAR-100", "GQA", "DocVQA: 400 of 1000", "DocVQA: hit@k falls", "EDIS: no fraction"):
        assert any(words in problem for problem in problems), words


def test_percent_instead_of_fractions_is_said_and_read() -> None:
    tasks = {name: {"hit@1": values[0]} for name, values in PERCENT.items()}
    report, problems = audit_scores(TaskScores("leaderboard", tasks))
    assert report is not None
    assert 100 * report.means["overall"]["hit@1"] == pytest.approx(59.7, abs=0.05)
    assert problems == ["hit@1 is in percent; the formats have fractions"]
    assert set(report.tasks) == set(MMEB_TASKS)


def test_the_leaderboards_own_headings_are_read(tmp_path: Path) -> None:
    table = tmp_path / "results.csv"
    table.write_text(
        "Models,Model Size(B),Data Source,Overall,IND,OOD,Classification,VQA,Retrieval,Grounding\n"
        "E5-V,8.36,TIGER-Lab,13.3,14.9,11.5,21.8,4.9,11.5,19.0\nshort,1,x,50.0,,,-,,,\n"
    )
    first, second = read_table(table)
    assert first.means["in_distribution"] == 14.9
    assert first.source == "TIGER-Lab"
    assert not audit_row(first).problems
    assert second.means == {"overall": 50.0}
    table.write_text("model,overall\nx,much\n")
    with pytest.raises(ValueError, match=r"results.csv, line 2, column overall: 'much'"):
        read_table(table)
    table.write_text("name,score\nx,1\n")
    with pytest.raises(ValueError, match="no table of results"):
        read_table(table)


def test_the_command_says_what_is_wrong_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["audit"])
    assert stopped.value.code == 1
    assert capsys.readouterr().out.count("problem: ") == 4
    good = tmp_path / "good.json"
    good.write_text(json.dumps({"metadata": {}, "metrics": {"image": scores(), "video": {}, "visdoc": {}}}))
    cli.main(["audit", str(good)])
    assert "59.7" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.main(["audit", str(tmp_path / "nowhere.json")])
    assert stopped.value.code == 2
