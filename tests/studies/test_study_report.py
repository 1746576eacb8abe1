"""From a results file to table, pictures and README."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from studies.results import append_result, newest_results
from studies.study import Study
from studies.study_report import write_report
from studies.study_tables import cell_table
from tests.support.study import made_up_result, toy_study


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Two cells with a curve each and three seeds, and one that is not there yet."""
    monkeypatch.chdir(tmp_path)
    study = toy_study(
        tmp_path,
        seeds=[0, 1, 2],
        curve=["0.5x", "1x"],
        cells={"a": {"label": "cell A"}, "b": None, "later": {"seeds": [0]}},
        differences=[{"name": "A over B", "of": "a", "over": "b"}],
    )
    for seed, lift in ((0, 0.0), (1, 1.0), (2, 2.0)):
        for cell, score in (("a", 60.0), ("b", 57.0)):
            for step in (50, 100):
                line = made_up_result(study.cells[cell], seed, step, score + lift + step / 50)
                append_result(study.results_file, line)
    return study


def rows(table: str) -> list[list[str]]:
    return [[entry.strip() for entry in line.strip("|").split("|")] for line in table.splitlines()]


def test_cells_show_the_last_step_and_the_gain_of_aggregation(study: Study) -> None:
    heading, _, first, second = rows(cell_table(study, newest_results(study)))
    row = dict(zip(heading, first, strict=True))
    assert row["cell"] == "cell A"
    assert row["overall"] == "63.0 ± 2.5"  # 62, 63 and 64
    assert (row["best path"], row["gain over best path"], row["gain over mean path"]) == (
        "62.0",
        "+1.0",
        "+2.0",
    )
    assert row["token passes"] == "100.00"
    assert second[0] == "b"


def test_the_report_has_pictures_table_conclusion_and_what_is_missing(study: Study) -> None:
    (study.output_dir / "conclusion.md").write_text("A is better.\n", encoding="utf-8")
    readme = write_report(study).read_text(encoding="utf-8")
    assert "A is better." in readme
    assert "Not finished: later (0 of 1 seeds)." in readme
    assert "earlier configuration" not in readme
    for name in ("cells", "differences", "curves", "groups", "group_curves"):
        assert f"({name}.png)" in readme
        with Image.open(study.output_dir / f"{name}.png") as picture:
            assert picture.info["dpi"] == pytest.approx((150, 150), abs=0.1)
    assert (study.output_dir / "table.md").read_text(encoding="utf-8").strip() in readme
