"""Names from outside: one rule for those that become files, ids of any file name, and safe printing."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from parallel_decoupling.data.names import check_file_name, file_of_id, id_of_file, printable
from parallel_decoupling.data.tasks import Task, find_eval_tasks, read_tasks
from tests.data.mmeb_files import eval_row, write_eval

BAD_NAMES = (
    *("", ".", "..", "../x", "/tmp/x", "a/b", "a\\b", ".x", "a b", "a\nb", "a\0", "\x1b[31m", "x" * 201),
    *("é" * 101, "caf\udce9", "*", "a:b"),
)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_must_not_become_a_file_is_refused_wherever_it_enters(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"becomes a file, so its name must have letters, digits and \._-"):
        Task(name, "vqa", False)
    quoted = name.encode("unicode_escape").decode().replace("\\x", "\\u00").replace('"', '\\"')
    (tmp_path / "tasks.json").write_text(f'{{"{quoted}": {{"meta_task": "vqa", "in_distribution": true}}}}')
    with pytest.raises(ValueError, match="tasks.json, task .*becomes a file"):
        read_tasks(tmp_path)


@pytest.mark.parametrize("name", ["GQA", "Wiki-SS-NQ", "a.b_c-1", "Größe", "x" * 200, "_"])
def test_other_names_are_kept(name: str) -> None:
    check_file_name(name, "evaluation task")


def test_a_folder_of_tasks_obeys_the_rule_unless_it_is_hidden(tmp_path: Path) -> None:
    write_eval(tmp_path, ".trash", [eval_row("q", ["a", "b"])])
    assert find_eval_tasks(tmp_path) == []
    write_eval(tmp_path, "my task", [eval_row("q", ["a", "b"])])
    with pytest.raises(ValueError, match=r"'my task' becomes a file, .* Rename it\."):
        find_eval_tasks(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"a/b.png", "a/b.png"),
        ("übung 1.png".encode(), "übung 1.png"),
        (b"d/caf\xe9.png", "bytes:d/caf%E9.png"),
        (b"bytes:x%.png", "bytes:bytes%3Ax%25.png"),
        (b"a\n\x1b.png", "a\n\x1b.png"),
    ],
)
def test_any_file_name_becomes_an_id_and_comes_back(name: bytes, text: str) -> None:
    assert id_of_file(os.fsdecode(name)) == text
    assert text.encode().decode() == text, "can be written"
    assert os.fsencode(file_of_id(text)) == name


def test_control_characters_are_printed_escaped(mistake: Any) -> None:
    assert printable("a\x1b[2Jb\r\u202ec\udce9\nÄ 猫") == "a\\x1b[2Jb\\r\\u202ec\\udce9\nÄ 猫"
    shown = mistake(["verify", "no/\x1b[31mfolder"])
    assert shown.startswith("error: ")
    assert "no/\\x1b[31mfolder" in shown
    assert "\x1b" not in shown


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux")
def test_a_table_may_have_any_name(tmp_path: Path) -> None:
    from parallel_decoupling.data.row_sources import RowSource

    file = os.fsencode(tmp_path) + b"/caf\xe9.csv"
    with open(file, "wb") as stream:
        stream.write(b"text\nx\n")
    assert RowSource(os.fsdecode(file))[0].text == "x"
