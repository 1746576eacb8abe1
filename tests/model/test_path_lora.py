"""Paths that own their adapter are models with one path each, in one pass; adapters that others published."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from parallel_decoupling.batch import EncoderInputs
from parallel_decoupling.data.prompts import to_raw_inputs
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.model.backbone import AdapterConfig, Backbone, load_backbone
from parallel_decoupling.model.encoder import ParallelEncoder
from parallel_decoupling.model.path_lora import PathLoRA
from tests.model.test_encoder import ROWS
from tests.model.test_families import ROWS as FAMILY_ROWS
from tests.model.test_families import collate, stock_alone
from tests.support.embedders import mixed_inputs, tiny_embedder
from tests.support.families import save_tiny_family
from tests.support.tiny import tiny_inputs

OWN = {"rank": 2, "alpha": 4, "per_path": True}


def make(folder: str, *, adapter: dict[str, Any] = OWN, **options: Any) -> ParallelEncoder:
    loading = {name: options.pop(name) for name in ("gradient_checkpointing",) if name in options}
    backbone = load_backbone(folder, adapter=AdapterConfig(**adapter), **loading)
    return ParallelEncoder(backbone, **{"prefix_length": 3, "prefix_init": "random", **options})


@torch.no_grad()
def moved(encoder: ParallelEncoder) -> ParallelEncoder:
    """The encoder in fp64, every trained number off its start."""
    encoder.double()
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder


def gradients(encoder: ParallelEncoder, embeddings: Tensor) -> dict[str, Tensor]:
    """Of a loss that tells all coordinates apart."""
    encoder.zero_grad()
    (embeddings * torch.linspace(-1, 1, embeddings.shape[-1], dtype=embeddings.dtype)).sum().backward()
    return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


def as_shared(name: str, value: Any = None) -> Any:
    """The name of a path's tensor in plain LoRA, or the tensor there."""
    own = re.search(r"path_(lora_[AB])$", name)
    if value is None:
        return name.replace(own[0], f"{own[1]}.default.weight") if own else name
    return value[0] if own else value


def of_path(name: str, value: Tensor, path: int, num_paths: int) -> Tensor:
    own = name.startswith("prefixes.") or "path_lora" in name
    return value[path : path + 1] if own and len(value) == num_paths else value


@pytest.mark.parametrize("prefix_length", [0, 3])
def test_paths_equal_models_of_one_path(three_layers_dir: str, prefix_length: int) -> None:
    encoder = moved(make(three_layers_dir, num_paths=3, prefix_length=prefix_length))
    inputs = tiny_inputs(encoder.processor, ROWS)
    embeddings_BND = encoder(inputs)
    all_gradients = gradients(encoder, embeddings_BND)
    for path in range(3):
        single = make(three_layers_dir, num_paths=1, prefix_length=prefix_length).double()
        state = {n: of_path(n, value, path, 3) for n, value in encoder.state_dict().items()}
        single.load_state_dict(state)
        shared = {**OWN, "per_path": False}
        plain = make(three_layers_dir, adapter=shared, num_paths=1, prefix_length=prefix_length)
        plain.double().load_state_dict({as_shared(n): as_shared(n, value) for n, value in state.items()})
        expected = single(inputs)
        torch.testing.assert_close(embeddings_BND[:, path : path + 1], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(plain(inputs), expected, rtol=0, atol=1e-6)  # embeddings are fp32
        torch.testing.assert_close(encoder(inputs, [path]), expected, rtol=0, atol=1e-6)
        for name, gradient in gradients(single, expected).items():
            found = of_path(name, all_gradients[name], path, 3)
            torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6)


def test_a_loss_reaches_the_adapter_of_its_own_path_only(three_layers_dir: str) -> None:
    encoder = moved(make(three_layers_dir, num_paths=3))
    inputs = tiny_inputs(encoder.processor, ROWS)
    for name, gradient in gradients(encoder, encoder(inputs)[:, 1]).items():
        assert [bool(path.any()) for path in gradient] == [False, True, False], name


def test_layers_below_are_computed_once_and_share_their_adapter(three_layers_dir: str) -> None:
    encoder = moved(make(three_layers_dir, num_paths=2, prefix_layers=1))
    rows: dict[str, int] = {}
    for name, module in encoder.named_modules():
        if name.endswith("q_proj"):
            module.register_forward_hook(lambda m, args, out, name=name: rows.update({name: len(out)}))
    encoder(tiny_inputs(encoder.processor, ROWS))
    own = [isinstance(encoder.get_submodule(name), PathLoRA) for name in rows]
    assert own == [False, True, True]
    assert list(rows.values()) == [len(ROWS), 2 * len(ROWS), 2 * len(ROWS)]


def test_a_path_starts_the_same_whatever_the_number_of_paths_and_apart_from_the_others(
    three_layers_dir: str,
) -> None:
    one, three, shared = (
        make(three_layers_dir, num_paths=n, seed=7, adapter={**OWN, "per_path": own})
        for n, own in ((1, True), (3, True), (3, False))
    )
    for (name, layer), (_, first) in zip(three.named_modules(), one.named_modules(), strict=True):
        if isinstance(layer, PathLoRA):
            assert isinstance(first, PathLoRA)
            assert torch.equal(layer.path_lora_A[:1], first.path_lora_A)
            assert torch.equal(layer.path_lora_A[0], shared.get_parameter(f"{name}.lora_A.default.weight"))
            assert not torch.equal(layer.path_lora_A[0], layer.path_lora_A[1])
            assert not layer.path_lora_B.any()


def test_recomputed_layers_know_their_paths(three_layers_dir: str) -> None:
    once, again = (make(three_layers_dir, num_paths=3, gradient_checkpointing=on) for on in (False, True))
    moved(once)
    again.double().load_state_dict(once.state_dict())
    inputs = tiny_inputs(once.processor, ROWS)
    for paths in (None, [2, 0]):
        found = gradients(again, again(inputs, paths))
        torch.testing.assert_close(found, gradients(once, once(inputs, paths)), rtol=1e-5, atol=1e-7)


def test_published_adapter_starts_every_path(tmp_path: Path) -> None:
    folder, source = save_tiny_family("qwen2_vl", tmp_path / "model"), tmp_path / "adapter"
    publish(folder, source, OLDER_PATHS["qwen2_vl"])

    def load(num_paths: int, **adapter: Any) -> ParallelEncoder:
        config = AdapterConfig(**adapter)
        backbone = load_backbone(folder, adapter=config, initial_adapter=str(source))
        return ParallelEncoder(backbone, num_paths=num_paths, prefix_length=0).eval()

    shared, own = load(1), load(3, per_path=True)
    inputs = tiny_inputs(shared.processor, [("a red circle", []), ("a text", [])])
    torch.testing.assert_close(own(inputs, [0]), shared(inputs), rtol=1e-6, atol=1e-6)
    cosine_NN = own(inputs)[0] @ own(inputs)[0].T
    assert 0.8 < cosine_NN.min() < 0.99999


@torch.no_grad()
def test_one_path_without_prefix_is_exported_as_a_stock_model(three_layers_dir: str, tmp_path: Path) -> None:
    embedder = tiny_embedder(three_layers_dir, per_path=True, prefix_length=0)
    embedder.save_pretrained(tmp_path / "model", [1], merge_adapters=True)
    stock, processor = (
        kind.from_pretrained(tmp_path / "model" / "backbone") for kind in (AutoModel, AutoProcessor)
    )
    expected = embedder.encode(mixed_inputs(), paths=1)
    for row, embedding in zip(to_raw_inputs(mixed_inputs()), expected, strict=True):
        alone = stock_alone(stock, processor, embedder.encoder.image_token, row, {})
        torch.testing.assert_close(alone, embedding, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(Embedder.from_pretrained(tmp_path / "model").encode(mixed_inputs()), expected)
    with pytest.raises(ValueError, match="merge_adapters takes one path"):
        embedder.save_pretrained(tmp_path / "both", [0, 1], merge_adapters=True)


@pytest.mark.parametrize("adapter", [{"kind": "dora"}, {"scope": "vision"}])
def test_an_adapter_per_path_is_lora_in_the_language_model(adapter: Any) -> None:
    with pytest.raises(ValueError, match="adapter.per_path needs adapter.kind=lora"):
        AdapterConfig(**{**OWN, **adapter})


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
    for today, older in older_paths.items():
        rewrite(target, partial(re.sub, rf"^base_model\.{re.escape(today)}", f"base_model.{older}"))
    return peft_model


def rewrite(folder: Path, rename: Callable[[str], str | None]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(file).items()}
    tensors.pop(None, None)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


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
    inputs = collate(backbone, FAMILY_ROWS[:2])
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


def test_a_published_adapter_is_the_same_however_it_is_loaded(qwen: str, published: Path) -> None:
    """Frozen, beside a backbone in bfloat16, on the meta device, and whatever the encoder's seed."""

    def load(kind: Any = "dora", **options: Any) -> Backbone:
        return load_backbone(
            qwen, adapter=AdapterConfig(kind=kind), initial_adapter=str(published), **options
        )

    trains, frozen, half, meta = load(), load("frozen"), load(dtype="bfloat16"), load(meta=True)
    assert (frozen.adapter.kind, frozen.adapter.dropout, trains.adapter.dropout) == ("frozen", 0.0, 0.1)
    assert meta.adapter == trains.adapter
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    others = (frozen.parameters(), half.parameters(), meta.named_parameters())
    for (name, own), kept, low, (same, empty) in zip(trains.named_parameters(), *others, strict=True):
        assert torch.equal(kept, own)
        assert (same, empty.shape, empty.requires_grad) == (name, own.shape, own.requires_grad)
        if own.requires_grad:
            assert low.dtype == torch.float32
            assert torch.equal(low, own)  # not rounded to the backbone's dtype
    first, other = (ParallelEncoder(load(), num_paths=2, seed=seed).eval() for seed in (0, 5))
    inputs = collate(trains, FAMILY_ROWS[:2])
    assert torch.equal(first(inputs), other(inputs))


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
