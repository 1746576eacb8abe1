"""Embeddings in memory and on disk: every kind of path and input, in order, resumed, of several processes."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from parallel_decoupling.data.readers import read_eval_task
from parallel_decoupling.distributed import rank
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.run import EmbeddingWriter
from parallel_decoupling.evaluation.store import Keeper, Store
from parallel_decoupling.training.module import PDFEmbedder
from tests.support.embedders import mixed_inputs
from tests.support.fit import make_trainer, small_data, small_embedder
from tests.support.processes import run_ranks


def test_one_item_is_the_list_of_it_without_the_batch_dimension(embedder: Embedder) -> None:
    dim = embedder.embed_dim
    for item in mixed_inputs():
        for paths, shape in (("aggregate", (dim,)), ("all", (3, dim)), (1, (dim,)), ([2, 0], (2, dim))):
            found = embedder.encode(item, paths=paths)  # type: ignore[arg-type]
            assert found.shape == shape
            assert torch.equal(found, embedder.encode([item], paths=paths)[0])  # type: ignore[arg-type]
            if not isinstance(paths, str):
                assert torch.equal(found, embedder.encode(item, paths=torch.tensor(paths)))  # type: ignore[arg-type]
                assert torch.equal(found, embedder.encode(item, paths=np.uint8(paths)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.encode(["a"], batch_size="3"), "batch_size must be a whole number"),
        (lambda model: model.encode(["a"], batch_size=True), "batch_size must be a whole number"),
        (lambda model: model.encode(["a"], truncate_dim=8.0), "truncate_dim=8.0: embeddings have"),
        (lambda model: model.encode(["a"], paths=None), "paths must name some of 0 to 2"),
        (lambda model: model.encode(torch.zeros(0, 3, 3)), r"shape \[0, 3, 3\] is not a picture"),
        (lambda model: model.to("abacus"), "device='abacus' cannot be used"),
        (lambda model: model.to(None), "device must be"),
        (lambda model: model.to("meta"), "device='meta' would lose the weights"),
        (lambda model: model.save_pretrained("\udcff"), "is not a name in UTF-8"),
        (lambda model: Embedder("model"), "encoder must be"),
        (lambda model: Embedder(model.encoder, max_tokens="9"), "max_tokens must be"),
        (lambda model: Embedder(model.encoder, images={}), "images must be an instance of ImagePolicy"),
        (lambda model: Embedder.from_pretrained(3), "path must be"),
        (lambda model: Embedder.from_pretrained("x", dtype="int8"), "dtype must be 'float32'"),
        (lambda model: model.save_pretrained("x", 0), "paths must be an instance of Sequence"),
        (lambda model: model.save_pretrained("new", scores={"a": 1}), "scores must be the content of a"),
        (lambda model: model.save_pretrained("new", card={"license": object()}), "card must be"),
        (lambda model: model.push_to_hub(3), "repo_id must be a valid string, got 3"),
    ],
)
def test_arguments_of_another_type_are_one_error(
    embedder: Embedder,
    call: Callable[[Any], Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        call(embedder)
    assert not list(tmp_path.iterdir())


def test_queries_and_documents_have_their_instructions(embedder: Embedder) -> None:
    inputs = mixed_inputs()
    assert torch.equal(embedder.encode_query(inputs), embedder.encode(inputs, instruction="find"))
    documents = embedder.encode(inputs, instruction="show")
    assert torch.equal(embedder.encode_document(inputs), documents)
    assert torch.equal(embedder.encode_candidate(inputs), documents)
    assert torch.equal(embedder.encode_document(inputs, instruction=None), embedder.encode(inputs))
    assert not torch.equal(documents, embedder.encode(inputs))


@pytest.mark.parametrize("shape", [(6,), (3, 6)])
def test_similarity_equals_loops(shape: tuple[int, ...]) -> None:
    a, b = torch.randn(4, *shape), torch.randn(5, *shape)
    result = Embedder.similarity(a, b)
    for i in range(4):
        for j in range(5):
            cosine = F.cosine_similarity(a[i], b[j], dim=-1).mean()
            torch.testing.assert_close(result[i, j], cosine)
    assert torch.equal(Embedder.similarity(a.numpy(), b.tolist()), result)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="these are not numbers"):
        Embedder.similarity(a, "a text")  # type: ignore[arg-type]


NUM_ROWS = 20
BAD = {5: "missing.png", 11: "broken.png", 16: "text or an image"}
SIZES = (16, 48, 32)


@pytest.fixture(scope="module")
def module(tiny_backbone_dir: str) -> PDFEmbedder:
    return small_embedder(tiny_backbone_dir, candidate_instruction="Describe.")


@pytest.fixture(scope="module")
def table_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty rows: texts, images and both of several sizes; three of them bad."""
    folder = tmp_path_factory.mktemp("rows")
    texts, images = [], []
    for row in range(NUM_ROWS):
        name = f"{row}.png" if row % 2 else ""
        if name:
            Image.new("RGB", (SIZES[row % 3], SIZES[row // 3 % 3]), (9 * row, 100, 50)).save(folder / name)
        texts.append("" if row % 4 == 1 else "a picture " * (1 + row % 3))
        images.append(name)
    images[5], images[11], texts[16] = "missing.png", "broken.png", "  "
    (folder / "broken.png").write_bytes(b"no picture")
    columns = {"id": [f"row {row}" for row in range(NUM_ROWS)], "text": texts, "image": images}
    pq.write_table(pa.table({**columns, "number": list(range(NUM_ROWS))}), folder / "rows.parquet")
    return folder / "rows.parquet"


def predict(
    module: PDFEmbedder,
    source: Path | None,
    folder: Path,
    *callbacks: Callback,
    dtype: str = "float32",
    trainer: dict[str, Any] | None = None,
    **data: Any,
) -> None:
    options = {"predict_rows_per_shard": 6, "eval_batch_size": 4, **data}
    rows = small_data(options.pop("data_dir", "unused"), predict_source=source and str(source), **options)
    keeper = Keeper(folder, module.about, dtype=dtype)  # type: ignore[arg-type]
    rows.connect(module, keeper)
    lightning = make_trainer(folder, EmbeddingWriter(rows, keeper), *callbacks, **(trainer or {}))
    lightning.predict(module, datamodule=rows, return_predictions=False)


def read(folder: Path) -> pa.Table:
    files = sorted(folder.glob("embeddings-*.parquet"))
    return pa.concat_tables([pq.read_table(file).replace_schema_metadata(None) for file in files])


def vectors(table: pa.Table, name: str) -> Tensor:
    return torch.tensor(table[name].to_pylist(), dtype=torch.float32)


def expected(module: PDFEmbedder, source: Path) -> tuple[list[int], Tensor, Tensor]:
    """Good rows, and their embeddings one by one."""
    rows = [row for row in range(NUM_ROWS) if row not in BAD]
    cells = pq.read_table(source, columns=["text", "image"]).to_pylist()
    inputs = []
    for row in rows:
        text, image = cells[row]["text"], cells[row]["image"]
        given = {"text": text or None, "image": str(source.parent / image) if image else None}
        inputs.append({key: value for key, value in given.items() if value is not None})
    paths = module.encode_candidate(inputs, paths="all", batch_size=1)
    return rows, paths, module.encode_candidate(inputs, batch_size=1)


def test_files_hold_what_encode_gives_in_the_order_of_the_source(
    module: PDFEmbedder, table_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    predict(module, table_file, tmp_path)
    rows, paths, aggregate = expected(module, table_file)
    assert [file.name for file in sorted(tmp_path.glob("*.parquet"))] == [
        f"embeddings-{shard:05d}.parquet" for shard in range(4)
    ]
    table = read(tmp_path)
    assert table.column_names == ["id", "text", "image", "number", "aggregate", "path_0", "path_1"]
    assert table["number"].to_pylist() == rows
    assert table["id"].to_pylist() == [f"row {row}" for row in rows]
    assert table.schema.field("path_1").type == pa.list_(pa.float32(), 32)
    assert torch.allclose(vectors(table, "aggregate"), aggregate, atol=1e-5)
    for path in range(2):
        assert torch.allclose(vectors(table, f"path_{path}"), paths[:, path], atol=1e-5)
    bad_rows = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text().splitlines()]
    assert [(row["row"], row["id"]) for row in bad_rows] == [(row, f"row {row}") for row in BAD]
    assert all(BAD[row["row"]] in row["reason"] for row in bad_rows)
    assert "17 rows embedded. 3 rows could not be embedded" in caplog.text


def test_a_folder_is_embedded_whole_and_what_was_left_out_is_said(
    module: PDFEmbedder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "d").mkdir()
    for name in (b"a.png", b"caf\xe9.png"):
        with open(os.fsencode(tmp_path) + b"/d/" + name, "wb") as file:
            Image.new("RGB", (16, 16)).save(file, "PNG")
    for name in (b"notes.txt", b"b\xe9\x1b.png"):
        with open(os.fsencode(tmp_path) + b"/d/" + name, "wb") as file:
            file.write(b"no picture")
    predict(module, tmp_path / "d", tmp_path / "o")
    assert read(tmp_path / "o")["id"].to_pylist() == ["a.png", "bytes:caf%E9.png"]
    (bad_row,) = map(json.loads, (tmp_path / "o" / "bad_rows.jsonl").read_text("utf-8").splitlines())
    assert bad_row["id"] == "bytes:b%E9%1B.png"
    assert "b\udce9" in bad_row["reason"]
    assert "2 rows embedded. 1 rows could not be embedded" in caplog.text
    assert "Left out: 1 other files (notes.txt)." in caplog.text


def test_a_run_that_embeds_nothing_fails(module: PDFEmbedder, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("image\nnone.png\n")
    with pytest.raises(ValueError, match="0 rows embedded. 1 rows could not.*Nothing was embedded"):
        predict(module, tmp_path / "rows.csv", tmp_path / "o")
    assert "none.png" in (tmp_path / "o" / "bad_rows.jsonl").read_text()


def test_a_run_that_ends_before_its_first_file_fails(
    module: PDFEmbedder, table_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="0 rows embedded. .* see limit_predict_batches"):
        predict(module, table_file, tmp_path, trainer={"limit_predict_batches": 1})


def test_chosen_columns_in_half_precision(module: PDFEmbedder, table_file: Path, tmp_path: Path) -> None:
    predict(module, table_file, tmp_path, dtype="float16", predict_columns=["path_1"])
    table = read(tmp_path)
    assert table.column_names == ["id", "text", "image", "number", "path_1"]
    assert table.schema.field("path_1").type == pa.list_(pa.float16(), 32)
    assert torch.allclose(vectors(table, "path_1"), expected(module, table_file)[1][:, 1], atol=1e-3)


def test_a_shard_of_bad_rows_only_is_a_file_without_rows(
    module: PDFEmbedder, table_file: Path, tmp_path: Path
) -> None:
    predict(module, table_file, tmp_path, predict_rows_per_shard=1)
    files = sorted(tmp_path.glob("embeddings-*.parquet"))
    assert [row for row, file in enumerate(files) if not pq.read_metadata(file).num_rows] == list(BAD)
    store = Store(tmp_path)
    assert len(store) == len(store.column("path_0")) == NUM_ROWS - len(BAD), "the same columns in all files"
    assert store.source_rows() == [row for row in range(NUM_ROWS) if row not in BAD]


class KillAt(Callback):
    """Ends the process as ``kill -9`` does."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


class Counter(Callback):
    """Rows that were embedded."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.rows += args[1].rows


def test_a_killed_run_resumes_where_it_stopped(module: PDFEmbedder, table_file: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    predict(module, table_file, whole)
    with pytest.raises(RuntimeError, match="-9"):  # two batches per shard: in the middle of the third
        run_ranks(predict, module, table_file, killed, KillAt(4), processes=1)
    assert len(list(killed.glob("*.parquet"))) == 2
    leftover = killed / f".unfinished-{'0a' * 16}"
    leftover.mkdir()
    (leftover / "embeddings-00002.parquet").write_bytes(b"half")
    counter = Counter()
    predict(module, table_file, killed, counter)
    assert sorted(counter.rows) == [row for row in range(12, NUM_ROWS) if row not in BAD]
    assert read(killed).equals(read(whole))
    assert (killed / "bad_rows.jsonl").read_text() == (whole / "bad_rows.jsonl").read_text()
    assert not list(killed.glob(".*"))
    counter.rows.clear()
    predict(module, table_file, killed, counter)
    assert not counter.rows, "nothing left to do"


def test_files_of_another_run_are_refused(
    module: PDFEmbedder, table_file: Path, tiny_backbone_dir: str, tmp_path: Path
) -> None:
    predict(module, table_file, tmp_path, trainer={"limit_predict_batches": 2})
    assert len(list(tmp_path.glob("*.parquet"))) == 1
    for name, changes in {
        "dtype": {"dtype": "float16"},
        "instruction": {"predict_instruction": ""},
        "rows_per_shard": {"predict_rows_per_shard": 7},
        "columns": {"predict_columns": ["aggregate"]},
        "images": {"image_size": "low"},
    }.items():
        with pytest.raises(
            ValueError, match=rf"00000\.parquet was written with another {name}: .*output_dir"
        ):
            predict(module, table_file, tmp_path, **changes)  # type: ignore[arg-type]
    other_rows = table_file.with_name("other.jsonl")
    other_rows.write_text('{"text": "another row"}\n')
    with pytest.raises(ValueError, match="another (num_rows|rows_sha256)"):
        predict(module, other_rows, tmp_path)
    other = small_embedder(tiny_backbone_dir, candidate_instruction="Describe.")
    with torch.no_grad():
        other.encoder.parameter_groups()["prefixes"][0].add_(1.0)
    with pytest.raises(ValueError, match="another identity: path_sha256, sha256, weights_sha256"):
        predict(other, table_file, tmp_path)
    (tmp_path / "embeddings-00001.parquet").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="00001.parquet is not a complete file of embeddings .*delete it"):
        predict(module, table_file, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("rows_per_shard", [6, 100])
def test_two_processes_write_what_one_writes(
    rows_per_shard: int, module: PDFEmbedder, table_file: Path, tmp_path: Path
) -> None:
    one, two, options = tmp_path / "one", tmp_path / "two", {"predict_rows_per_shard": rows_per_shard}
    predict(module, table_file, one, **options)
    two.mkdir()

    def on_a_rank() -> None:
        counter = Counter()
        predict(module, table_file, two, counter, trainer={"devices": 2, "strategy": "ddp"}, **options)
        (two / f"rows_of_{rank()}.json").write_text(json.dumps(counter.rows))

    run_ranks(on_a_rank)
    assert read(two).equals(read(one))
    assert (two / "bad_rows.jsonl").read_text() == (one / "bad_rows.jsonl").read_text()
    shares = [json.loads((two / f"rows_of_{process}.json").read_text()) for process in range(2)]
    assert sorted(shares[0] + shares[1]) == [row for row in range(NUM_ROWS) if row not in BAD]
    assert bool(shares[1]) == (rows_per_shard == 6), "a single shard is one process's"


def test_evaluation_tasks_get_a_folder_per_side(
    module: PDFEmbedder, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    predict(module, None, tmp_path, data_dir=tiny_mmeb_dir, predict_rows_per_shard=3)
    for name in ("colours_i2t", "colours_t2i"):
        task = read_eval_task(tiny_mmeb_dir, name)
        for side, rows in (("query", task.queries), ("candidate", task.candidates)):
            store = Store(tmp_path / name / side)
            assert len(store.files) == 2
            torch.testing.assert_close(store.column("aggregate"), module.encode(rows), rtol=1e-4, atol=1e-5)
            assert [row["text"] for row in store.rows(range(4))] == [row.text for row in rows]


def test_batches_that_a_limit_cut_off_do_not_reach_the_next_loader(
    module: PDFEmbedder, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"data_dir": tiny_mmeb_dir, "predict_rows_per_shard": 2, "eval_batch_size": 1}
    predict(module, None, tmp_path, trainer={"limit_predict_batches": 3}, **options)
    assert len(list(tmp_path.rglob("embeddings-*.parquet"))) == 4, "the first shard of every side"
