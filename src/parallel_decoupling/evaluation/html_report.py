"""One run as one HTML file: facts, scores, bars, paths, retrieved examples.

Here: what the page shows, as plain values for the template ``run_report.html``. Nothing is loaded from
elsewhere, no script is needed, pictures are inside; light and dark follow the reader's browser. ``lightning
test`` writes it from ``scores.json`` and ``report_parts.json``, ``lightning paths`` again with what it found.
Elsewhere: the numbers (``report``, ``compare``), ``paths.json`` (written by ``lightning paths``).
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, RawInput
from parallel_decoupling.data.tasks import EvalTask
from parallel_decoupling.evaluation.compare import (
    Difference,
    check_same_tasks,
    differences,
    progress,
    run_name,
    scores_file,
)
from parallel_decoupling.evaluation.plots import example_rows, thumbnail
from parallel_decoupling.evaluation.report import META_TASKS, ScoreReport
from parallel_decoupling.evaluation.score import TaskScore

REPORT_FILE = "report.html"
PARTS_FILE = "report_parts.json"
BASELINE_FILE = "baseline_scores.json"
PATHS_DIR = "paths"
PATHS_FILE = "paths.json"
"""What ``lightning paths`` writes into ``PATHS_DIR`` of the run folder."""
PATH_PICTURES = {
    "attention_maps.png": "Attention of the pooled token to the image, path by path",
    "contributions.png": "Change of the embedding without a patch, path by path",
}
FACTS = ("model.backbone", "model.num_paths", "model.prefix_length", "model.mi_weight", "global_step", "seed")
"""Run facts above the fold, as far as the run has them; all others are folded away."""
MEANS = ("overall", "in_distribution", "out_of_distribution", "mean_of_meta_tasks")


@dataclass(frozen=True)
class Shown:
    """One input as the page shows it.

    Attributes:
        text: without image placeholders.
        image: data URI of a small JPEG, "" without an image.
        verdict: ``"truth"``, ``"above"`` (ranked above the truth), ``"below"`` or "" for a query.
    """

    text: str
    image: str
    verdict: str


@dataclass(frozen=True)
class TaskExamples:
    """A few queries of one task, misses first.

    Attributes:
        task: its name.
        rows: per query the query itself, the best candidates in order, and the truth last.
    """

    task: str
    rows: list[list[Shown]]


@dataclass(frozen=True)
class Baseline:
    """The run that a report compares with.

    Attributes:
        name: of its folder.
        report: its scores.
    """

    name: str
    report: ScoreReport

    @classmethod
    def read(cls, run_dir: str) -> Baseline:
        """Read the scores of a tested run.

        Raises:
            ValueError: no ``scores.json`` in the folder.
        """
        return cls(run_name(Path(run_dir)), ScoreReport.from_json_file(scores_file(run_dir)))


@dataclass(frozen=True)
class PageParts:
    """What a page needs beside scores, kept in the run's folder so that it can be written again.

    Attributes:
        examples: in the order to be shown.
        path_cosine: ``[N][N]``, mean cosine between the paths' queries; shown without a ``paths.json`` of the
            same step.
        baseline: kept whole, as its folder may be gone later.
    """

    examples: Sequence[TaskExamples] = ()
    path_cosine: list[list[float]] | None = None
    baseline: Baseline | None = None

    @classmethod
    def read(cls, run_dir: str | Path) -> PageParts:
        """Of a run's folder; a run without ``report_parts.json`` has no parts."""
        folder = Path(run_dir)
        if not (folder / PARTS_FILE).is_file():
            return cls()
        content = json.loads((folder / PARTS_FILE).read_text(encoding="utf-8"))
        examples = [
            TaskExamples(each["task"], [[Shown(**shown) for shown in row] for row in each["rows"]])
            for each in content["examples"]
        ]
        name = content["baseline"]
        baseline = name and Baseline(name, ScoreReport.from_json_file(folder / BASELINE_FILE))
        return cls(examples, content["path_cosine"], baseline)

    def write(self, run_dir: str | Path) -> None:
        """Write ``report_parts.json``, and the baseline's scores if there is one."""
        content = {
            "examples": [asdict(each) for each in self.examples],
            "path_cosine": self.path_cosine,
            "baseline": self.baseline and self.baseline.name,
        }
        (Path(run_dir) / PARTS_FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")
        if self.baseline is not None:
            self.baseline.report.to_json_file(Path(run_dir) / BASELINE_FILE)


def task_examples(task: EvalTask, score: TaskScore, k: int = 4, rows: int = 3) -> TaskExamples:
    """Choose queries and shrink their pictures, so that the task itself need not be kept.

    Args:
        task: the inputs.
        score: of that task; its ranking is shown.
        k: candidates per query, 1 to 10.
        rows: queries; half of them misses while both kinds last.
    """
    shown = []
    for row in example_rows(next(iter(score.hits.values())), rows):
        positive = task.candidates_of_row[row][0]
        line, verdict = [_shown(task.queries[task.query_of_row[row]], "")], "above"
        for candidate in score.ranking[row, :k].tolist():
            if candidate == positive:
                line.append(_shown(task.candidates[candidate], "truth"))
                verdict = "below"
            elif candidate >= 0:
                line.append(_shown(task.candidates[candidate], verdict))
        line += [Shown("", "", "")] * (k + 1 - len(line))
        shown.append([*line, _shown(task.candidates[positive], "truth")])
    return TaskExamples(task.task.name, shown)


def write_run_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` of a tested run from what its folder holds.

    Returns:
        The file.

    Raises:
        ValueError: the run was not tested, or its baseline scored other tasks.
    """
    report = ScoreReport.from_json_file(scores_file(str(run_dir)))
    return write_html_report(report, run_dir, PageParts.read(run_dir))


def write_html_report(
    report: ScoreReport,
    run_dir: str | Path,
    parts: PageParts | None = None,
    html_file: str | Path | None = None,
) -> Path:
    """Write the page of a run.

    Args:
        report: of the run.
        run_dir: the page is named after it; ``paths/paths.json`` in it adds probes and pictures of the paths
            if it is of the same step and number of paths as the scores.
        parts: what else is shown.
        html_file: by default ``report.html`` in ``run_dir``.

    Returns:
        The file.

    Raises:
        ValueError: the baseline scored other tasks.
    """
    run_dir, parts = Path(run_dir), parts or PageParts()
    name, baseline = run_name(run_dir), parts.baseline
    if baseline is not None:
        check_same_tasks(baseline.name, baseline.report, name, report)
    environment = Environment(
        loader=PackageLoader("parallel_decoupling", "evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    facts = flattened(report.run)
    page = environment.get_template("run_report.html").render(
        name=name,
        facts={key: facts[key] for key in FACTS if key in facts},
        all_facts=facts,
        columns=report.shown_columns,
        modes=_modes(report),
        groups=_groups(report, None if baseline is None else baseline.report),
        overall=report.means["overall"][report.columns[0]],
        baseline_name=None if baseline is None else baseline.name,
        warnings=report.warnings,
        gaps=report.gaps,
        paths=_paths(run_dir, report, parts.path_cosine),
        examples=parts.examples,
    )
    file = run_dir / REPORT_FILE if html_file is None else Path(html_file)
    file.write_text(page, encoding="utf-8")
    return file


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as ``model.mi.kind: vclub``; what is not set is left out."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _modes(report: ScoreReport) -> list[dict[str, Any]]:
    """What every column scores and costs, by column; without costs nothing."""
    overall = report.means["overall"]
    return [
        {"column": column, "score": overall[column], **report.modes[column]}
        for column in report.shown_columns
        if column in report.modes
    ]


def _groups(report: ScoreReport, baseline: ScoreReport | None) -> list[dict[str, Any]]:
    """Tasks by meta-task with their mean, then the means; everything a line of the table needs."""
    found = None if baseline is None else differences(baseline, report)
    headline, columns = report.columns[0], report.shown_columns

    def line(name: str, title: str, scores: Mapping[str, float], kind: str) -> dict[str, Any]:
        is_task = kind == "task"
        result = report.tasks[name] if is_task else None
        theirs = gap = None
        if baseline is not None and found is not None:
            source: Any = baseline.tasks[name].hit_at_1 if is_task else baseline.means[name]
            theirs = source[baseline.columns[0]]
            gap = _gap((found.tasks if is_task else found.means)[name])
        return {
            "title": title,
            "kind": kind,
            "score": scores[headline],
            "scores": [scores[column] for column in columns],
            "split": ("IND" if result.task.in_distribution else "OOD") if result else "",
            "queries": (result.num_queries or "") if result else "",
            "chance": (result.chance or None) if result else None,  # 0 is not known
            "at_chance": bool(result and result.at_chance),
            "baseline": theirs,
            "gap": gap,
        }

    groups = []
    for meta_task in META_TASKS:
        names = report.groups.get(meta_task, ())
        lines = [line(name, name, report.tasks[name].hit_at_1, "task") for name in names]
        if lines:
            lines.append(line(meta_task, report.mean_title(meta_task), report.means[meta_task], "mean"))
            groups.append({"title": meta_task, "lines": lines})
    means = [line(n, report.mean_title(n), report.means[n], "mean") for n in MEANS if n in report.means]
    return [*groups, {"title": "means over all tasks", "lines": means}]


def _gap(difference: Difference) -> dict[str, Any]:
    """A difference as text, and whether its interval excludes zero."""
    text = f"{100 * difference.difference:+.1f}"
    if difference.low is None or difference.high is None:
        return {"text": text, "sign": ""}
    text += f" [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    return {"text": text, "sign": "up" if difference.low > 0 else "down" if difference.high < 0 else ""}


def _paths(run_dir: Path, report: ScoreReport, path_cosine: list[list[float]] | None) -> dict[str, Any]:
    """Matrices, probes and pictures of ``lightning paths``, or the one matrix that is given."""
    folder, note = run_dir / PATHS_DIR, ""
    content: dict[str, Any] = {}
    if (folder / PATHS_FILE).is_file():
        content = json.loads((folder / PATHS_FILE).read_text(encoding="utf-8"))
        note = _mismatch(content, report, run_dir)
    if note or not content:
        matrices = {} if path_cosine is None else {"mean cosine": path_cosine}
        return {"matrices": matrices, "probes": {}, "pictures": {}, "note": note}
    similarity, errors = content["similarity"], content["errors"]
    matrices = {"mean cosine": similarity["cosine"], "linear CKA": similarity["linear_cka"]}
    if errors:
        matrices["misses: Cohen's kappa"] = errors["kappa"]
    pictures = {
        title: _data_uri((folder / name).read_bytes(), "png")
        for name, title in PATH_PICTURES.items()
        if (folder / name).is_file()
    }
    return {"matrices": matrices, "probes": content["probes"], "pictures": pictures, "note": ""}


def _mismatch(content: Mapping[str, Any], report: ScoreReport, run_dir: Path) -> str:
    """What differs between the weights of ``paths.json`` and those of the scores; "" if they agree."""
    theirs = {**progress(content.get("run", {})), "paths": content["num_paths"]}
    ours = {**progress(report.run), "paths": len(report.path_columns)}
    differ = [f"{key} {theirs[key]} there, {ours[key]} here" for key in ours if theirs[key] != ours[key]]
    if not differ:
        return ""
    return (
        f"{PATHS_DIR}/{PATHS_FILE} is of other weights than the scores ({', '.join(differ)}); "
        f"run lightning paths {run_dir} again"
    )


def _shown(item: RawInput, verdict: str) -> Shown:
    text = " ".join(item.text.replace(IMAGE_PLACEHOLDER, " ").split())
    if not item.images:
        return Shown(text, "", verdict)
    buffer = io.BytesIO()
    thumbnail(item.images[0], 128).convert("RGB").save(buffer, "JPEG", quality=90)
    return Shown(text, _data_uri(buffer.getvalue(), "jpeg"), verdict)


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
