"""What a study's YAML file means, which of its results count, and what is reported of them."""

import inspect
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image
from scipy.stats import ttest_1samp

from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.model.backbone import AdapterConfig
from parallel_decoupling.objective.vclub import Kind
from parallel_decoupling.training.module import PDFEmbedder
from parallel_decoupling.training.optimization import MIConfig, OptimizerConfig
from parallel_decoupling.world.answers import ANSWER_TASKS, GROUP
from parallel_decoupling.world.rows import WORLD_TASKS
from studies import results
from studies.paired_statistics import holm, interval, p_value, paired_difference
from studies.results import append_result, missing_points, newest_results, outdated, read_results, take_over
from studies.study import PROJECT_DIR, Difference, Run, Study, load_study, study_files
from studies.study_report import write_report
from studies.study_tables import cell_table
from tests.support.study import made_up_result, save_study, toy_study


def test_steps_are_numbers_or_multiples_of_the_base_config(tmp_path: Path) -> None:
    cells = {
        "base": None,
        "half": {"steps": "0.5x"},
        "seven": {"steps": 7},
        "untrained": {"steps": 0},
        "curve": {"curve": ["1x", 10, "0.25x"]},
    }
    found = toy_study(tmp_path, cells=cells).cells
    assert [cell.points for cell in found.values()] == [(100,), (50,), (7,), (0,), (10, 25, 100)]
    assert [cell.max_steps for cell in found.values()] == [100, 50, 7, 0, 100]
    assert found["half"].config["trainer"]["max_steps"] == 50


def test_the_hash_tells_configurations_apart_and_not_names(tmp_path: Path) -> None:
    cells = {
        "one": None,
        "same": {"overrides": {"model.num_paths": 2}, "label": "another", "seeds": [3]},
        "other": {"overrides": {"model.num_paths": 3}},
        "longer": {"steps": 101},
        "curve": {"curve": ["0.5x", "1x"]},
    }
    hashes = {name: cell.config_hash for name, cell in toy_study(tmp_path, cells=cells).cells.items()}
    assert hashes["one"] == hashes["same"] == hashes["curve"]
    assert len({hashes["one"], hashes["other"], hashes["longer"]}) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"cells": {"a": {"step": 3}}}, r"cells\.a: unknown key \['step'\]"),
        ({"cells": {"a": {"steps": "half"}}}, "a multiple such as 0.5x, got 'half'"),
        (
            {"cells": {"a": {"config": "nowhere.yaml"}}},
            rf"cells\.a: there is no config file nowhere\.yaml, neither in .* nor in {PROJECT_DIR}",
        ),
        ({"cells": {"a": {"overrides": {"trainer.callbacks": []}}}}, r"cells\.a: remove trainer\.callbacks"),
        ({"cells": {"a": None}, "differences": [{"name": "d", "of": "a", "over": "b"}]}, "no cell 'b'"),
        (
            {"cells": {"a": None}, "differences": [{"name": "d", "of": "a", "over": "a", "of_step": 7}]},
            "a is not scored at step 7",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_study(save_study(tmp_path, content))


@pytest.mark.parametrize("name", study_files())
def test_every_shipped_study_sets_options_that_exist(name: str) -> None:
    options = {
        "model": set(inspect.signature(PDFEmbedder).parameters),
        "data": set(inspect.signature(MMEBDataModule).parameters),
        "mi": set(MIConfig.__dataclass_fields__),
        "optimizer": set(OptimizerConfig.__dataclass_fields__),
        "adapter": set(AdapterConfig.__dataclass_fields__),
    }
    study, tasks = load_study(name), {*(task.name for task in WORLD_TASKS), *ANSWER_TASKS}
    for cell in study.cells.values():
        parts = {"model": cell.config["model"], "data": cell.config["data"]}
        parts |= {part: cell.config["model"].get(part, {}) for part in ("mi", "optimizer", "adapter")}
        for part, values in parts.items():
            assert set(values) <= options[part], f"{cell.name}: {part}"
        assert parts["mi"].get("kind", "none") in get_args(Kind)
        assert set(cell.config["data"].get("eval_tasks") or ()) <= tasks | {"overall", GROUP}
        assert set(cell.config["data"].get("train_subsets") or ()) <= tasks
    if all(cell.config["data"]["data_dir"] == "mini-mmeb" for cell in study.cells.values()):
        assert {task for group in study.groups.values() for task in group} <= tasks


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


def test_differences_pair_seeds_and_ignore_those_of_one_side(tmp_path: Path) -> None:
    study = toy_study(tmp_path, cells={"a": None, "b": {"curve": ["0.5x", "1x"]}})
    a, b = study.cells.values()
    results = [made_up_result(a, seed, 100, 50.0 + 10 * seed) for seed in (0, 1, 2)]
    results += [made_up_result(b, seed, 100, 48.0 + 10 * seed) for seed in (2, 1)]
    results += [made_up_result(b, 1, 50, 30.0)]
    found = paired_difference(study, results, Difference("d", "a", "b"))
    assert found is not None
    assert found.values == pytest.approx((2.0, 2.0))
    swapped = paired_difference(study, results, Difference("d", "b", "a"))
    assert swapped is not None
    assert (swapped.mean, swapped.half_width) == pytest.approx((-found.mean, found.half_width))
    early = paired_difference(study, results, Difference("d", "a", "b", over_step=50))
    assert early is not None
    assert early.values == pytest.approx((30.0,))
    assert paired_difference(study, results, Difference("d", "a", "b"), "vqa") is None


@pytest.mark.parametrize("values", [(1.0, 2.0, 4.0), (-0.5, 0.1, 0.3, -2.0), (1.0, 2.0, 3.0, 4.0, 5.0)])
def test_the_interval_and_the_p_value_are_those_of_the_t_test(values: tuple[float, ...]) -> None:
    found, wanted = interval(values), ttest_1samp(values, 0)
    ends = (found.mean - found.half_width, found.mean + found.half_width)
    assert ends == pytest.approx(tuple(wanted.confidence_interval(0.95)))
    assert found.excludes_zero == (wanted.pvalue < 0.05)
    assert p_value(found) == pytest.approx(wanted.pvalue)


def test_holm_multiplies_the_smallest_most_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.4]) == pytest.approx([0.8, 0.8])
    assert holm([0.9, 0.8, 0.9]) == [1.0, 1.0, 1.0]
    assert holm([]) == []


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Two cells with a curve each and three seeds, and one that is not there yet."""
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
