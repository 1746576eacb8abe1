"""The subcommands without a Trainer, as they are typed."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from parallel_decoupling import cli
from parallel_decoupling.data.tasks import Task
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.report import ScoreReport
from parallel_decoupling.evaluation.score import TaskResult
from parallel_decoupling.evaluation.store import Store
from parallel_decoupling.lance_index import LanceIndex
from parallel_decoupling.model.identity import path_hashes
from tests.model.test_pretrained import every_path
from tests.support.embedders import tiny_embedder
from tests.support.fit import make_trainer, small_data, small_embedder
from tests.support.stores import save_pictures, save_store
from tests.support.tiny import noise_image

COUNT = 12
SCORINGS = ("aggregate", "path_1", "maxsim")


@pytest.fixture(scope="module")
def embeddings(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What predict writes of twelve pictures."""
    folder = tmp_path_factory.mktemp("embeddings")
    save_pictures(folder, Embedder.from_pretrained(checkpoint), COUNT, model=str(checkpoint))
    return folder


def rows(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if ".png" in line]


@pytest.mark.parametrize("kind", ["exact", "lance"])
def test_search_finds_a_picture_by_itself(
    kind: str, embeddings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the folder itself, and in the index made of it."""
    folder = embeddings
    if kind == "lance":
        pytest.importorskip("lancedb")
        folder = tmp_path
        cli.main(["index", str(embeddings), str(tmp_path)])
        assert "12 items with aggregate, path_0, path_1" in capsys.readouterr().out
    for scoring in SCORINGS:
        query = ["--image", str(embeddings / "7.png"), "--top_k", "3", "--scoring", scoring]
        cli.main(["search", str(folder), *query])
        found = rows(capsys)
        assert len(found) == 3
        assert " 7.png " in found[0]
        assert " 1.000 " in found[0]


def test_text_conditions_and_another_model(
    embeddings: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: Any
) -> None:
    """A folder exported with one path searches by that path."""
    pytest.importorskip("lancedb")
    Embedder.from_pretrained(checkpoint).save_pretrained(tmp_path / "model", paths=[1])
    cli.main(["index", str(embeddings), str(tmp_path / "index")])
    search = ["search", str(tmp_path / "index"), "--text", "5", "--model", str(tmp_path / "model")]
    capsys.readouterr()
    cli.main([*search, "--scoring", "path_1", "--where", "part = 1 AND image < '4'"])
    assert {line.split(".png")[0].split()[-1] for line in rows(capsys)} == {"1", "3", "11"}
    assert "this model and index have path_1" in mistake(search)


def test_mistakes_of_a_search_are_one_message(
    embeddings: Path, tiny_backbone_dir: str, tmp_path: Path, mistake: Any
) -> None:
    other = tiny_embedder(tiny_backbone_dir, num_paths=2)
    other.save_pretrained(tmp_path / "other", include_backbone=True)
    search = ["search", str(embeddings), "--text", "a"]
    for arguments, message in (
        (["search", str(embeddings)], "nothing to search for"),
        (["search", str(embeddings), "--text", "null", "--scoring", "best"], "scoring is 'best'"),
        (["search", str(tmp_path), "--text", "a"], "holds no embeddings-*.parquet"),
        ([*search, "--scoring", "best"], "scoring is 'best'; this model and index have aggregate"),
        ([*search, "--where", "part = 1"], "make a LanceDB index"),
        ([*search, "--model", str(tmp_path / "other")], "the model has other weights"),
        ([*search, "--model", str(tmp_path / "none")], "none"),
        ([*search, "--top_k", "many"], "top_k"),
        (
            ["index", str(embeddings), str(tmp_path / "index"), "--index_type", "IVF_PQ"],
            "IVF_PQ needs at least 256 items",
        ),
    ):
        assert message in mistake(arguments)


@pytest.mark.parametrize(
    ("command", "package"), [("serve", "fastapi"), ("serve", "uvicorn"), ("app", "gradio")]
)
def test_missing_packages_are_named(
    command: str, package: str, monkeypatch: pytest.MonkeyPatch, mistake: Any
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"parallel_decoupling.{command}", raising=False)
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    message = f"this needs {package}: pip install 'parallel-decoupling[{command}]'\n"
    assert mistake([command, "anything"]).endswith(message)


@pytest.fixture(scope="module")
def run_dir(tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two steps, and the scores of these steps."""
    folder, module = tmp_path_factory.mktemp("run"), small_embedder(tiny_backbone_dir, num_paths=3)
    trainer = make_trainer(folder, max_steps=2)
    trainer.fit(module, small_data(tiny_mmeb_dir))
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    hits = {column: "10" for column in ("aggregate", "path_0", "path_1", "path_2")}
    result = TaskResult(Task("Sign", "classification", True), 2, 0.1, dict.fromkeys(hits, 0.5), hits)
    report = ScoreReport({"Sign": result}, {**module.run_info(), "commit": "c0ffee"})
    report.to_json_file(folder / "scores.json")
    return folder


@pytest.mark.parametrize("source", ["run", "checkpoint", "export"])
def test_export_of_one_path_with_its_backbone(source: str, run_dir: Path, tmp_path: Path) -> None:
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    model = {"run": run_dir, "checkpoint": checkpoint, "export": tmp_path / "exported"}[source]
    if source == "export":
        cli.main(["export", str(run_dir), str(model)])
    cli.main(["export", str(model), str(tmp_path / "model"), "--paths", "1", "--include_backbone", "true"])
    expected = every_path(Embedder.from_pretrained(run_dir), 1)
    assert torch.equal(every_path(Embedder.from_pretrained(tmp_path / "model"), 0), expected)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "| main steps | 2 |" in card
    assert "| commit | c0ffee |" in card
    assert ("| overall | aggregate 50.0" in card) == (source != "export")
    assert (tmp_path / "model" / "backbone").is_dir()


def contents(file: Path) -> bytes:
    """The bytes of a file, and what is compressed or encoded in one of embeddings."""
    if file.suffix != ".parquet":
        return file.read_bytes()
    table = pq.read_table(file)
    return file.read_bytes() + f"{table.to_pylist()}{table.schema.metadata}".encode()


def test_nothing_that_leaves_the_machine_names_its_folders(
    run_dir: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Embeddings of a folder, a table and the tasks, a LanceDB index, exports and cards, to the byte."""
    pytest.importorskip("lancedb")
    (tmp_path / "photos").mkdir()
    for number in range(2):
        noise_image(32, 32, seed=number).save(tmp_path / "photos" / f"{number}.png")
    broken = [
        "back\\slash.png",
        "tab\t.png",
        "new\nline.png",
        "\x1b[1m.png",
        "'\".png",
        os.fsdecode(b"caf\xe9.png"),
    ]
    for name in broken:
        (tmp_path / "photos" / name).write_bytes(b"x")
    images = [str(tmp_path / "photos" / "0.png"), str(tmp_path / "photos" / "none.png"), "/elsewhere/x.png"]
    cells = [json.dumps({"id": str(number), "image": image}) for number, image in enumerate(images)]
    (tmp_path / "rows.jsonl").write_text("\n".join(cells))
    sources = {"folder": tmp_path / "photos", "table": tmp_path / "rows.jsonl", "tasks": None}
    out, model = tmp_path / "out", run_dir / "checkpoints" / "last.ckpt"
    for name, source in sources.items():
        rows = [] if source is None else ["--data.predict_source", str(source)]
        cli.main(["predict", "--ckpt_path", str(model), "--output_dir", str(out / name), *rows])
    cli.main(["index", str(out / "folder"), str(out / "index")])
    cli.main(["export", str(run_dir), str(out / "included")])
    cli.main(["export", str(run_dir), str(run_dir.parent / "beside"), "--paths", "0"])
    shutil.move(run_dir.parent / "beside", out / "beside")
    base = str(tmp_path_factory.getbasetemp()).encode()
    files = [each for each in out.rglob("*") if each.is_file()]
    assert {file.suffix for file in files} >= {".parquet", ".lance", ".json", ".jsonl", ".md", ".safetensors"}
    assert [file.relative_to(out) for file in files if base in contents(file)] == []
    assert base not in str(LanceIndex(out / "index")._table.schema.metadata).encode()
    assert b"/elsewhere" not in b"".join(map(contents, (out / "table").iterdir()))
    assert len(Store(out / "folder").bad_rows) == len(broken)
    assert Store(out / "table").rows([0]) == [{"id": "0", "image": "photos/0.png"}]
    bad_rows = [json.loads(line) for line in (out / "table" / "bad_rows.jsonl").read_text().splitlines()]
    assert ["none.png" in bad_rows[0]["reason"], "x.png" in bad_rows[1]["reason"]] == [True, True]


@pytest.mark.parametrize("command", ["search", "app"])
def test_what_is_not_named_must_be_given(
    command: str, embeddings: Path, checkpoint: Path, tmp_path: Path, mistake: Any
) -> None:
    """Embeddings that were moved do not find their model; those of pictures elsewhere need their folder."""
    pytest.importorskip("gradio")
    query = ["--text", "a"] if command == "search" else []
    moved = shutil.copytree(embeddings, tmp_path / "far" / "away")
    assert "give --model" in mistake([command, str(moved), *query])
    if command == "app":
        embedder = Embedder.from_pretrained(checkpoint)
        about = {"path_sha256": path_hashes(embedder.encoder), "image_dir": str(embeddings)}
        save_store(tmp_path / "embeddings", embedder.encode(["a"], paths="all"), **about)
        arguments = [str(tmp_path / "embeddings"), "--model", str(checkpoint)]
        assert "give --image_dir" in mistake(["app", *arguments])
