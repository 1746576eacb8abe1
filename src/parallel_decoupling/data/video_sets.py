"""The video sets of MMEB-V2: rows in their published forms to cells by role, by ``mmeb_v2.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from parallel_decoupling.data.tables import Table, find_tables
from parallel_decoupling.data.tasks import Source
from parallel_decoupling.data.unusable import one_row

RIGHT = "right"
"""A column: how many of a row's candidates, the first ones, are right answers."""


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
