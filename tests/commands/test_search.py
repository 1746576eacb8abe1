"""``lightning index`` and ``lightning search`` on a checkpoint of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from parallel_decoupling import cli
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.index.loading import load_index
from parallel_decoupling.index.searcher import PATH_HASHES
from parallel_decoupling.model.identity import path_hashes
from parallel_decoupling.training.module import PDFEmbedder
from tests.support.tiny import noise_image

COUNT = 12


def column(vectors_BD: Tensor) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors_BD.flatten().numpy()), vectors_BD.shape[1])


@pytest.fixture(scope="module")
def embedder(tiny_backbone_dir: str) -> Embedder:
    torch.manual_seed(0)
    model = PDFEmbedder(backbone=tiny_backbone_dir, num_paths=2, prefix_length=2)
    model.eval()
    return model.embedder


@pytest.fixture(scope="module")
def table_dir(embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    for number in range(COUNT):
        noise_image(32, 32, seed=number).save(folder / f"{number}.png")
    vectors = embedder.encode_candidate([folder / f"{number}.png" for number in range(COUNT)])
    table = pa.table(
        {
            "id": [f"picture {number}" for number in range(COUNT)],
            "image": [f"{number}.png" for number in range(COUNT)],
            "part": [number % 2 for number in range(COUNT)],
            "aggregate": column(embedder.encoder.aggregate(vectors)),
            "path_0": column(vectors[:, 0]),
            "path_1": column(vectors[:, 1]),
        }
    )
    about = {"model": "tiny.ckpt", "image_dir": str(folder), PATH_HASHES: path_hashes(embedder.encoder)}
    metadata = {"parallel_decoupling": json.dumps(about)}
    pq.write_table(table.replace_schema_metadata(metadata), folder / "embeddings-00000.parquet")
    return folder


@pytest.fixture(autouse=True)
def loaded(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that a command loads."""
    names: list[str] = []
    monkeypatch.setattr(Embedder, "from_pretrained", lambda name: names.append(name) or embedder)
    return names


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--precision", "int8", "--oversample", "2"],
        ["--kind", "lance"],
        ["--kind", "lance", "--approximate", "true"],
    ],
)
def test_index_then_search(
    options: list[str],
    table_dir: Path,
    tmp_path: Path,
    loaded: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    cli.main(["index", str(table_dir), str(tmp_path / "index"), *options])
    assert "12 items, 2 x 32 (path_0, path_1)" in capsys.readouterr().out
    gallery = tmp_path / "gallery.html"
    query = ["--image", str(table_dir / "7.png"), "--top_k", "3", "--gallery", str(gallery)]
    for scoring in ("aggregate", "sum", "maxsim", "path_1"):
        cli.main(["search", str(tmp_path / "index"), *query, "--scoring", scoring])
        rows = [line for line in capsys.readouterr().out.splitlines() if "picture" in line]
        assert len(rows) == 3
        assert "picture 7 " in rows[0]
        assert "1.000" in rows[0]
    assert gallery.read_text().count("data:image/jpeg") == 4
    assert set(loaded) == {"tiny.ckpt"}


def test_text_filter_and_another_model(
    table_dir: Path, tmp_path: Path, loaded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["index", str(table_dir / "embeddings-00000.parquet"), str(tmp_path)])
    search = ["search", str(tmp_path), "--text", "a red circle", "--model", "other.ckpt"]
    capsys.readouterr()
    cli.main([*search, "--where", "{part: 1, image: [1.png, 3.png, 4.png]}"])
    found = capsys.readouterr().out
    assert [number for number in range(COUNT) if f"picture {number} " in found] == [1, 3]
    assert loaded == ["other.ckpt"]


@pytest.mark.parametrize("kind", ["torch", "lance"])
def test_the_aggregate_of_concatenated_paths_is_their_sum(kind: str, table_dir: Path, tmp_path: Path) -> None:
    table = pq.read_table(table_dir / "embeddings-00000.parquet")
    paths = torch.tensor([table["path_0"].to_pylist(), table["path_1"].to_pylist()]).transpose(0, 1)
    place = table.column_names.index("aggregate")
    joined = table.set_column(place, "aggregate", column(paths.flatten(1)))
    pq.write_table(joined, tmp_path / "joined.parquet")
    cli.main(["index", str(tmp_path / "joined.parquet"), str(tmp_path / "index"), "--kind", kind])
    index = load_index(tmp_path / "index")
    queries = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(0))
    queries[:, 0] *= 3  # a longer path counts no more than the other
    by_default = index.search(queries, COUNT)
    assert by_default == index.search(queries, COUNT, "sum")
    joined_queries = torch.nn.functional.normalize(queries, dim=-1).flatten(1)
    cosines = torch.nn.functional.cosine_similarity(joined_queries[:, None], paths.flatten(1)[None], dim=-1)
    for hits, expected in zip(by_default, cosines, strict=True):
        assert [hit.score for hit in hits] == pytest.approx(
            expected.sort(descending=True).values.tolist(), abs=1e-5
        )


def test_another_model_than_that_of_the_items_is_one_line(
    table_dir: Path,
    tmp_path: Path,
    tiny_backbone_dir: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As after training on with the checkpoint that the index names."""
    cli.main(["index", str(table_dir), str(tmp_path / "index")])
    other = PDFEmbedder(backbone=tiny_backbone_dir, num_paths=2, prefix_length=2, seed=1).embedder
    monkeypatch.setattr(Embedder, "from_pretrained", lambda name: other)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["search", str(tmp_path / "index"), "--text", "a red circle"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "other weights than the one that embedded the index's items (tiny.ckpt)" in error
    assert "Traceback" not in error


def test_mistakes_are_one_line(table_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["index", str(table_dir), str(tmp_path / "index")])
    unnamed = load_index(tmp_path / "index")
    unnamed.settings.metadata.clear()  # type: ignore[attr-defined]
    unnamed.save(tmp_path / "unnamed")
    gallery = str(tmp_path / "deep" / "g.html")
    for arguments, message in (
        (["index", "nothere/", "x"], "nothere/ does not exist"),
        (["index", str(tmp_path), "x"], "write one with lightning predict"),
        (["index", str(table_dir), "x", "--approximate", "true"], "--approximate needs --kind lance"),
        (["index", str(table_dir), "x", "--kind", "lance", "--precision", "int8"], "set approximate"),
        (
            ["index", str(table_dir), str(tmp_path / "index"), "--kind", "lance"],
            "holds an index of kind 'torch'",
        ),
        (["search", str(tmp_path / "index")], "give --text, --image or both"),
        (["search", str(tmp_path), "--text", "a"], "holds no index"),
        (["search", str(tmp_path / "unnamed"), "--text", "a"], "give --model"),
        (["search", str(tmp_path / "index"), "--text", "a", "--gallery", gallery], gallery),
        (["search", str(tmp_path / "index"), "--image", "no.png"], "no image file 'no.png'"),
        (["search", str(tmp_path / "index"), "--text", "a", "--where", "{x: 1}"], "no field 'x'"),
        (["search", str(tmp_path / "index"), "--text", "a", "--scoring", "best"], "scoring is 'best'"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
