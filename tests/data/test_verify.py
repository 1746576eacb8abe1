"""``verify``: counts are right, and everything wrong is found with file, row and column."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel_decoupling.cli import main
from parallel_decoupling.commands import load_collator
from parallel_decoupling.data.verify import Check, verify
from tests.data.mmeb_files import eval_row, train_row, write_eval, write_image, write_train


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """One subset in both splits, two tasks and a folder of no known task, all whole."""
    for number in range(4):
        write_image(tmp_path / f"MMEB-train/images/CIRR/Train/{number}.jpg")
        write_image(tmp_path / f"MMEB-eval/GQA/{number}.jpg")
    folder = "images/CIRR/Train"
    rows = [train_row(f"q{row % 3}", "p", qry_image_path=f"{folder}/{row % 3}.jpg") for row in range(5)]
    rows = [{**row, "neg_text": "n", "neg_image_path": ""} for row in rows]
    rows[0]["neg_image_path"] = f"{folder}/3.jpg"
    write_train(tmp_path, "CIRR", rows)
    write_train(tmp_path, "CIRR", rows[:2], split="diverse_instruction")
    questions = [
        eval_row(f"q{row}", ["a", "b", "c"][: 2 + row % 2], qry_img_path=f"GQA/{row}.jpg") for row in range(4)
    ]
    write_eval(tmp_path, "GQA", questions)
    write_eval(tmp_path, "VOC2007", [eval_row("q", ["a", "b", "a"])])
    write_eval(tmp_path, "CIFAR-100", [eval_row("q", ["a", "b"])])
    return tmp_path


def checked(data_dir: Path, sample: int = 20) -> dict[str, Check]:
    folder, *checks = verify(data_dir, load_collator("tiny"), sample)
    return {"folder": folder, **{str(check): check for check in checks}}


def test_a_whole_folder_has_counts_and_no_problem(data_dir: Path) -> None:
    checks = checked(data_dir, sample=2)
    trained = ["train CIRR diverse_instruction", "train CIRR original"]
    assert list(checks) == ["folder", *trained, "eval VOC2007 test", "eval GQA test"]
    assert not any(check.problems for check in checks.values())
    images = {"images": 4, "missing": 0, "tried": 2, "unusable": 0}
    assert checks["train CIRR original"].counts == {"rows": 5, "repeated": 2, **images}
    listed = {"candidates at least": 2, "candidates at most": 3}
    assert checks["eval GQA test"].counts == {"rows": 4, "repeated": 0, **listed, **images, "tried": 4}
    assert checks["eval VOC2007 test"].counts["repeated"] == 1
    train, evaluation = checks["folder"].notes
    assert train.startswith("MMEB-train lacks 19 of 20: ImageNet_1K, ")
    assert evaluation.startswith("MMEB-eval lacks 34 of 36")
    assert checks["eval GQA test"].notes == ["4 rows, where MMEB has 1000."]


def test_missing_and_broken_images_are_found_with_their_place(data_dir: Path) -> None:
    images = data_dir / "MMEB-train/images/CIRR/Train"
    (images / "3.jpg").unlink()
    (images / "1.jpg").write_bytes(b"broken")
    (data_dir / "MMEB-eval/GQA/2.jpg").unlink()
    checks = checked(data_dir)
    train = checks["train CIRR original"]
    counts = {"rows": 5, "repeated": 2, "images": 4, "missing": 1, "tried": 5, "unusable": 3}
    assert train.counts == counts
    missing, broken = train.problems
    file = data_dir / "MMEB-train/CIRR/original-00000-of-00001.parquet"
    assert missing.startswith(
        "1 of 4 images are missing, first 'images/CIRR/Train/3.jpg' in training subset 'CIRR', "
        f"file {file}, row 0, column 'neg_image_path'. Unpack the archive"
    )
    assert broken.startswith("3 of 5 rows cannot be embedded: row 0: training subset 'CIRR', file ")
    assert "; row 1: Cannot read image" in broken
    assert "; row 4: Cannot read image" in broken
    missing, lost, unusable = checks["eval GQA test"].problems
    assert "evaluation task 'GQA', row 2, query: Cannot read image GQA/2.jpg" in unusable
    assert "row 2, column 'qry_img_path'" in missing
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
    nights = checks["train NIGHTS original"]
    assert "row 1, column 'qry': <|image_1|> in the text but no image" in nights.problems[0]
    assert "1 rows with neither text nor image" in nights.notes[0]
    assert "column 'qry_image_path' is missing" in checks["train WebQA original"].problems[0]
    assert "1 candidates" in checks["eval OVEN test"].problems[0]
    assert "cannot read" in checks["eval EDIS test"].problems[0]
    assert checks["train CIRR original"].problems == [], "one bad subset does not hide the others"


def test_negatives_are_read_too(tmp_path: Path) -> None:
    write_train(tmp_path, "A", [train_row(neg_text=["n", "m"], neg_image_path=[""])])
    assert "2 texts but 1 image paths" in checked(tmp_path)["train A original"].problems[0]


def test_an_empty_folder_is_a_problem(tmp_path: Path) -> None:
    (folder,) = verify(tmp_path, load_collator("tiny"))
    assert "Neither training subsets nor evaluation tasks" in folder.problems[0]
    with pytest.raises(ValueError, match="is not a folder"):
        verify(tmp_path / "none", load_collator("tiny"))


def test_the_command_prints_and_says_by_its_exit_code(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["verify", str(data_dir), "--sample", "1"])
    assert "train CIRR" in capsys.readouterr().out
    (data_dir / "MMEB-eval/GQA/2.jpg").unlink()
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(data_dir)])
    assert stopped.value.code == 1
    assert "eval GQA test: problem: 1 of 4 images are missing" in capsys.readouterr().out
