"""The table of tasks: MMEB's, with VLM2Vec's rules for them, plus those of your own ``tasks.json``."""

import json
import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.names import check_file_name, printable, unique_keys
from parallel_decoupling.data.prompts import PromptRules
from parallel_decoupling.option_types import Rule, check_values

MetaTask = Literal["classification", "vqa", "retrieval", "grounding", "custom"]
"""``custom`` has a mean of its own and counts in no other."""
Identity = Literal["text", "image", "image_and_text"]
Metric = Literal["hit@1", "mrr", "recall@5", "recall@10", "ndcg@5", "ndcg@10", "r_precision"]

OVERALL = "overall"
_MEANS = (*get_args(MetaTask), "in_distribution", "out_of_distribution", "mean_of_meta_tasks", "mmeb_v2")
_GROUP = Rule(
    "a word of letters, digits and _ that names no other mean",
    lambda name: bool(re.fullmatch(r"\w+", name)) and name not in _MEANS,
)
TASK_KEYS = ("meta_task", "in_distribution", "metric", "group")
PLACES = ("train_file", "eval_file", "eval_dir", "image_dir")
INSTRUCTIONS = ("query_instruction", "candidate_instruction")
ROLES = tuple(f"{side}_{kind}" for side in ("query", "candidate", "negative") for kind in ("text", "image"))
TEACHER = "teacher_scores"
"""What a column can be, and the column of a teacher's scores."""
NEIGHBOURS = "neighbour_order"
"""The column of a row's place among the rows of ``mine``."""
_ROLE = Rule(
    f"a mapping of roles to columns; roles are {', '.join((*ROLES, TEACHER))}", (*ROLES, TEACHER).__contains__
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where a task's rows are when they are not in MMEB's layout (``docs/data.md``).

    ``eval_dir`` holds a corpus, queries and judgements in place of the rows of ``eval_file``; queries in
    another ``language``, if one is given, are left out. ``published`` is the entry of a set of MMEB-V2, which
    ``tasks.json`` names; then ``eval_file`` is a folder.
    """

    train_file: Path | None = None
    eval_file: Path | None = None
    eval_dir: Path | None = None
    image_dir: Path = Path()
    columns: dict[Annotated[str, _ROLE], str] = field(default_factory=dict)
    query_instruction: str = ""
    candidate_instruction: str = ""
    language: str = ""
    published: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_values(Source, vars(self))


@dataclass(frozen=True)
class Task:
    """One evaluation task, named by its folder; ``identity``, ``prompt`` and ``source`` make no difference.

    ``identity`` is what makes two candidates the same; the first one seen stands for both. ``metric`` is the
    one that counts, in the mean named ``group``. Tasks of another group than ``overall`` are in none of
    MMEB's means, and neither trained nor evaluated unless they or their group are named.
    """

    name: str
    meta_task: MetaTask
    in_distribution: bool
    identity: Identity = field(default="image_and_text", compare=False)
    prompt: PromptRules = field(default=PromptRules(), compare=False)
    source: Source | None = field(default=None, compare=False)
    metric: Metric = "hit@1"
    group: Annotated[str, _GROUP] = OVERALL

    @property
    def entry(self) -> dict[str, Any]:
        """What ``tasks.json`` says of the task itself, without defaults."""
        own = {name: getattr(self, name) for name in TASK_KEYS}
        return {name: each for name, each in own.items() if each != getattr(Task, name, None)}

    def __post_init__(self) -> None:
        """Check the values; the name is in those of the files of scores and embeddings, too."""
        check_values(Task, vars(self))
        check_file_name(self.name, "evaluation task")


V2_GROUPS: dict[str, Metric] = {"video": "hit@1", "visdoc": "ndcg@5"}
"""What MMEB-V2 adds to MMEB's own tasks, with the metric that its tables have."""
_TABLE: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "mmeb_v2.json").read_text())


def _published(part: str, group: str, metric: Metric, **rules: Any) -> dict[str, Task]:
    """Return tasks of the table, in MMEB's order."""
    tasks = {}
    for name, entry in _TABLE[part].items():
        about = {key: entry[key] for key in ("meta_task", "identity") if key in entry}
        prompt, trained = PromptRules(**rules, **entry.get("prompt", {})), entry.get("in_distribution", False)
        tasks[name] = Task(name, in_distribution=trained, prompt=prompt, metric=metric, group=group, **about)
    return tasks


MMEB_TASKS = _published("image", OVERALL, "hit@1")
"""The 36 tasks of MMEB v1."""
V2_TASKS = {
    name: task
    for group, metric in V2_GROUPS.items()
    for name, task in _published(group, group, metric, one_line=True).items()
}
"""The 18 video and 24 document tasks of MMEB-V2, each of a group beside ``overall``."""
NOT_IN_MMEB = "CIFAR-100"  # a folder that is published with them and is a task only where it is named

_TRAINED = [name for name, task in MMEB_TASKS.items() if task.in_distribution]
MMEB_TRAIN_SUBSETS = tuple("ImageNet_1K" if name == "ImageNet-1K" else name for name in _TRAINED)
"""The 20 training subsets; MMEB spells one with an underscore in training and a hyphen in evaluation."""


@dataclass
class EvalTask:
    """One evaluation task with its unique queries and candidates, both in order of first use.

    ``query_of_row`` and ``candidates_of_row`` are indices into them; the positive is the first candidate.
    With several right answers ``relevance_of_row`` has their grades, above 0, by candidate.
    """

    task: Task
    queries: list[RawInput]
    candidates: list[RawInput]
    query_of_row: list[int]
    candidates_of_row: list[list[int]]
    relevance_of_row: list[dict[int, float]] | None = None

    def answers(self, row: int) -> dict[int, float]:
        """Return the right answers of a row with their grades."""
        if self.relevance_of_row is None:
            return {self.candidates_of_row[row][0]: 1.0}
        return self.relevance_of_row[row]

    def without(self, queries: Collection[int], candidates: Collection[int]) -> "EvalTask":
        """Leave out the rows of some queries, and some candidates of all rows.

        A row goes if all its right answers go or if no other candidate is left. All indices stay.
        """
        relevance: list[dict[int, float]] | None = None if self.relevance_of_row is None else []
        kept = replace(self, query_of_row=[], candidates_of_row=[], relevance_of_row=relevance)
        lists = {id(row): row for row in self.candidates_of_row}  # all rows may share one
        left_of = {key: [each for each in row if each not in candidates] for key, row in lists.items()}
        for number, (query, row) in enumerate(zip(self.query_of_row, self.candidates_of_row, strict=True)):
            answers = {each: grade for each, grade in self.answers(number).items() if each not in candidates}
            if query not in queries and answers and len(left_of[id(row)]) > 1:
                kept.query_of_row.append(query)
                kept.candidates_of_row.append(left_of[id(row)])
                if relevance is not None:
                    relevance.append(answers)
        return kept


def check_names(names: Collection[str], available: Collection[str], what: str, advice: str = "") -> None:
    """Raise ``ValueError`` for a name that does not exist, with the closest one, the full list and advice."""
    for name in names:
        if name not in available:
            close = get_close_matches(name, available, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            found = ", ".join(sorted(set(available))) or "none"
            raise ValueError(f"Unknown {what} {name!r}.{hint} Found: {found}.{advice and f' {advice}'}")


def read_tasks(data_dir: str | Path) -> dict[str, Task]:
    """Return MMEB-V2's task table plus the entries of ``data_dir/tasks.json``, which win, and other folders.

    An entry has ``meta_task`` and ``in_distribution``, may have ``metric`` and ``group``, and has the
    attributes of ``Source`` if it is your own.
    A folder of ``MMEB-eval`` that has neither is of meta-task ``custom``; one whose name cannot be a task's
    is left out with a warning.
    """
    folder = Path(data_dir)
    v2 = {name: replace(task, source=_v2_source(task, folder)) for name, task in V2_TASKS.items()}
    tasks = MMEB_TASKS | v2 | _listed(folder / "tasks.json")
    others = [name for name in _eval_folders(data_dir) if name not in tasks]
    tasks |= {name: Task(name, "custom", False) for name in others if _may_be_task(name, folder)}
    for name in tasks.keys() & {task.group for task in tasks.values()}:
        raise ValueError(
            f"{folder}: {name!r} is the name of a task and of a group of tasks. Rename the task."
        )
    return tasks


def _v2_source(task: Task, data_dir: Path) -> Source:
    """Return where the rows and the pictures or frames of a task of MMEB-V2 are."""
    entry, root = _TABLE[task.group][task.name], data_dir / f"{task.group}-tasks"
    rows = root / Path(entry["set"]).name
    about: dict[str, Any] = {"query_instruction": entry["query"], "candidate_instruction": entry["candidate"]}
    if task.group == "video":
        frames = root / "frames" / entry["frames"]
        return Source(eval_file=rows, image_dir=frames, published=entry, **about)
    about |= {"eval_dir": rows, "image_dir": root / entry["images"]}
    return Source(columns={"query_text": "query", "candidate_image": "image"}, published=entry, **about)


def _eval_folders(data_dir: str | Path) -> list[str]:
    """Return the sorted names of the folders of ``MMEB-eval`` with rows; hidden ones do not count."""
    return sorted({file.parent.name for file in (Path(data_dir) / "MMEB-eval").glob("[!.]*/test-*.parquet")})


@cache
def _may_be_task(name: str, folder: Path) -> bool:
    """Check the name of a folder of ``MMEB-eval``; say once if it is left out."""
    try:
        check_file_name(name, "evaluation task")
    except ValueError as error:
        log.warning("%s", printable(f"{folder / 'MMEB-eval'}: a folder is left out: {error}"))
        return False
    return True


def _listed(tasks_file: Path) -> dict[str, Task]:
    """Read ``tasks.json``, if there is one."""
    if not os.path.lexists(tasks_file):
        return {}
    tasks, where = dict[str, Task](), str(tasks_file)
    try:
        if not tasks_file.is_file():
            raise ValueError("this is not a regular file.")
        entries = json.loads(tasks_file.read_text(encoding="utf-8-sig"), object_pairs_hook=unique_keys)
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise ValueError("it must hold an object of tasks by name, each an object itself.")
        known = [*TASK_KEYS, *(each.name for each in fields(Source))]
        for name, entry in entries.items():
            where = f"{tasks_file}, task {name!r}"
            check_names(entry, known, "key")
            tasks[name] = _task(name, entry, tasks_file.parent)
    except (ValueError, RecursionError) as error:
        advice = " Save the file as UTF-8." if isinstance(error, UnicodeDecodeError) else ""
        raise ValueError(f"{where}: {error}{advice}") from error
    return tasks


def _task(name: str, entry: dict[str, Any], data_dir: Path) -> Task:
    """Return the task of an entry, which is one of MMEB's or has files of its own."""
    own: dict[str, Any] = {"meta_task": None, "in_distribution": None}
    own |= {key: entry[key] for key in TASK_KEYS if key in entry}
    task = Task(name, **own)
    if entry.keys() <= own.keys():
        known = MMEB_TASKS.get(name, task)
        return replace(task, identity=known.identity, prompt=known.prompt)
    about = {"image_dir": "."} | {key: each for key, each in entry.items() if key not in own}
    if "published" in about:
        check_names([str(about["published"])], _TABLE["video"], "published set of videos")
        about["published"] = _TABLE["video"][about["published"]]
    places = {key: data_dir / about[key] for key in PLACES if isinstance(about.get(key), str)}
    source = Source(**about | places)
    if not any((source.train_file, source.eval_file, source.eval_dir)):
        raise ValueError("other keys without a file. Add train_file, eval_file or eval_dir.")
    for side in ("query", "candidate") if source.train_file or not source.published else ():
        if not {f"{side}_text", f"{side}_image"} & source.columns.keys():
            raise ValueError(f"columns: {side}_text or {side}_image is needed, or both.")
    return replace(task, source=source)


def task_of_subset(tasks: dict[str, Task], subset: str) -> Task | None:
    """Return the task that a training subset belongs to, or None if there is none."""
    return tasks.get("ImageNet-1K" if subset == "ImageNet_1K" else subset)


def find_train_subsets(data_dir: str | Path, split: str = "original") -> list[str]:
    """Return the sorted names of the subsets with files of this split, and of your own with a train_file."""
    folders = {file.parent.name for file in (Path(data_dir) / "MMEB-train").glob(f"*/{split}-*.parquet")}
    own = {name for name, task in read_tasks(data_dir).items() if task.source and task.source.train_file}
    return sorted(folders | own)


def find_eval_tasks(data_dir: str | Path) -> list[str]:
    """Return the names of the tasks whose rows are there, in the order of ``read_tasks``."""
    folders = _eval_folders(data_dir)

    def is_there(task: Task) -> bool:
        if task.source is None:
            return task.name in folders
        place = task.source.eval_file or task.source.eval_dir
        return place is not None and (task.source.published is None or place.exists())

    return [name for name, task in read_tasks(data_dir).items() if is_there(task)]


def chosen(names: Collection[str] | None, found: Sequence[str], data_dir: str | Path) -> list[str]:
    """Put the tasks or subsets of a group in the place of its name; None is the group ``overall``."""
    for name in {*(names or ())} & {*_eval_folders(data_dir)}:
        check_file_name(name, "evaluation task")
    known, of_group = read_tasks(data_dir), {OVERALL: list[str]()}
    for name in (name for name in found if name != NOT_IN_MMEB):
        task = task_of_subset(known, name)
        of_group.setdefault(OVERALL if task is None else task.group, []).append(name)
    if names is None:
        return of_group[OVERALL]
    lists = ([name] if name in found else of_group.get(name, [name]) for name in names)
    return list(dict.fromkeys(name for each in lists for name in each))
