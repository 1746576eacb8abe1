"""``lightning verify``: counts are right, everything wrong is found, named and told how to mend."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from parallel_decoupling.cli import main
from parallel_decoupling.data.verify import Check, Verification, verify
from tests.data.mmeb_files import eval_row, train_row, write_eval, write_image, write_rows, write_train


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """One subset in both splits, two tasks and a folder that is no task, all whole."""
    for number in range(4):
        write_image(tmp_path / f"MMEB-train/images/CIRR/Train/{number}.jpg")
        write_image(tmp_path / f"MMEB-eval/GQA/{number}.jpg")
    rows = [
        train_row(
            f"q{row % 3}",
            "p",
            qry_image_path=f"images/CIRR/Train/{row % 3}.jpg",
            neg_text="n",
            neg_image_path="",
        )
        for row in range(5)
    ]
    rows[0]["neg_image_path"] = "images/CIRR/Train/3.jpg"
    write_train(tmp_path, "CIRR", rows)
    write_train(tmp_path, "CIRR", rows[:2], split="diverse_instruction")
    questions = [
        eval_row(f"q{row}", ["a", "b", "c"][: 2 + row % 2], qry_img_path=f"GQA/{row}.jpg") for row in range(4)
    ]
    write_eval(tmp_path, "GQA", questions)
    write_eval(tmp_path, "VOC2007", [eval_row("q", ["a", "b", "a"])])
    write_eval(tmp_path, "CIFAR-100", [eval_row("q", ["a", "b"])])
    return tmp_path


def checked(data_dir: Path) -> dict[str, Check]:
    result = verify(data_dir, show_progress=False)
    return {f"{check.part} {check.name} {check.split}": check for check in result.checks}


def test_a_whole_folder_has_counts_and_no_problem(data_dir: Path) -> None:
    result = verify(data_dir, sample=2, show_progress=False)
    assert result.all_problems == []
    checks = {f"{check.part} {check.name} {check.split}": check for check in result.checks}
    assert list(checks) == [
        "train CIRR diverse_instruction",
        "train CIRR original",
        "eval VOC2007 test",
        "eval GQA test",
    ]
    train = checks["train CIRR original"]
    assert (train.rows, train.images, train.missing, train.opened, train.duplicates) == (5, 4, 0, 2, 2)
    questions = checks["eval GQA test"]
    assert (questions.rows, questions.images, questions.shortest_list, questions.longest_list) == (4, 4, 2, 3)
    assert checks["eval VOC2007 test"].duplicates == 1
    notes = "\n".join(result.all_notes)
    for note in (
        "1 of MMEB's 20 training subsets; not here: ImageNet_1K",
        "2 of MMEB's 36 evaluation tasks",
        "MMEB-eval/CIFAR-100 is no task of the table",
        "eval VOC2007: 1 rows list their positive more than once",
        "eval GQA: 4 rows, where MMEB has 1000",
    ):
        assert note in notes


def test_missing_broken_and_ghost_images_are_found(data_dir: Path) -> None:
    images = data_dir / "MMEB-train/images/CIRR/Train"
    (images / "0.jpg").unlink()
    (images / "1.jpg").write_bytes(b"broken")
    (images / "._1.jpg").write_bytes(b"ghost")
    (data_dir / "MMEB-eval/GQA/2.jpg").unlink()
    checks = checked(data_dir)
    train = checks["train CIRR original"]
    assert (train.missing, train.opened, train.broken, train.ghosts) == (1, 3, 1, 1)
    missing, broken = train.problems
    assert missing.startswith(
        "1 of 4 images are missing, such as images/CIRR/Train/0.jpg. Unpack images_zip/CIRR.zip"
    )
    assert "1 of 3 opened images are broken. Cannot read image" in broken
    assert "1 files ._* of macOS" in train.notes[0]
    missing, lost = checks["eval GQA test"].problems
    assert "1 of 4 images are missing" in missing
    assert "1 of 4 rows cannot be scored" in lost


def test_rows_and_files_that_cannot_be_used_are_problems(data_dir: Path) -> None:
    write_train(
        data_dir, "NIGHTS", [train_row("fine"), train_row("<|image_1|>\nno image"), train_row("", "x")]
    )
    write_train(data_dir, "WebQA", [{"qry": "x"}])
    write_eval(data_dir, "OVEN", [eval_row("q", ["only one"])])
    (data_dir / "MMEB-eval/EDIS").mkdir()
    (data_dir / "MMEB-eval/EDIS/test-00000-of-00001.parquet").write_bytes(b"cut off")
    checks = checked(data_dir)
    assert (
        "row 1, column 'qry': <|image_1|> in the text but no image"
        in checks["train NIGHTS original"].problems[0]
    )
    assert "1 rows with neither text nor image" in checks["train NIGHTS original"].notes[0]
    assert "column 'qry_image_path' is missing" in checks["train WebQA original"].problems[0]
    assert "1 candidates" in checks["eval OVEN test"].problems[0]
    assert "Is it complete" in checks["eval EDIS test"].problems[0]
    assert checks["train CIRR original"].problems == [], "one bad subset does not hide the others"


def test_an_empty_folder_is_a_problem(tmp_path: Path) -> None:
    assert "Neither training subsets nor evaluation tasks" in verify(tmp_path).all_problems[0]
    with pytest.raises(ValueError, match="is no folder"):
        verify(tmp_path / "none")


def test_the_table_fits_a_terminal_and_marks_problems(data_dir: Path) -> None:
    write_rows(data_dir / "MMEB-eval/Visual7W-Pointing/test-00000-of-00001.parquet", [eval_row("q", ["x"])])
    stream = io.StringIO()
    Console(file=stream, width=80).print(verify(data_dir, show_progress=False).table())
    assert "eval Visual7W-Pointing !" in stream.getvalue()
    assert "train CIRR (diverse_instruction)" in stream.getvalue() or "…" in stream.getvalue()


def test_the_command_prints_writes_and_says_by_its_exit_code(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_file = tmp_path / "report.json"
    main(["verify", str(data_dir), "--sample", "1", "--output_file", str(report_file)])
    assert "train CIRR" in capsys.readouterr().out
    content = json.loads(report_file.read_text())
    assert (
        Verification(**{**content, "checks": [Check(**check) for check in content["checks"]]}).all_problems
        == []
    )
    (data_dir / "MMEB-eval/GQA/2.jpg").unlink()
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(data_dir)])
    assert stopped.value.code == 1
    assert "problem: eval GQA: 1 of 4 images are missing" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(tmp_path / "none")])
    assert stopped.value.code == 2


def test_files_without_the_number_of_shards_are_a_split(tmp_path: Path) -> None:
    write_rows(tmp_path / "MMEB-train/A/original-0.parquet", [train_row()])
    assert list(checked(tmp_path)) == ["train A original"]
    assert verify(tmp_path, show_progress=False).all_problems == []


def test_negatives_are_read_too(tmp_path: Path) -> None:
    write_train(tmp_path, "A", [train_row(neg_text=[" ", "n"], neg_image_path=["", ""])])
    assert checked(tmp_path)["train A original"].problems == []
    write_train(tmp_path, "A", [train_row(neg_text=["n", "m"], neg_image_path=[""])])
    assert "2 texts but 1 image paths" in checked(tmp_path)["train A original"].problems[0]
    write_train(tmp_path, "A", [train_row(neg_text=["n", "<|image_1|>"], neg_image_path=["", ""])])
    (problem,) = checked(tmp_path)["train A original"].problems
    assert "row 0, column 'neg_text': <|image_1|> in the text but no image" in problem
