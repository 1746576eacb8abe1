from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, RawInput
from parallel_decoupling.data.tasks import MMEB_TASKS, EvalTask, Task
from parallel_decoupling.evaluation.html_report import (
    Baseline,
    PageParts,
    flattened,
    task_examples,
    write_html_report,
    write_run_report,
)
from parallel_decoupling.evaluation.report import ScoreReport, TaskResult
from parallel_decoupling.evaluation.score import TaskScore

VOID = ("meta", "img", "br")


class Page(HTMLParser):
    """Tags, attributes and texts of a page; fails on tags that do not match."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(" ".join(data.split()))


def report(skill: int, num_paths: int = 2) -> ScoreReport:
    """Of ten queries, the aggregate finds ``skill`` and path n one fewer per n + 1."""
    tasks = {}
    for name, meta_task, seen in (("shape", "classification", True), ("find", "retrieval", False)):
        hits = {"aggregate": skill} | {f"path_{path}": skill - path - 1 for path in range(num_paths)}
        rows = {column: "1" * count + "0" * (10 - count) for column, count in hits.items()}
        scores = {column: count / 10 for column, count in hits.items()}
        tasks[name] = TaskResult(Task(name, meta_task, seen), 10, 0.25, scores, rows)  # type: ignore[arg-type]
    return ScoreReport(
        tasks, {"model": {"backbone": "tiny", "num_paths": num_paths, "dtype": None}, "seed": 4}
    )


def at_step(step: int | None, num_paths: int = 2) -> ScoreReport:
    made = report(6, num_paths)
    return replace(made, run={**made.run, "global_step": step})


def save(made: ScoreReport, folder: Path) -> str:
    made.to_json_file(folder / "scores.json")
    return str(folder)


@pytest.fixture
def examples() -> tuple[EvalTask, TaskScore]:
    """One query whose truth, candidate 0, comes second."""
    picture = Image.new("RGB", (200, 100), "red")
    queries = [RawInput(f"{IMAGE_PLACEHOLDER}\n<script>alert(1)</script> & more", (picture,))]
    candidates = [RawInput("truth"), RawInput("better"), RawInput("worse")]
    task = EvalTask(Task("find", "retrieval", False), queries, candidates, [0], [[0, 1, 2]])
    ranking = torch.tensor([[1, 0, 2, -1, -1, -1, -1, -1, -1, -1]])
    return task, TaskScore(task.task, {"aggregate": torch.tensor([False])}, ranking, 1 / 3)


def test_page_stands_alone(tmp_path: Path, examples: tuple[EvalTask, TaskScore]) -> None:
    file = write_html_report(report(6), tmp_path, PageParts([task_examples(*examples)]))
    page = Page(file)
    assert not any(tag in ("script", "link", "iframe") for tag, _ in page.tags)
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 1
    assert all(source.startswith("data:image/") for source in sources)
    picture = Image.open(io.BytesIO(base64.b64decode(sources[0].split(",")[1])))
    assert picture.size == (128, 64)
    text = file.read_text(encoding="utf-8")
    assert "http" not in text
    assert "prefers-color-scheme: dark" in text


def test_scores_and_facts_are_on_the_page(tmp_path: Path) -> None:
    texts = Page(write_html_report(report(6), tmp_path)).texts
    for shown in ("shape", "find", "60.0", "50.0", "40.0", "25.0", "model.num_paths", "model.backbone"):
        assert shown in texts
    assert "model.dtype" not in texts
    assert "overall (mean of tasks)" in texts
    assert "Paths" not in texts


@pytest.mark.parametrize("num_paths", [1, 2])
def test_what_the_modes_cost_is_on_the_page(tmp_path: Path, num_paths: int) -> None:
    cost = {"bytes_per_item": 4096.0, "microseconds_per_query": 71.4, "encoding_milliseconds_per_item": 2.345}
    made = report(6, num_paths)
    assert "Inference modes" not in Page(write_html_report(made, tmp_path)).texts, "without costs"
    modes = {column: {**cost, "bytes_per_item": 4096 * (1 + n)} for n, column in enumerate(made.columns)}
    del modes["aggregate"]["encoding_milliseconds_per_item"]  # nothing was encoded
    texts = Page(write_html_report(replace(made, modes=modes), tmp_path)).texts
    start = texts.index("encoding in ms per item") + 1
    rows = [["aggregate", "60.0", "4,096", "71"]]
    if num_paths > 1:
        rows += [["path 0", "50.0", "8,192", "71", "2.35"], ["path 1", "40.0", "12,288", "71", "2.35"]]
    assert texts[start : texts.index("Tasks")] == sum(rows, [])


def test_the_page_of_a_study_s_run_has_the_run_s_name(tmp_path: Path) -> None:
    folder = tmp_path / "pdf_seed4" / "step_480"
    folder.mkdir(parents=True)
    assert "pdf_seed4 step_480" in Page(write_html_report(report(6), folder)).texts
    assert Baseline.read(save(report(6), folder)).name == "pdf_seed4 step_480"


def test_a_single_path_is_shown_once(tmp_path: Path) -> None:
    texts = Page(write_html_report(report(6, num_paths=1), tmp_path)).texts
    assert "path 0" not in texts


def test_baseline_adds_bars_and_differences(tmp_path: Path) -> None:
    file = write_html_report(report(6), tmp_path, PageParts(baseline=Baseline("one path", report(2))))
    page = Page(file)
    bars = [a.get("style") for _, a in page.tags if a.get("class") in ("bar", "bar theirs")]
    assert bars == ["width: 60.00%", "width: 20.00%"] * (len(bars) // 2)
    assert len(bars) == 2 * (2 + 4)  # two tasks, four means
    assert any(text.startswith("+40.0 [") for text in page.texts)
    chance = [a["style"] for tag, a in page.tags if a.get("class") == "chance"]
    assert chance == ["left: 25.00%"] * 2


def test_scores_at_chance_are_marked(tmp_path: Path) -> None:
    texts = Page(write_html_report(report(2, num_paths=1), tmp_path)).texts
    assert "shape (at or below chance)" in texts


def test_warnings_and_what_the_means_leave_out_are_on_the_page(tmp_path: Path) -> None:
    warning = {
        "check": "collapsed_paths",
        "detail": "0.99 of <path> 1",
        "tasks": ["find"],
        "advice": "one path",
    }
    made = replace(report(6), warnings=[warning])
    shape = replace(made.tasks["shape"], task=MMEB_TASKS["VOC2007"], num_skipped=3)
    made = replace(made, tasks={**made.tasks, "VOC2007": shape})
    texts = Page(write_html_report(made, tmp_path)).texts
    for shown in (
        "Collapsed paths",
        "0.99 of <path> 1 (find)",
        "one path",
        "means over 1 of MMEB's 36 tasks: not MMEB's means",
        "rows skipped because of their images: VOC2007 3",
    ):
        assert shown in texts, texts
    assert any(text.endswith("1/36") for text in texts)


def test_examples_mark_the_truth_and_escape_text(
    tmp_path: Path, examples: tuple[EvalTask, TaskScore]
) -> None:
    shown = task_examples(*examples, k=3)
    assert [item.verdict for item in shown.rows[0]] == ["", "above", "truth", "below", "truth"]
    assert [item.text for item in shown.rows[0][1:]] == ["better", "truth", "worse", "truth"]
    texts = Page(write_html_report(report(6), tmp_path, PageParts([shown]))).texts
    assert "<script>alert(1)</script> & more" in texts


def test_short_rankings_leave_cells_empty(examples: tuple[EvalTask, TaskScore]) -> None:
    shown = task_examples(*examples, k=4)
    assert [item.text for item in shown.rows[0][1:]] == ["better", "truth", "worse", "", "truth"]


def test_paths_come_from_the_matrix_or_from_the_file(tmp_path: Path) -> None:
    file = write_html_report(report(6), tmp_path, PageParts(path_cosine=[[1.0, 0.37], [0.37, 1.0]]))
    assert Page(file).texts.count("0.37") == 2
    probe = {"accuracy": {"aggregate": 0.93, "path_0": 0.91}, "spread": {"aggregate": 0.02, "path_0": 0.03}}
    content = {
        "num_paths": 2,
        "run": {"global_step": 480, "seed": 4, "checkpoint": "last.ckpt"},
        "similarity": {"cosine": [[1, 0.21], [0.21, 1]], "linear_cka": [[1, 0.5], [0.5, 1]]},
        "errors": {"kappa": [[1, None], [None, 1]]},
        "probes": {"color": {**probe, "majority": 0.13}},
    }
    (tmp_path / "paths").mkdir()
    (tmp_path / "paths" / "paths.json").write_text(json.dumps(content))
    Image.new("RGB", (4, 4)).save(tmp_path / "paths" / "attention_maps.png")
    parts = PageParts(path_cosine=[[1.0, 0.37], [0.37, 1.0]])
    page = Page(write_html_report(at_step(480), tmp_path, parts))
    assert page.texts.count("0.21") == 2
    assert page.texts.count("no value") == 2
    assert "93" in page.texts
    assert sum(tag == "img" for tag, _ in page.tags) == 1
    assert not any("lightning paths" in text for text in page.texts)


def test_paths_of_another_run_of_as_many_steps_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "paths").mkdir()
    similarity = {"cosine": [[1, 0.21], [0.21, 1]], "linear_cka": [[1, 0.5], [0.5, 1]]}
    for seed, shown in ((4, True), (5, False)):
        run = {"global_step": 480, "seed": seed}
        content = {"num_paths": 2, "run": run, "similarity": similarity, "errors": None, "probes": {}}
        (tmp_path / "paths" / "paths.json").write_text(json.dumps(content))
        page = Page(write_html_report(at_step(480), tmp_path))
        assert ("0.21" in page.texts) == shown
        assert any("seed 5 there, 4 here" in text for text in page.texts) != shown


@pytest.mark.parametrize(("step", "num_paths"), [(960, 2), (480, 3), (None, 2)])
def test_paths_of_another_step_or_number_are_not_shown(
    step: int | None, num_paths: int, tmp_path: Path
) -> None:
    (tmp_path / "paths").mkdir()
    content = {
        "num_paths": 2,
        "run": {"global_step": 480, "seed": 4},
        "similarity": {"cosine": [[1, 0.21], [0.21, 1]]},
    }
    (tmp_path / "paths" / "paths.json").write_text(json.dumps(content))
    Image.new("RGB", (4, 4)).save(tmp_path / "paths" / "attention_maps.png")
    for parts in (PageParts(), PageParts(path_cosine=[[1.0, 0.37], [0.37, 1.0]])):
        page = Page(write_html_report(at_step(step, num_paths), tmp_path, parts))
        (note,) = (text for text in page.texts if "lightning paths" in text)
        assert ("global_step 480 there" in note) == (step != 480)
        assert ("paths 2 there, 3 here" in note) == (num_paths == 3)
        assert "0.21" not in page.texts
        assert page.texts.count("0.37") == 2 * (parts.path_cosine is not None)
        assert not any(tag == "img" for tag, _ in page.tags)


def test_a_baseline_with_other_tasks_is_refused(tmp_path: Path) -> None:
    other = Baseline("other", ScoreReport({"shape": report(2).tasks["shape"]}))
    with pytest.raises(ValueError, match="scored different tasks: other lacks find"):
        write_html_report(report(6), tmp_path, PageParts(baseline=other))


def test_a_page_can_be_written_again_from_the_run_s_folder(
    tmp_path: Path, examples: tuple[EvalTask, TaskScore]
) -> None:
    with pytest.raises(ValueError, match=r"no scores\.json .* test that run first"):
        write_run_report(tmp_path)
    assert PageParts.read(tmp_path) == PageParts()
    parts = PageParts([task_examples(*examples)], [[1.0, 0.37], [0.37, 1.0]], Baseline("plain", report(2)))
    parts.write(tmp_path)
    assert PageParts.read(tmp_path) == parts
    report(6).to_json_file(tmp_path / "scores.json")
    again = write_run_report(tmp_path).read_text(encoding="utf-8")
    assert again == write_html_report(report(6), tmp_path, parts, tmp_path / "other.html").read_text()
    assert "against plain" in again


def test_flattened_settings() -> None:
    assert flattened({"a": {"b": {"c": 1}, "d": None}, "e": [2]}) == {"a.b.c": "1", "e": "[2]"}
