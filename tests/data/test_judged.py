"""Corpus, queries and qrels, as BEIR writes them and as data sets of the hub do."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from parallel_decoupling.batch import RawInput
from parallel_decoupling.cli import main
from parallel_decoupling.commands import load_collator
from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.data.readers import read_eval_task
from parallel_decoupling.data.verify import verify
from tests.support.mmeb import eval_row, train_row, write_eval, write_image, write_rows, write_train

ENTRY: dict[str, Any] = {
    "meta_task": "retrieval",
    "in_distribution": False,
    "metric": "ndcg@5",
    "group": "documents",
    "eval_dir": "pages",
    "image_dir": "pictures",
    "columns": {"query_text": "query", "candidate_image": "file", "candidate_text": "title"},
    "query_instruction": "Find a page:",
    "candidate_instruction": "Understand the page.",
}
QUERIES = [(7, "lions"), (8, "nobody asks"), (9, "tigers"), (12, "lions")]
CORPUS = [(1, "a", "1.png"), (2, "b", "2.png"), (3, "b", "2.png"), (4, "", "4.png")]
QRELS = [(7, 1, 2), (7, 2, 1), (7, 3, 3), (9, 4, 1), (9, 1, 0), (12, 4, 0.5)]
"""Pages 2 and 3 are the same; query 8 has no answer, and a grade of 0 is none."""


def write_hub(folder: Path) -> None:
    """Folders of Parquet files with numbers as ids, in two parts."""
    for part, names, rows in (
        ("queries", ("query-id", "query"), QUERIES),
        ("corpus", ("corpus-id", "title", "file"), CORPUS),
        ("qrels", ("query-id", "corpus-id", "score"), QRELS),
    ):
        cells = [dict(zip(names, row, strict=True)) for row in rows]
        write_rows(folder / part / "test-00000-of-00002.parquet", cells[:2])
        write_rows(folder / part / "test-00001-of-00002.parquet", cells[2:])


def write_beir(folder: Path) -> None:
    """Lines of JSON with texts as ids in ``_id``, and a table with tabs."""
    (folder / "qrels").mkdir(parents=True)
    queries = [{"_id": f"0{name}", "query": text} for name, text in QUERIES]
    corpus = [{"_id": f"d{name}", "title": title, "file": file} for name, title, file in CORPUS]
    for part, rows in (("queries", queries), ("corpus", corpus)):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["query-id\tcorpus-id\tscore", *(f"0{query}\td{name}\t{score}" for query, name, score in QRELS)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    (tmp_path / "tasks.json").write_text(json.dumps({"Pages": ENTRY}))
    for name in ("1", "2", "4"):
        write_image(tmp_path / "pictures" / f"{name}.png")
    return tmp_path


@pytest.mark.parametrize("write", [write_hub, write_beir])
def test_both_layouts_give_the_same_rows(
    data_dir: Path, write: Any, caplog: pytest.LogCaptureFixture
) -> None:
    write(data_dir / "pages")
    with caplog.at_level(logging.WARNING):
        task = read_eval_task(data_dir, "Pages")
    assert (task.task.metric, task.task.group) == ("ndcg@5", "documents")
    assert task.queries == [RawInput("Find a page: lions\n"), RawInput("Find a page: tigers\n")]
    shown = ["Understand the page. a", "Understand the page. b", "Understand the page."]
    files = [str(data_dir / "pictures" / f"{name}.png") for name in (1, 2, 4)]
    candidates = zip(shown, files, strict=True)
    assert task.candidates == [RawInput(f"<|image_1|>\n{text}\n", (file,)) for text, file in candidates]
    assert task.query_of_row == [0, 1, 0], "rows are queries by id"
    assert task.relevance_of_row == [{0: 2.0, 1: 3.0}, {2: 1.0}, {2: 0.5}]
    assert task.candidates_of_row == [[0, 1, 2]] * 3
    assert "1 queries have no right answer" in caplog.text
    some = read_eval_task(data_dir, "Pages", limit=2)
    assert (some.query_of_row, some.relevance_of_row) == ([0, 1], [{0: 2.0, 1: 3.0}, {2: 1.0}])


@pytest.mark.parametrize(
    ("part", "line", "message"),
    [
        ("qrels", "5\td1\t1", r"test\.tsv, row 6, column 'query-id': '5' is not in queries"),
        ("qrels", "07\td9\t1", r"test\.tsv, row 6, column 'corpus-id': 'd9' is not in corpus"),
        ("qrels", "07\td1\tyes", r"row 6, column 'score': must be a number, got 'yes'"),
        ("qrels", "07\td1\tnan", r"row 6, column 'score': must be a number"),
        (
            "corpus",
            '{"_id": "d1", "title": "", "file": "1.png"}',
            "row 4, column '_id': every row needs an id",
        ),
        ("queries", '{"query": "x"}', "row 4, column '_id': every row needs an id of its own, got None"),
        ("queries", '{"_id": "07a", "query": ""}\n{"_id": "x"}', None),
        ("corpus", '{"_id": "e", "title": "x", "file": "9.png"}', r"corpus\.jsonl, row 4, .*no image file"),
        ("corpus", '{"_id": "e", "title": "", "file": ""}', r"corpus\.jsonl, row 4, .*a text or an image"),
    ],
)
def test_what_does_not_fit_is_named(data_dir: Path, part: str, line: str, message: str | None) -> None:
    write_beir(data_dir / "pages")
    file = data_dir / "pages" / ("qrels/test.tsv" if part == "qrels" else f"{part}.jsonl")
    file.write_text(file.read_text() + line + "\n")
    if message is None:  # a blank query that nothing answers is never read
        read_eval_task(data_dir, "Pages")
        return
    with pytest.raises(ValueError, match=f"'Pages'.*{message}"):
        read_eval_task(data_dir, "Pages")


def test_a_part_or_an_id_that_is_missing_is_named(data_dir: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"'Pages': .*pages holds no queries/test\* or queries/train\* or queries\.\* that ends",
    ):
        read_eval_task(data_dir, "Pages")
    write_beir(data_dir / "pages")
    (data_dir / "pages/queries.jsonl").write_text('{"query": "x"}\n')
    with pytest.raises(ValueError, match=r"queries\.jsonl needs a column query-id, _id or id"):
        read_eval_task(data_dir, "Pages")
    (data_dir / "pages/queries.jsonl").write_text('{"_id": "1", "query": "x"}\n')
    (data_dir / "pages/qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n1\td1\t0\n")
    with pytest.raises(ValueError, match="0 queries with a right answer and 3 candidates in"):
        read_eval_task(data_dir, "Pages")
    (data_dir / "pages/qrels/test.tsv").write_text("query-id\tcorpus-id\n1\td1\n")
    with pytest.raises(ValueError, match="column 'score' is missing"):
        read_eval_task(data_dir, "Pages")


def test_groups_are_read_only_when_they_or_their_tasks_are_named(data_dir: Path) -> None:
    entry = {**ENTRY, "train_file": "pages/train.jsonl"}
    (data_dir / "tasks.json").write_text(json.dumps({"Pages": entry}))
    write_hub(data_dir / "pages")
    (data_dir / "pages/train.jsonl").write_text(
        '{"query": "x", "file": ["1.png", "4.png"], "title": ""}\n' * 3
    )
    write_eval(data_dir, "GQA", [eval_row("q", ["a", "b"])])
    write_train(data_dir, "GQA", [train_row()] * 3)

    def read(**options: Any) -> tuple[list[str], list[str]]:
        data = MMEBDataModule(str(data_dir), batch_size=1, **options)
        data.prepare_data()
        data.setup("fit")
        trained = [subset.subset for subset in data.train_data]
        data.setup("test")
        return trained, [task.task.name for task in data.eval_tasks_data]

    assert read() == (["GQA"], ["GQA"])
    assert read(eval_tasks=["documents"], train_subsets=["documents"]) == (["Pages"], ["Pages"])
    assert read(eval_tasks=["Pages", "overall", "GQA"])[1] == ["Pages", "GQA"]
    assert read(train_subsets=["overall", "documents"])[0] == ["GQA", "Pages"]
    with pytest.raises(ValueError, match="Unknown evaluation task 'document'"):
        read(eval_tasks=["document"])
    main(["verify", str(data_dir)])


def test_verify_looks_at_both_sides(data_dir: Path) -> None:
    write_hub(data_dir / "pages")
    assert [check.problems for check in verify(data_dir, load_collator("tiny"))] == [[], []]
    (data_dir / "pictures/4.png").unlink()
    (check,) = (check for check in verify(data_dir, load_collator("tiny")) if check.part == "eval")
    assert check.counts["rows"] == 3
    assert check.counts["missing"] == 1
    assert "first '4.png' in evaluation task 'Pages', file" in check.problems[0]
    assert check.problems[1].startswith("2 of 3 rows cannot be scored")
