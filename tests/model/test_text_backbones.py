"""Language models without vision: what the battery of all families does not ask of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.model.backbone import AdapterConfig, load_backbone
from parallel_decoupling.model.encoder import ParallelEncoder
from tests.model.test_families import TEXTS, collate, stock_alone
from tests.support.embedders import tiny_embedder
from tests.support.families import TEXT_FAMILIES, raw_input, save_tiny_family
from tests.support.tiny import noise_image
from tests.test_plan import make_plan

WORDS = [row.text for row in TEXTS]


@pytest.fixture(params=TEXT_FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return save_tiny_family(request.param, tmp_path / "backbone")


@torch.no_grad()
def test_a_path_is_exported_as_a_stock_model_and_its_prefix(folder: str, tmp_path: Path) -> None:
    embedder = tiny_embedder(folder, per_path=True)
    before = embedder.encode(WORDS, instruction="", paths="all")
    embedder.save_pretrained(tmp_path / "kept", include_backbone=True)
    embedder.save_pretrained(tmp_path / "path_1", paths=[1], merge_adapters=True)
    shutil.rmtree(folder)
    kept = Embedder.from_pretrained(tmp_path / "kept").encode(WORDS, instruction="", paths="all")
    assert torch.equal(kept, before)
    merged = Embedder.from_pretrained(tmp_path / "path_1").encode(WORDS, instruction="")
    torch.testing.assert_close(merged, before[:, 1], rtol=1e-5, atol=1e-5)
    stock: Any = AutoModel.from_pretrained(tmp_path / "path_1" / "backbone")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "path_1" / "backbone")
    prefix = embedder.encoder.prefixes.key_values[1]
    for text, embedding in zip(WORDS, before[:, 1], strict=True):
        expected = stock_alone(stock, tokenizer, "", raw_input(text), prefix)
        torch.testing.assert_close(embedding, expected, rtol=1e-5, atol=1e-5)


def test_a_picture_is_one_error_with_its_place(folder: str) -> None:
    backbone = load_backbone(folder, adapter=AdapterConfig(kind="frozen"))
    rows = [TEXTS[0], raw_input("what is this?", noise_image(20, 20))]
    with pytest.raises(ValueError, match=r"refuses '<\|image_1\|>\\nwhat .*the backbone reads text alone"):
        collate(backbone, rows)
    with pytest.raises(ValueError, match="the backbone reads text alone"):
        Embedder(ParallelEncoder(backbone, num_paths=1)).encode(noise_image(20, 20))


def test_files_that_name_a_processor_are_read_as_a_tokenizers(tmp_path: Path) -> None:
    folder = Path(save_tiny_family("gemma3_text", tmp_path))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["processor_class"] = "Gemma3Processor"  # as in google/gemma-3-270m, without an image processor
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    backbone = load_backbone(str(folder), adapter=AdapterConfig(kind="frozen"))
    assert collate(backbone, TEXTS).tokens.keys() == {"input_ids", "attention_mask"}


@torch.no_grad()
def test_prompts_longer_than_the_window_keep_all_positions(tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny_family("gemma3_text", tmp_path), adapter=AdapterConfig(kind="frozen"))
    short, long = (backbone.text_embeddings("count the objects", length) for length in (1, 9))
    states = backbone.prompt_states(long[None])
    assert states.shape[4] == len(long) > backbone.config.sliding_window < len(short)
    torch.testing.assert_close(states[..., : len(short), :], backbone.prompt_states(short[None]))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_plan_has_all_parameters_and_no_pictures(folder: str, kind: Any) -> None:
    adapter = AdapterConfig(kind=kind)
    plan = make_plan(
        folder, adapter=adapter, num_paths=2, prefix_init="random", mi_weight=0.0, mi={"kind": "none"}
    )
    encoder = ParallelEncoder(load_backbone(folder, adapter=adapter), num_paths=2)
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert sum(numbers for numbers, _, _ in plan.groups.values()) == count
    assert not any("vision" in part for part in plan.groups)
    assert plan.memory["pixels of the batch"] == plan.image.tokens == 0
    assert plan.flops > 0
