"""One or several tested runs as tables, a JSON, a picture and one page, with paired bootstrap intervals."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from parallel_decoupling.data.names import printable
from parallel_decoupling.evaluation.plots import comparison_figure
from parallel_decoupling.evaluation.report import SCORES_FILE, ScoreReport, console, percent, text_table
from parallel_decoupling.files import atomic_write, write_json, write_text

INTERVAL_NOTE = "95 % by paired bootstrap over queries within tasks, one training seed"
PAGE_FILE, PAGE_WIDTH = "comparison.html", 140  # columns
RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """A run's score minus the baseline's in fractions, and 2.5 % and 97.5 % of the paired bootstrap."""

    difference: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.difference:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


@dataclass(frozen=True)
class RunDifferences:
    """Headline scores of one run minus the baseline's."""

    headline: str  # the mean that counts
    means: dict[str, Difference]
    tasks: dict[str, Difference]


@dataclass(frozen=True)
class Comparison:
    """Runs that scored the same rows; the first one is the baseline."""

    reports: dict[str, ScoreReport]
    differences: dict[str, RunDifferences]  # of every other run to the baseline, first columns

    @property
    def baseline(self) -> str:
        """Name of the first run."""
        return next(iter(self.reports))

    @property
    def best(self) -> str:
        """The run other than the baseline with the best headline score; the only run if there is one."""
        gains = {name: each.means[each.headline].difference for name, each in self.differences.items()}
        return max(gains, key=lambda name: gains[name], default=self.baseline)

    @property
    def note(self) -> str:
        """What the differences are, and how the best run was picked if there was a choice."""
        note = f"difference: {self.best} - {self.baseline}, {INTERVAL_NOTE}" if self.differences else ""
        if len(self.differences) > 1:
            note += f"; {self.best} is the best of {len(self.differences)} runs by the same score"
        return note

    @property
    def title(self) -> str:
        """The runs' names, and how far the best one is from the baseline overall."""
        if not self.differences:
            return self.baseline
        best = self.differences[self.best]
        return f"{' vs '.join(self.reports)}: {self.best} {best.means[best.headline]} points"

    def table(self) -> Table:
        """Tabulate the first column (the aggregate) by task and by mean; the last is best minus baseline."""
        baseline = self.reports[self.baseline]
        if not self.differences:
            return baseline.task_table()
        best, reports = self.differences[self.best], self.reports.values()
        rows = []
        for task, difference in best.tasks.items():
            scores = [percent(each.tasks[task].score[each.columns[0]]) for each in reports]
            rows.append([baseline.tasks[task].title, *scores, str(difference)])
        for mean, difference in best.means.items():
            scores = [percent(each.means[mean][each.columns[0]]) for each in reports]
            rows.append([baseline.mean_titles[mean], *scores, str(difference)])
        styles = [""] * len(best.tasks) + ["bold"] * len(best.means)
        headings = ("task", *self.reports, "difference [95 %]")
        return text_table("hit@1 in percent", headings, rows, styles, self.note)

    def show(self, console: Console) -> None:
        """Print the runs side by side, then what each of them says of itself."""
        console.print(printable(self.title), markup=False, highlight=False, soft_wrap=True)
        console.print(self.table())
        for name, report in self.reports.items():
            console.rule(Text(printable(name)))
            console.print(report.mode_table(), *report.warning_panels(), sep="\n")
            for gap in report.gaps if self.differences else ():  # else they are below the table
                console.print(printable(f"{name}: {gap}"), markup=False, highlight=False, soft_wrap=True)
            if report.path_cosine and len(report.path_columns) > 1:
                paths = report.path_columns
                cells = [[f"{value:.2f}" for value in values] for values in report.path_cosine]
                rows = [[path, *each] for path, each in zip(paths, cells, strict=True)]
                console.print(text_table("mean cosine between paths", ("", *paths), rows))
        settings = [flattened(report.run) for report in self.reports.values()]
        names = dict.fromkeys(name for values in settings for name in values)
        rows = [[name, *(values.get(name, "") for values in settings)] for name in names]
        changed = [row for row in rows if len(set(row[1:])) > 1]
        if changed:
            console.print(text_table("", ("setting that differs", *self.reports), changed))

    def to_json_file(self, json_file: str | Path) -> None:
        """Write means, task scores and differences, fractions unrounded."""
        runs = {
            name: {"means": report.means, "tasks": {t: result.score for t, result in report.tasks.items()}}
            | {"run": report.run}
            for name, report in self.reports.items()
        }
        changes = {name: asdict(difference) for name, difference in self.differences.items()}
        content: dict[str, Any] = {"metric": "hit@1", "baseline": self.baseline, "best": self.best}
        content |= {"interval": INTERVAL_NOTE, "runs": runs, "differences": changes}
        write_json(json_file, content)

    def to_html_file(self, html_file: str | Path, picture: bytes) -> None:
        """Write what ``show`` prints as a page, with the PNG inside it; nothing is loaded from elsewhere."""
        console = Console(record=True, file=io.StringIO(), width=PAGE_WIDTH)
        self.show(console)
        source = f"data:image/png;base64,{base64.b64encode(picture).decode('ascii')}"
        image = f'<img alt="means and tasks of the runs" style="max-width: 100%" src="{source}">'
        page = console.export_html(inline_styles=True).replace("</body>", f"{image}\n</body>")
        write_text(html_file, page)


def compare_runs(run_dirs: list[str], output_dir: str | None = None) -> None:
    """Compare one or several tested runs: tables, comparison.json, a picture and one page.

    Args:
        run_dirs: run folders with a scores.json, or such files; the first is the baseline.
        output_dir: gets the files; by default only the tables are printed.
    """
    compare(run_dirs, output_dir).show(console())


def compare(run_dirs: Sequence[str], output_dir: str | None = None) -> Comparison:
    """Compare runs as ``compare_runs`` does, without printing; runs that scored other rows are refused."""
    if isinstance(run_dirs, str) or not run_dirs:
        raise ValueError(f"compare needs a list of runs, got {run_dirs!r}")
    reports = {name: ScoreReport.from_json_file(file) for name, file in _score_files(run_dirs).items()}
    first, *others = reports
    for name in others:
        check_same_rows(first, reports[first], name, reports[name])
    comparison = Comparison(reports, {name: differences(reports[first], reports[name]) for name in others})
    if output_dir is not None:
        folder = Path(output_dir)
        comparison.to_json_file(folder / "comparison.json")
        stream = io.BytesIO()
        comparison_figure(reports, comparison.title).savefig(stream, format="png")
        with atomic_write(folder / "comparison.png") as unfinished:
            unfinished.write_bytes(stream.getvalue())
        comparison.to_html_file(folder / PAGE_FILE, stream.getvalue())
    return comparison


def differences(baseline: ScoreReport, other: ScoreReport) -> RunDifferences:
    """Subtract the headline scores of ``baseline`` from those of ``other``, with paired bootstrap intervals.

    Rows are resampled within each task and both runs keep their pairing. Rows of equal difference (of hit@1:
    -1, 0 or 1) are alike, so a resample of a task is a draw of multinomial counts.
    """
    generator = np.random.default_rng(0)
    samples: dict[str, NDArray[np.float64]] = {}  # the difference itself, then the resampled ones
    for name in baseline.tasks:
        before, after = (report.tasks[name].row_scores(report.columns[0]) for report in (baseline, other))
        row_difference = np.subtract(after, before)
        steps = np.union1d(row_difference, (-1, 0, 1))
        share = [float((row_difference == step).mean()) for step in steps]
        counts = generator.multinomial(len(row_difference), share, size=RESAMPLES)
        resampled = counts @ steps / len(row_difference)
        samples[name] = np.append(row_difference.mean(), resampled)
    means = baseline.over_groups(samples, lambda parts: np.mean(parts, axis=0))

    def summed_up(part: Mapping[str, NDArray[np.float64]]) -> dict[str, Difference]:
        bounds = {name: np.quantile(each[1:], (0.025, 0.975)).tolist() for name, each in part.items()}
        return {name: Difference(float(part[name][0]), *both) for name, both in bounds.items()}

    return RunDifferences(baseline.headline, summed_up(means), summed_up(samples))


def check_same_rows(first: str, baseline: ScoreReport, name: str, other: ScoreReport) -> None:
    """Raise ``ValueError`` for runs that did not score the same rows of the same tasks."""
    if missing := sorted(baseline.tasks.keys() ^ other.tasks.keys()):
        raise ValueError(f"only one of {first} and {name} scored {', '.join(missing)}")
    for task in baseline.tasks:
        both = baseline.tasks[task], other.tasks[task]
        before, after = ((*each.task.entry.values(), each.num_queries, each.rows_sha256) for each in both)
        if before != after:
            found = f"{first} scored {before}, but {name} scored {after}"
            about = "meta-task, in-distribution, metric and group if they are special, rows, their hash"
            raise ValueError(f"{task}: {found} ({about}); score both on the same data")


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings as ``model.mi.kind: vclub``; what is not set is left out."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _score_files(run_dirs: Sequence[str]) -> dict[str, Path]:
    """Find the score files; a run has the name of its folder, or what was typed where two are the same."""
    files = []
    for run_dir in run_dirs:
        file = Path(run_dir) if Path(run_dir).is_file() else Path(run_dir) / SCORES_FILE
        if not file.is_file():
            raise ValueError(f"no {SCORES_FILE} in {run_dir}; test that run first")
        files.append(file.resolve())
    if len(set(files)) != len(files):
        raise ValueError(f"a run is compared with itself: {list(run_dirs)}")
    names = [file.parent.name if file.name == SCORES_FILE else file.stem for file in files]
    pairs = zip(names, run_dirs, strict=True)
    unique = [name if names.count(name) == 1 else str(typed) for name, typed in pairs]
    return dict(zip(unique, files, strict=True))
