"""Folders in MMEB's layout: downloaded whole or not at all, and looked through by ``verify``."""

import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from parallel_decoupling.cli import main
from parallel_decoupling.commands import load_collator
from parallel_decoupling.data import download
from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.data.download import download_eval, download_train, unpack
from parallel_decoupling.data.verify import Check, verify
from tests.support.mmeb import Hub, eval_row, table, train_row, write_eval, write_image, write_train


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


JPEG = b"not decoded here"


def archive(names: list[str], suffix: str = ".zip", content: bytes = JPEG) -> bytes:
    stream = io.BytesIO()
    if suffix == ".zip":
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
            for name in names:
                file.writestr(name, content)
    else:
        with tarfile.open(fileobj=stream, mode="w:gz") as tape:
            for member in map(tarfile.TarInfo, names):
                member.size = len(content)
                tape.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def published() -> dict[str, dict[str, bytes]]:
    """Two subsets and two tasks of the hub."""
    row = train_row(qry_image_path="images/VisDial/Train/0.jpg")
    scored = {name: eval_row("q", ["a", "b"], qry_img_path=f"{name}/0.jpg") for name in ("GQA", "CIRR")}
    return {
        "TIGER-Lab/MMEB-train": {
            "VisDial/original-00000-of-00001.parquet": table([row]),
            "VisDial/diverse_instruction-00000-of-00001.parquet": table([row]),
            "CIRR/original-00000-of-00001.parquet": table([train_row()]),
            "images_zip/VisDial.zip": archive(["Train/0.jpg", "__MACOSX/Train/._0.jpg"]),
            "images_zip/CIRR.zip": archive(["images/CIRR/Train/0.jpg", "images/CIRR/Train/._0.jpg"]),
        },
        "TIGER-Lab/MMEB-eval": {
            "GQA/test-00000-of-00001.parquet": table([scored["GQA"]]),
            "CIRR/test-00000-of-00001.parquet": table([scored["CIRR"]]),
            "images.zip": archive(["GQA/0.jpg", "CIRR/0.jpg", "CIFAR-100/0.jpg", ".DS_Store"]),
        },
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub(published())
    monkeypatch.setattr(download, "snapshot_download", stand_in)
    return stand_in


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_only_the_wanted_subsets_are_fetched_and_unpacked_once(tmp_path: Path, hub: Hub) -> None:
    for _ in range(2):
        download_train(tmp_path, ["VisDial"], "original")
        assert files(tmp_path) == [
            "MMEB-train/VisDial/original-00000-of-00001.parquet",
            "MMEB-train/images/VisDial/Train/0.jpg",
            "MMEB-train/images_zip/VisDial.zip",
        ]
    wanted = ["VisDial/original-*.parquet", "images_zip/VisDial.zip"]
    assert hub.asked == [("TIGER-Lab/MMEB-train", wanted)], "the second call asks for nothing"
    download_train(tmp_path, ["VisDial", "CIRR"], "original")
    assert hub.asked[1][1] == ["CIRR/original-*.parquet", "images_zip/CIRR.zip"]
    assert (tmp_path / "MMEB-train/images/CIRR/Train/0.jpg").is_file()
    download_train(tmp_path, ["VisDial"], "diverse_instruction")
    assert hub.asked[2][1] == ["VisDial/diverse_instruction-*.parquet"]


def test_tasks_share_one_archive_of_pictures(tmp_path: Path, hub: Hub) -> None:
    download_eval(tmp_path, ["GQA"])
    assert files(tmp_path / "MMEB-eval/images") == ["GQA/0.jpg"]
    download_eval(tmp_path, ["GQA", "CIRR"])
    assert files(tmp_path / "MMEB-eval/images") == ["CIRR/0.jpg", "GQA/0.jpg"]
    expected = [["GQA/test-*.parquet", "images.zip"], ["CIRR/test-*.parquet"]]
    assert [patterns for _, patterns in hub.asked] == expected


@pytest.mark.parametrize("place", ["MMEB-train/images/VisDial/Train/0.jpg", "MMEB-train/VisDial/Train/0.jpg"])
def test_a_local_copy_is_left_alone(tmp_path: Path, hub: Hub, place: str) -> None:
    for image in (place, "MMEB-eval/GQA/0.jpg"):
        write_image(tmp_path / image)
    write_train(tmp_path, "VisDial", [train_row()])
    write_eval(tmp_path, "GQA", [eval_row("q", ["a", "b"])])
    before = files(tmp_path)
    download_train(tmp_path, ["VisDial"], "original")
    download_eval(tmp_path, ["GQA"])
    assert hub.asked == []
    assert files(tmp_path) == before


def test_a_stopped_unpacking_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"X/Train/{number}.jpg" for number in range(4)]
    (tmp_path / "X.zip").write_bytes(archive(names))
    opened: list[str] = []
    plain = zipfile.ZipFile.open

    def stop_at_the_third(self: zipfile.ZipFile, name: Any, *arguments: Any, **options: Any) -> Any:
        opened.append(name.filename)
        if len(opened) == 3:
            raise KeyboardInterrupt
        return plain(self, name, *arguments, **options)

    monkeypatch.setattr(zipfile.ZipFile, "open", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        unpack(tmp_path / "X.zip", tmp_path / "images", ["X"], inside="X")
    assert list((tmp_path / "images").iterdir()) == []
    unpack(tmp_path / "X.zip", tmp_path / "images", ["X"], inside="X")
    assert files(tmp_path / "images") == names


def test_a_second_process_may_unpack_the_same_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"X/Train/{number}.jpg" for number in range(4)]
    (tmp_path / "X.zip").write_bytes(archive(names))
    rename, first = Path.rename, []

    def rename_later(self: Path, target: Path) -> Path:
        if not first:
            first.append(0)
            unpack(tmp_path / "X.zip", tmp_path / "images", ["X"])  # the other process is faster
            first.append((tmp_path / "images/X").stat().st_ino)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_later)
    unpack(tmp_path / "X.zip", tmp_path / "images", ["X"])
    assert files(tmp_path / "images") == names
    assert [entry.name for entry in (tmp_path / "images").iterdir()] == ["X"]
    assert (tmp_path / "images/X").stat().st_ino == first[1], "the first one's folder stays"


SUFFIXES = (".zip", ".tar.gz")


@pytest.mark.parametrize(
    "name", ["../evil.jpg", "X/../../evil.jpg", "/evil.jpg", "\\evil.jpg", "c:\\evil.jpg"]
)
@pytest.mark.parametrize("inside", ["X", ""])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_is_written_outside_of_the_folder(
    tmp_path: Path, name: str, inside: str, suffix: str
) -> None:
    file = tmp_path / f"X{suffix}"
    file.write_bytes(archive(["X/0.jpg", name], suffix))
    unpack(file, tmp_path / "in/images", ["X"], inside=inside)
    assert {str(Path(each).parent) for each in files(tmp_path)} == {".", "in/images/X"}
    assert [each for each in tmp_path.iterdir() if each.is_file()] == [file]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_archives_that_are_broken_or_lack_a_folder_are_named(tmp_path: Path, hub: Hub, suffix: str) -> None:
    file, folder = tmp_path / f"X{suffix}", tmp_path / "images"
    file.write_bytes(archive(["X/0.jpg"], suffix)[:-30])
    with pytest.raises(ValueError, match=rf"X{suffix}: .*Delete the file to fetch it again"):
        unpack(file, folder, ["X"])
    file.write_bytes(archive(["X/0.jpg"], suffix))
    with pytest.raises(ValueError, match=rf"X{suffix} has no pictures of Y"):
        unpack(file, folder, ["X", "Y"])
    file.write_bytes(archive(["X/a", "X/a/b.jpg"], suffix))
    with pytest.raises(ValueError, match=rf"X{suffix}: cannot unpack 'X/a"):
        unpack(file, tmp_path / "more", ["X"])
    assert not list((tmp_path / "more").iterdir())
    with pytest.raises(ValueError, match="TIGER-Lab/MMEB-train has no NIGHTS/original"):
        download_train(tmp_path, ["NIGHTS"], "original")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("limit", ["MAX_ENTRIES", "MAX_GROWTH"])
def test_an_archive_that_would_grow_beyond_measure_is_refused(
    tmp_path: Path, limit: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"X{suffix}"
    file.write_bytes(archive(["X/0.jpg", "X/1.jpg"], suffix, bytes(100_000)))
    monkeypatch.setattr("parallel_decoupling.data.download.MAX_GROWTH", 1_000)
    unpack(file, tmp_path / "images", ["X"])
    monkeypatch.setattr(f"parallel_decoupling.data.download.{limit}", 1)
    with pytest.raises(ValueError, match=rf"X{suffix}: \d entries of .00,000 bytes .*Check where it is from"):
        unpack(file, tmp_path / "more", ["X"])
    assert not list((tmp_path / "more").iterdir())


def prepared(data: MMEBDataModule, stage: str) -> MMEBDataModule:
    """Call ``prepare_data`` as a trainer in this stage would."""
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    data.trainer.state.fn = stage  # type: ignore[assignment]
    data.prepare_data()
    return data


def test_prepare_data_fetches_what_the_stage_needs(tmp_path: Path, hub: Hub) -> None:
    options: dict[str, Any] = {"train_subsets": ["VisDial"], "eval_tasks": ["GQA", "CIRR"], "download": True}
    data = prepared(MMEBDataModule(str(tmp_path), **options, validation_tasks=["GQA"]), "fit")
    assert {repo: patterns[0] for repo, patterns in hub.asked} == {
        "TIGER-Lab/MMEB-train": "VisDial/original-*.parquet",
        "TIGER-Lab/MMEB-eval": "GQA/test-*.parquet",
    }
    data.setup("fit")
    assert data.train_data[0][0].query.images == (str(tmp_path / "MMEB-train/images/VisDial/Train/0.jpg"),)
    hub.asked.clear()
    prepared(MMEBDataModule(str(tmp_path), **options), "test")
    assert hub.asked == [("TIGER-Lab/MMEB-eval", ["CIRR/test-*.parquet"])]


def test_nothing_is_fetched_unless_asked(tmp_path: Path, hub: Hub) -> None:
    prepared(MMEBDataModule(str(tmp_path)), "test")
    assert hub.asked == []
    with pytest.raises(ValueError, match="download is for MMEB, 'mini-mmeb' is generated"):
        prepared(MMEBDataModule(download=True), "test")


def test_unknown_names_are_an_error_before_anything_is_fetched(tmp_path: Path, hub: Hub) -> None:
    for name, wanted in (
        ("train_subsets", ["CIRR", "VisDail"]),
        ("validation_tasks", ["GQB"]),
        ("eval_tasks", ["GQB"]),
    ):
        options: dict[str, Any] = {"train_subsets": [], name: wanted}
        with pytest.raises(ValueError, match=f"Unknown (training subset|evaluation task) '{wanted[-1]}'"):
            prepared(MMEBDataModule(str(tmp_path), download=True, **options), "fit")
    assert hub.asked == []
