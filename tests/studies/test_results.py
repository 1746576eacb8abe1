"""The results file: what counts as finished, what is shared, what the report takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from studies import results
from studies.results import (
    append_result,
    missing_points,
    newest_results,
    outdated,
    read_results,
    take_over,
)
from studies.study import Run
from tests.support.study import made_up_result, toy_study


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_point_is_finished_with_the_present_configuration_only(tmp_path: Path) -> None:
    study = toy_study(tmp_path, cells={"a": {"curve": [5, 10]}})
    run = Run("toy", study.cells["a"], 0)
    assert missing_points(run, read_results(study.results_file)) == [5, 10]
    append_result(study.results_file, made_up_result(run.cell, 0, 5, 50.0))
    append_result(study.results_file, made_up_result(run.cell, 1, 10, 50.0))
    append_result(
        study.results_file, {**made_up_result(run.cell, 0, 10, 50.0), "config_hash": "an earlier one"}
    )
    assert missing_points(run, read_results(study.results_file)) == [10]


def test_only_the_newest_lines_of_present_configurations_and_seeds_count(tmp_path: Path) -> None:
    study = toy_study(tmp_path, seeds=[0, 1], cells={"a": None, "b": {"seeds": [0]}})
    a, b = study.cells.values()
    for line in (
        made_up_result(b, 0, 100, 1.0),
        made_up_result(a, 0, 100, 2.0),
        {**made_up_result(b, 0, 100, 3.0), "config_hash": "an earlier one"},
        {**made_up_result(a, 1, 100, 4.0), "config_hash": "an earlier one"},
        {**made_up_result(a, 0, 100, 5.0), "cell": "removed"},
        made_up_result(a, 0, 99, 6.0),  # a step that is scored no longer
        made_up_result(b, 1, 100, 7.0),  # a seed that is not the cell's
        made_up_result(a, 0, 100, 8.0),
    ):
        append_result(study.results_file, line)
    assert [
        (line["cell"], line["seed"], line["means"]["overall"]["aggregate"]) for line in newest_results(study)
    ] == [("a", 0, 0.08), ("b", 0, 0.01)]
    assert outdated(study) == ["a"]  # seed 0 of b has a line of the present configuration
    append_result(study.results_file, made_up_result(a, 1, 100, 9.0))
    assert outdated(study) == []


@pytest.mark.parametrize("tail", ['{"study": "to', '{"cell": "a"}', ""])
def test_an_interrupted_write_is_left_out_and_cut_off_by_the_next(tmp_path: Path, tail: str) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(f'{{"study": "toy"}}\n{tail}', encoding="utf-8")
    whole = [{"study": "toy"}, *([{"cell": "a"}] if tail.endswith("}") else [])]
    if tail.endswith("to"):
        with pytest.warns(UserWarning, match=r"results\.jsonl, line 2 is the start of an interrupted write"):
            assert read_results(file) == whole
    else:
        assert read_results(file) == whole
    append_result(file, {"seed": 1})
    append_result(file, {"seed": 2})
    assert read_results(file) == [*whole, {"seed": 1}, {"seed": 2}]


@pytest.mark.parametrize("commit", ["0" * 40, "1" * 40])
def test_runs_of_the_same_commit_alone_are_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commit: str
) -> None:
    monkeypatch.setattr(results, "code_version", lambda: (commit, False))
    study = toy_study(tmp_path, cells={"a": None})
    run = Run("toy", study.cells["a"], 0)
    other = made_up_result(run.cell, 0, 100, 5.0, study="other")
    append_result(study.results_file.parent.parent / "other" / "results.jsonl", other)
    take_over(run, study.results_file)
    origins = [line["copied_from"] for line in read_results(study.results_file)]
    assert origins == (["other/a"] if commit == other["commit"] else [])
