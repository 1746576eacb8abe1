"""Published adapters: what peft wrote, under the module paths of today and of older transformers versions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from parallel_decoupling.batch import EncoderInputs
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.model.backbone import AdapterConfig, Backbone, load_backbone
from parallel_decoupling.model.encoder import ParallelEncoder
from parallel_decoupling.model.identity import load_trainable_state, trainable_state
from tests.support.families import raw_input, save_tiny_family
from tests.support.tiny import noise_image

# VLM2Vec's targets: of these, LLaVA's CLIP tower has q, k, v and out_proj, Qwen2-VL's tower none
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "out_proj", "qkv_proj", "gate_up_proj"]
LANGUAGE = ("down_proj", "k_proj", "o_proj", "q_proj", "v_proj")
OLDER_PATHS = {
    "qwen2_vl": {"model.model.language_model.": "model.model.", "model.model.visual.": "model.visual."},
    "llava_next_mistral": {
        "model.model.language_model.": "model.language_model.model.",
        "model.model.vision_tower.": "model.vision_tower.vision_model.",
    },
    "internvl": {
        "model.model.language_model.": "model.language_model.model.",
        "model.model.vision_tower.": "model.vision_tower.",
    },
    "qwen3_vl": {},
    "smolvlm": {},
}


def publish(folder: str, target: Path, older_paths: dict[str, str], **options: Any) -> Any:
    """Train-like: peft around the generation model, every adapter tensor moved, saved as peft saves."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    settings: dict[str, Any] = {"target_modules": TARGETS, "init_lora_weights": "gaussian", **options}
    peft_model = get_peft_model(model, LoraConfig(r=4, lora_alpha=24, lora_dropout=0.1, **settings))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    peft_model.save_pretrained(target)
    rewrite(target, lambda name: replace_first(name, older_paths))
    return peft_model


def replace_first(name: str, paths: dict[str, str]) -> str:
    for today, older in paths.items():
        name = re.sub(rf"^base_model\.{re.escape(today)}", f"base_model.{older}", name)
    return name


def rewrite(folder: Path, rename: Callable[[str], str | None]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(file).items()}
    tensors.pop(None, None)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def collate(backbone: Backbone) -> EncoderInputs:
    rows = [raw_input("read the word"), raw_input("what colour?", noise_image(40, 32))]
    return Collator(backbone.processor, image_token=backbone.image_token).encode_inputs(rows)


def last_hidden(peft_model: Any, inputs: EncoderInputs) -> Tensor:
    """The slow version: the published model itself, with its adapter, up to the final norm."""
    base = peft_model.eval().get_base_model().model
    output = base(**inputs.tokens, **inputs.vision[1])
    return output.last_hidden_state * inputs.tokens["attention_mask"][..., None]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_family("qwen2_vl", tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def published(qwen: str, tmp_path: Path) -> Path:
    publish(qwen, tmp_path / "adapter", OLDER_PATHS["qwen2_vl"], use_dora=True)
    return tmp_path / "adapter"


@pytest.mark.parametrize(("older", "kind"), [(True, "dora"), (False, "lora")])
@pytest.mark.parametrize("name", OLDER_PATHS)
def test_every_tensor_of_a_published_adapter_lands(name: str, older: bool, kind: Any, tmp_path: Path) -> None:
    folder, source = save_tiny_family(name, tmp_path / "model"), tmp_path / "adapter"
    peft_model = publish(folder, source, OLDER_PATHS[name] if older else {}, use_dora=kind == "dora")
    backbone = load_backbone(folder, adapter=AdapterConfig(kind=kind), initial_adapter=str(source))
    wanted = {key.removeprefix("base_model.model.model."): p for key, p in peft_model.named_parameters()}
    trainable = {key: p for key, p in backbone.base.named_parameters() if p.requires_grad}
    assert trainable.keys() == {key for key in wanted if "lora_" in key}
    for key, parameter in trainable.items():
        assert torch.equal(parameter, wanted[key]), key
    inputs = collate(backbone)
    actual = backbone.eval()(inputs.tokens, inputs.vision[1]) * inputs.tokens["attention_mask"][..., None]
    # the stock model places left-padded rows elsewhere, so sums differ in order
    torch.testing.assert_close(actual, last_hidden(peft_model, inputs), rtol=1e-4, atol=1e-4)


def test_rank_alpha_scope_and_targets_come_from_the_file(qwen: str, published: Path, tmp_path: Path) -> None:
    asked = AdapterConfig(kind="dora", rank=64, alpha=1, targets=("q_proj",))
    backbone = load_backbone(qwen, adapter=asked, initial_adapter=str(published))
    assert backbone.adapter == AdapterConfig("dora", 4, 24, 0.1, "language", LANGUAGE)
    folder, source = save_tiny_family("llava_next_mistral", tmp_path / "llava"), tmp_path / "both"
    publish(folder, source, OLDER_PATHS["llava_next_mistral"])
    adapter = load_backbone(folder, initial_adapter=str(source)).adapter
    assert (adapter.kind, adapter.scope) == ("lora", "both")
    assert adapter.targets == tuple(sorted((*LANGUAGE, "out_proj")))


def test_encoder_keeps_the_published_weights_whatever_its_seed(qwen: str, published: Path) -> None:
    def load(**options: Any) -> Backbone:
        adapter = AdapterConfig(kind="dora")
        return load_backbone(qwen, adapter=adapter, initial_adapter=str(published), **options)

    first, other = ParallelEncoder(load(), num_paths=2), ParallelEncoder(load(), num_paths=2, seed=5)
    inputs = collate(first.backbone)
    first.eval(), other.eval()
    assert torch.equal(first(inputs), other(inputs))
    load_trainable_state(other, trainable_state(first))
    half = load(dtype="bfloat16")
    for own, exact in zip(half.parameters(), load().parameters(), strict=True):
        if own.requires_grad:
            assert own.dtype == torch.float32
            assert torch.equal(own, exact)  # not rounded to the backbone's dtype


def test_frozen_keeps_the_adapter_as_it_is(qwen: str, published: Path) -> None:
    frozen = load_backbone(qwen, adapter=AdapterConfig(kind="frozen"), initial_adapter=str(published))
    trains = load_backbone(qwen, adapter=AdapterConfig(kind="dora"), initial_adapter=str(published))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert (frozen.adapter.kind, frozen.adapter.dropout, trains.adapter.dropout) == ("frozen", 0.0, 0.1)
    for own, other in zip(frozen.parameters(), trains.parameters(), strict=True):
        assert torch.equal(own, other)


def test_meta_backbone_counts_the_published_rank(qwen: str, published: Path) -> None:
    options: dict[str, Any] = {"adapter": AdapterConfig(kind="dora"), "initial_adapter": str(published)}
    meta, loaded = load_backbone(qwen, **options, meta=True), load_backbone(qwen, **options)
    shapes = [(name, p.shape, p.requires_grad) for name, p in meta.named_parameters()]
    assert shapes == [(name, p.shape, p.requires_grad) for name, p in loaded.named_parameters()]
    assert meta.adapter == loaded.adapter


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda path: rewrite(path, lambda name: None if "layers.1.self_attn.q_proj" in name else name),
            "q_proj",
        ),
        (lambda path: rewrite(path, lambda name: name.replace("layers.1.", "layers.9.")), "layers.9"),
        (lambda path: edit_config(path, r=8), "shape"),
        (lambda path: edit_config(path, bias="all"), "bias='all'"),
        (lambda path: edit_config(path, init_lora_weights="pissa"), "pissa"),
        (lambda path: edit_config(path, peft_type="IA3"), "not LoRA"),
        (lambda path: edit_config(path, use_dora=False), "set adapter.kind to lora"),
    ],
)
def test_adapter_that_does_not_fit_raises(qwen: str, published: Path, change: Any, message: str) -> None:
    change(published)
    with pytest.raises(ValueError, match=f"initial adapter .*{re.escape(message)}"):
        load_backbone(qwen, adapter=AdapterConfig(kind="dora"), initial_adapter=str(published))
