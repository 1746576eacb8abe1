"""Evaluation sets that do not come as MMEB's rows: judged corpora, and the videos of MMEB-V2."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from parallel_decoupling.data.images import ImageFolder
from parallel_decoupling.data.row_reader import CANDIDATE, QUERY, RowReader, Side, side_of, target
from parallel_decoupling.data.tables import Table, find_tables
from parallel_decoupling.data.tasks import EvalTask, Source, Task
from parallel_decoupling.data.unusable import one_row

QRELS = ("query-id", "corpus-id", "score")
IDS = {"queries": ("query-id", "_id", "id"), "corpus": ("corpus-id", "_id", "id")}
"""Names of columns that hold ids; the first one that is there counts."""

LANGUAGE = "language"  # a column of queries
RIGHT = "right"  # a column: how many of a row's candidates, the first ones, are right answers

log = logging.getLogger(__name__)


def open_judged(task: Task, *, must_exist: bool = True) -> tuple[RowReader, RowReader, Table]:
    """Open queries, corpus and qrels in the layout of BEIR, ViDoRe and other sets of the hub."""
    source = task.source or Source()
    folder = source.eval_dir or Path()
    images = ImageFolder(source.image_dir, must_exist=must_exist)
    readers = []
    for part, roles in (("queries", QUERY), ("corpus", CANDIDATE)):
        used = {role: name for role, name in source.columns.items() if role in roles}
        columns = used | {name: name for name in (*IDS[part], LANGUAGE)}
        table = _open(task, folder, part, columns)
        needed = {name for name in used if (part, name) != ("corpus", CANDIDATE[1])}
        table.check([*needed, *([LANGUAGE] if source.language and part == "queries" else [])], columns)
        readers.append(RowReader(table, images, task.prompt, source))
    qrels = _open(task, folder, "qrels", {name: name for name in QRELS})
    qrels.check(QRELS, QRELS)
    return readers[0], readers[1], qrels


def read_judged(task: Task, limit: int | None, *, must_exist: bool) -> EvalTask:
    """Read such a task, as ``readers.read_eval_task`` does; all of the corpus are a row's candidates.

    A grade above 0 is a right answer; of two for one target the higher one counts. Where the corpus has no
    column of pictures, they are files named by the ids.
    """
    queries, corpus, qrels = open_judged(task, must_exist=must_exist)
    read = EvalTask(task, [], [], [], [])
    distinct: dict[Side, int] = {}
    candidate_of: dict[str, int] = {}
    for name, row in _rows_by_id(corpus.table, "corpus").items():
        side = side_of(corpus.table[row], CANDIDATE)
        if corpus.table.column(CANDIDATE[1]) is None and CANDIDATE[1] in corpus.table.columns:
            side = side[0], f"{name}.png"
        candidate_of[name] = distinct.setdefault(target(task, side), len(distinct))
        if len(distinct) > len(read.candidates):
            read.candidates.append(corpus.input(row, CANDIDATE, side))
    row_of = _rows_by_id(queries.table, "queries")
    answers = _answers(qrels, list(row_of), candidate_of)
    if language := task.source and task.source.language:
        cells = queries.table.rows[LANGUAGE].to_pylist()
        row_of = {name: row for name, row in row_of.items() if cells[row] == language}
    asked = [name for name in row_of if answers[name]]
    if len(asked) < len(row_of):
        log.warning("%s: %d queries have no right answer", qrels.owner, len(row_of) - len(asked))
    if not asked or len(read.candidates) < 2:
        found = f"{len(asked)} queries with a right answer and {len(read.candidates)} candidates"
        raise ValueError(f"{qrels.owner}: {found} in {qrels.files[0]}. At least one and two are needed.")
    count = len(asked) if limit is None else min(limit, len(asked))
    asked = [asked[number * len(asked) // count] for number in range(count)]
    number_of: dict[Side, int] = {}
    for name in asked:
        side = side_of(queries.table[row_of[name]], QUERY)
        read.query_of_row.append(number_of.setdefault(side, len(number_of)))
        if len(number_of) > len(read.queries):
            read.queries.append(queries.input(row_of[name], QUERY, side))
    everyone = [list(range(len(read.candidates)))] * count
    return replace(read, candidates_of_row=everyone, relevance_of_row=[answers[name] for name in asked])


def _open(task: Task, folder: Path, part: str, columns: dict[str, str]) -> Table:
    """Open the first that is there of ``<part>/test*``, ``<part>/train*`` (as in VisRAG) and ``<part>.*``."""
    owner = f"evaluation task {task.name!r}"
    return Table(owner, find_tables(owner, folder, f"{part}/test*", f"{part}/train*", f"{part}.*"), columns)


def _rows_by_id(table: Table, part: str) -> dict[str, int]:
    """Return the row of every id, in the order of the file."""
    name = next((each for each in IDS[part] if table.column(each) is not None), None)
    if name is None:
        needed = f"needs a column {', '.join(IDS[part][:-1])} or {IDS[part][-1]}"
        raise ValueError(f"{table.owner}: {table.files[0]} {needed}.")
    rows: dict[str, int] = {}
    for row, each in enumerate(table.rows[name].to_pylist()):
        if not each or rows.setdefault(each, row) != row:
            raise ValueError(f"{table.where(row, name)}: every row needs an id of its own, got {each!r}.")
    return rows


def _answers(qrels: Table, queries: list[str], candidate_of: dict[str, int]) -> dict[str, dict[int, float]]:
    answers: dict[str, dict[int, float]] = {name: {} for name in queries}
    columns = (qrels.rows[name].to_pylist() for name in QRELS)
    for row, (query, candidate, score) in enumerate(zip(*columns, strict=True)):
        for part, name, known in (("queries", query, answers), ("corpus", candidate, candidate_of)):
            if name not in known:
                where = qrels.where(row, QRELS[part == "corpus"])
                raise ValueError(f"{where}: {name!r} is not in {part}. Correct the id or remove the row.")
        try:
            grade = float(score)
        except (TypeError, ValueError):
            grade = math.nan
        if not math.isfinite(grade):
            raise ValueError(f"{qrels.where(row, QRELS[2])}: must be a number, got {score!r}.")
        if grade > 0:
            number = candidate_of[candidate]
            answers[query][number] = max(grade, answers[query].get(number, 0.0))
    return answers


def open_video_set(owner: str, source: Source) -> Table:
    """Open a set as the hub has it (``rows_of``); a picture is the name of a folder of frames."""
    folder, entry = source.eval_file or Path(), source.published or {}
    files = find_tables(owner, folder, *rows_of(entry))
    table, rows = Table(owner, files, {}, keep_others=True), list[dict[str, Any]]()
    for row in range(min(len(table), entry.get("first", len(table)))):
        file, number = table.place(row)
        with one_row(f"{owner}, file {file}, row {number}: not as the set of the hub has it: "):
            config = file.relative_to(folder).parts[0]
            rows.append(_cells(table[row], config, entry, source.image_dir))
    table.rows = pa.Table.from_pylist(rows)
    return table


def rows_of(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Return where a set's rows are: in the hub's conversion to Parquet, and beside its card."""
    config, _, split = entry["rows"].rpartition("/")
    return f"{config or 'default'}/{split}/*.parquet", f"{config or 'data'}/{split}*"


def _cells(row: Mapping[str, Any], folder: str, entry: Mapping[str, Any], frames: Path) -> dict[str, Any]:
    """Return a row's cells by role, the right candidates first."""
    options = [str(each) for each in entry.get("choices", ())]
    for name in entry.get("options", ()):
        options += map(str, row[name]) if isinstance(row[name], list) else [str(row[name])]
    lettered = [f"({chr(ord('A') + number)}) {option}" for number, option in enumerate(options)]
    texts = {"lines": "\n".join(options), "spaced": " ".join(options), "lettered": "\n".join(lettered)}
    if "stem" in entry:
        texts["stem"] = Path(row[entry["stem"]]).stem
    values = {**row, **texts, "folder": folder}
    cells: dict[str, Any] = {role: form.format(**values) for role, form in entry["cells"].items()}
    if "answer" in entry:
        bare = [option[option.find(". ") :].strip(". ") for option in options]
        shown = {"lettered": lettered, "bare": bare}.get(entry.get("shown", ""), options)
        right = shown[_answer(row[entry["answer"]], options)]
        cells["candidate_text"] = [right, *(each for each in shown if each != right)]
        cells["query_text"] = cells.get("query_text", "").rstrip()
    elif "clips" in entry:
        stem = entry["clips"].format(**values)
        clips = sorted(each.name for each in (frames / stem).iterdir() if each.is_dir())
        right = [clip for clip in clips if clip.startswith("positive")][-1]
        others = [clip for clip in clips if clip not in ("query", right)]
        cells["candidate_image"] = [f"{stem}/{clip}" for clip in (right, *others)]
    elif "moments" in entry:
        return {**cells, **_moment(row, entry["moments"])}
    return cells


def _answer(answer: Any, options: Sequence[str]) -> int:
    """Return the number of the right option, which is named by its text, its letter or its number."""
    if isinstance(answer, str) and answer in options:
        return options.index(answer)
    return ord(answer) - ord("A") if isinstance(answer, str) and answer.isalpha() else int(answer)


def _moment(row: Mapping[str, Any], instructions: Mapping[str, str]) -> dict[str, Any]:
    """Return a row of MomentSeeker, whose query may show a picture or a video, and has several answers."""

    def clip(path: str) -> str:
        return "video_frames/" + path.split(".mp4")[0].replace("/", "_")

    given = row["input_frames"] or ""
    kind = next((end for end in (".jpg", ".mp4") if given.endswith(end)), "")
    right, others = (
        [clip(each["output_path"]) for each in row[f"{name}_frames"]] for name in ("positive", "negative")
    )
    shown = {"": "", ".jpg": f"query_{given}", ".mp4": clip(given)}[kind]
    cells = {"query_image": shown, "query_instruction": instructions[kind], RIGHT: len(dict.fromkeys(right))}
    return {**cells, "candidate_image": list(dict.fromkeys([*right, *others]))}
