"""Every leaf of a checkpoint, an exported folder and a store of embeddings: a changed one is found."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from parallel_decoupling.evaluation.store import METADATA_KEY, Store
from parallel_decoupling.model.backbone import load_backbone
from parallel_decoupling.model.pretrained import load_encoder
from parallel_decoupling.model.run_checkpoint import read_checkpoint
from parallel_decoupling.training.module import PDFEmbedder
from tests.support.embedders import tiny_embedder
from tests.support.stores import save_store, vectors

DAMAGED = "is damaged|its hash differs|does not hold|lacks|is not a"
VALUES: list[Any] = [None, "other", float("nan"), 0, -1, 10**30, [], {}]


def leaves(values: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values that are not containers, and of the containers themselves."""
    inside = (
        values.items() if isinstance(values, dict) else enumerate(values if isinstance(values, list) else ())
    )
    for key, value in inside:
        yield (*place, key)
        yield from leaves(value, (*place, key))


def changed(content: Any, place: tuple[Any, ...], number: int) -> Any:
    """A copy with one leaf replaced by the value of a number, or removed."""
    copied = copy.deepcopy(content)
    inside = copied
    for key in place[:-1]:
        inside = inside[key]
    if number % (len(VALUES) + 1) == len(VALUES):
        inside.pop(place[-1])
    else:
        value = VALUES[number % (len(VALUES) + 1)]
        inside[place[-1]] = "other" if inside[place[-1]] == value else value
    return copied


def test_every_leaf_of_an_exported_config(tiny_backbone_dir: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_embedder(tiny_backbone_dir).save_pretrained(folder)
    load_encoder(folder)
    content = json.loads((folder / "config.json").read_text())
    for number, place in enumerate(leaves(content)):
        (folder / "config.json").write_text(json.dumps(changed(content, place, number)))
        with pytest.raises(ValueError, match=DAMAGED + "|is not a model that save_pretrained wrote"):
            load_encoder(folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(ValueError, match="no model at"):
        load_encoder(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "backbone/config.json", "backbone/tokenizer.json"])
def test_files_of_an_exported_folder(tiny_backbone_dir: str, tmp_path: Path, name: str) -> None:
    """A flipped bit, a cut end, nothing, no file, and a pipe, which would be waited for."""
    tiny_embedder(tiny_backbone_dir).save_pretrained(tmp_path / "model", include_backbone=True)
    file = tmp_path / "model" / name
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    changes = [partial(file.write_bytes, each) for each in (flipped, content[:-50], b"")]
    for change in (*changes, file.unlink, partial(os.mkfifo, file)):
        change()
        with pytest.raises(ValueError, match=f"{name} are missing, damaged, or were changed"):
            load_encoder(tmp_path / "model")


def test_own_weights_are_read_and_not_mapped(
    checkpoint: Any, tiny_backbone_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapped file that cannot be read any more ends the process, without a message."""
    maps = list[str]()
    monkeypatch.setattr(
        "parallel_decoupling.model.identity.load_trainable_state",
        lambda *_: maps.append(Path("/proc/self/maps").read_text()),
    )
    tiny_embedder(tiny_backbone_dir).save_pretrained(tmp_path / "model")
    for place, file in ((checkpoint[0], "last.ckpt"), (tmp_path / "model", "model/model.safetensors")):
        load_encoder(place)
        assert file not in maps.pop()


def test_damaged_weights_of_a_backbone(tiny_backbone_dir: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_backbone_dir, tmp_path / "backbone")
    (file,) = (tmp_path / "backbone").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="weights of backbone .* are damaged"):
        load_backbone(str(tmp_path / "backbone"))
    torch.save(load_file(Path(tiny_backbone_dir, file.name)), file.with_name("pytorch_model.bin"))
    file.unlink()
    with pytest.raises(ValueError, match=r"has no weights in safetensors: .*save it anew"):
        load_backbone(str(tmp_path / "backbone"))


@pytest.fixture
def checkpoint(trained_run: Path) -> tuple[Path, dict[str, Any]]:
    file = trained_run / "checkpoints" / "last.ckpt"
    return file, torch.load(file, weights_only=True)


def test_every_plain_leaf_of_a_checkpoint(checkpoint: Any, tmp_path: Path) -> None:
    file, content = checkpoint
    read_checkpoint(file)
    plain = {key: content[key] for key in ("hyper_parameters", "backbone", "data", "progress")}
    rest = {key: value for key, value in content.items() if key not in plain}
    for number, place in enumerate(leaves(plain)):
        torch.save({**rest, **changed(plain, place, number)}, tmp_path / "changed.ckpt")
        with pytest.raises(ValueError, match=DAMAGED):
            read_checkpoint(tmp_path / "changed.ckpt")


def test_every_tensor_of_a_checkpoint(checkpoint: Any, tmp_path: Path) -> None:
    _, content = checkpoint
    others: list[Any] = [(name, tensor.clone()) for name, tensor in content["state_dict"].items()]
    for _, tensor in others:
        tensor.view(torch.int32).flatten()[-1] ^= 1
    for name, other in [*others, *((others[0][0], other) for other in (None, "text", [0.5], {}))]:
        torch.save({**content, "state_dict": {**content["state_dict"], name: other}}, tmp_path / "bit.ckpt")
        with pytest.raises(ValueError, match=DAMAGED):
            PDFEmbedder.load_from_checkpoint(tmp_path / "bit.ckpt")


def test_every_leaf_of_what_a_store_says_and_every_page_of_vectors(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    save_store(folder, vectors(40))
    (file,) = folder.glob("*.parquet")
    whole, table = file.read_bytes(), pq.read_table(file)
    before = Store(folder).column("path_0")
    content = json.loads(table.schema.metadata[METADATA_KEY])
    for number, place in enumerate(leaves(content)):
        about = {METADATA_KEY: json.dumps(changed(content, place, number))}
        pq.write_table(table.replace_schema_metadata(about), file)
        with pytest.raises(ValueError, match=DAMAGED):
            Store(folder)
    numbers = before.numpy().tobytes()
    place = whole.index(numbers[:64])
    for position in (place, place + 1, place + 900):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(ValueError, match="is damaged"):
            Store(folder).column("path_0")
    cells = table["path_0"].to_pylist()
    others = [
        cells[::-1],
        [[0.0, *cells[0][1:]], *cells[1:]],
        [*cells[:-1], None],
        [each[:-1] for each in cells],
    ]
    kind, number = table.schema.field("path_0").type, table.schema.get_field_index("path_0")
    for other in (
        *(pa.array(each, kind if len(each[0]) == 24 else None) for each in others),
        pa.array(cells),
    ):
        pq.write_table(table.set_column(number, "path_0", other), file)
        with pytest.raises(ValueError, match="path_0"):
            Store(folder).column("path_0")
    file.write_bytes(whole)
    assert torch.equal(Store(folder).column("path_0"), before)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match="holds no embeddings"):
        Store(folder)
