"""MMEB as a table, the tasks that a folder adds to it, and names from outside."""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from parallel_decoupling.data.names import check_file_name, file_of_id, id_of_file, printable
from parallel_decoupling.data.tasks import (
    MMEB_TASKS,
    MMEB_TRAIN_SUBSETS,
    Task,
    chosen,
    find_eval_tasks,
    read_tasks,
    task_of_subset,
)
from tests.support.mmeb import OWN_ENTRY, eval_row, write_eval

ENTRY = b'{"meta_task": "vqa", "in_distribution": true}'


def test_table_is_mmebs() -> None:
    counts = Counter((task.meta_task, task.in_distribution) for task in MMEB_TASKS.values())
    trained = {"classification": 5, "vqa": 6, "retrieval": 8, "grounding": 1}
    unseen = {"classification": 5, "vqa": 4, "retrieval": 4, "grounding": 3}
    assert {name: counts[name, True] for name in trained} == trained
    assert {name: counts[name, False] for name in unseen} == unseen
    names = (
        "A-OKVQA CIRR ChartQA DocVQA HatefulMemes ImageNet_1K InfographicsVQA MSCOCO MSCOCO_i2t MSCOCO_t2i"
    )
    names += " N24News NIGHTS OK-VQA SUN397 VOC2007 VisDial Visual7W VisualNews_i2t VisualNews_t2i WebQA"
    assert sorted(MMEB_TRAIN_SUBSETS) == names.split()
    assert MMEB_TASKS["Visual7W-Pointing"].meta_task == "grounding"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"caf\xe9": {}}', "tasks.json: .*Save the file as UTF-8"),
        (b"[]", "an object of tasks by name"),
        (b"[" * 100_000, "tasks.json: maximum recursion depth"),
        (b'{"A": ' * 3_000 + b"1" + b"}" * 3_000, "tasks.json: maximum recursion depth"),
        (b'{"A": {}, "A": {}}', "tasks.json: 'A' is there 2 times"),
        (b'{"overall": %s}' % ENTRY, "'overall' is the name of a task and of a group of tasks. Rename"),
        (b'{"video": %s}' % ENTRY, "'video' is the name of a task and of a group"),
    ],
)
def test_a_table_of_tasks_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tasks.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_tasks(tmp_path)


def test_a_link_to_nothing_is_not_an_absent_table(tmp_path: Path) -> None:
    for target in ("tasks.json", "none"):
        (tmp_path / "tasks.json").unlink(missing_ok=True)
        (tmp_path / "tasks.json").symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match=r"tasks\.json: this is not a regular file"):
            read_tasks(tmp_path)


def test_a_subset_belongs_to_the_task_of_its_name() -> None:
    for subset in MMEB_TRAIN_SUBSETS:
        task = task_of_subset(MMEB_TASKS, subset)
        assert task is not None
        assert task.name.replace("-", "_") == subset.replace("-", "_")
    assert task_of_subset(MMEB_TASKS, "Mine") is None


def test_an_mmeb_name_in_the_file_keeps_its_rules(tmp_path: Path) -> None:
    entry = {"WebQA": {"meta_task": "vqa", "in_distribution": False}}
    (tmp_path / "tasks.json").write_text(json.dumps(entry))
    task = read_tasks(tmp_path)["WebQA"]
    assert (task.meta_task, task.identity, task.prompt) == ("vqa", "image", MMEB_TASKS["WebQA"].prompt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colums": {}}, "Unknown key 'colums'. Did you mean 'columns'"),
        ({"metatask": "vqa"}, "Unknown key 'metatask'. Did you mean 'meta_task'.* Found: .*in_distribution"),
        ({"meta_task": "video"}, "meta_task must be 'classification', .* got 'video'"),
        ({"in_distribution": 3}, "in_distribution must be a valid boolean, got 3"),
        ({"train_file": 3}, "train_file must be an instance of Path"),
        ({"metric": "ndcg@3"}, "metric must be 'hit@1', .* got 'ndcg@3'"),
        ({"group": "vqa"}, "group must be a word .* that names no other mean, got 'vqa'"),
        ({"group": "my pages"}, "group must be a word of letters"),
        ({"columns": None}, "columns must be a valid dictionary"),
        ({"columns": {"query": "q"}}, "columns must be .* roles are query_text, .* got {'query': 'q'}"),
        ({"columns": {"query_text": "q"}}, "columns: candidate_text or candidate_image is needed"),
        ({"published": "MSRVTT"}, "Unknown published set of videos 'MSRVTT'. Did you mean 'MSR-VTT'"),
        ({"train_file": None, "eval_file": None}, "without a file. Add train_file, eval_file or eval_dir"),
    ],
)
def test_entries_that_cannot_be_used_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    entry = {
        key: value for key, value in {**OWN_ENTRY, **change}.items() if value is not None or key == "columns"
    }
    (tmp_path / "tasks.json").write_text(json.dumps({"Mine": entry}))
    with pytest.raises(ValueError, match=rf"tasks\.json, task 'Mine'.*{message}"):
        read_tasks(tmp_path)


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


def test_a_folder_of_tasks_that_breaks_the_rule_is_left_out_unless_it_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_eval(tmp_path, ".trash", [eval_row("q", ["a", "b"])])
    assert find_eval_tasks(tmp_path) == []
    write_eval(tmp_path, "my task", [eval_row("q", ["a", "b"])])
    write_eval(tmp_path, "GQA", [eval_row("q", ["a", "b"])])
    for _ in range(2):
        found = find_eval_tasks(tmp_path)
        assert chosen(None, found, tmp_path) == found == ["GQA"]
    assert [record.message.count("'my task' becomes a file") for record in caplog.records] == [1]
    with pytest.raises(ValueError, match=r"'my task' becomes a file, .* Rename it\."):
        chosen(["GQA", "my task"], found, tmp_path)


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
    for words in (["fit", "--model.num\x1b[31m"], ["serve", "x", "--port", "\x1b[31m"]):
        shown = mistake(words)  # what the parsers say
        assert "\\x1b[31m" in shown
        assert "\x1b" not in shown


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux")
def test_a_table_may_have_any_name(tmp_path: Path) -> None:
    from parallel_decoupling.data.row_sources import RowSource

    file = os.fsencode(tmp_path) + b"/caf\xe9.csv"
    with open(file, "wb") as stream:
        stream.write(b"text\nx\n")
    assert RowSource(os.fsdecode(file))[0].text == "x"
