"""Every backbone family, and one that is not in the table, passes the same battery.

Tiny random weights in stock classes, saved and loaded by folder name. The slow obvious version is the stock
model on one row alone, tokenised by the stock processor: no padding, no other rows, one path, the prefix as
an already filled cache. fp32 sums in another order differ by about 1e-6 here; 1e-5 leaves room for that and
for nothing else.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoProcessor, DynamicCache
from transformers.utils import logging

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, EncoderInputs, RawInput
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.model.adapters import adapted_layers
from parallel_decoupling.model.backbone import AdapterConfig, Backbone, load_backbone
from parallel_decoupling.model.encoder import Encoder, ParallelEncoder
from parallel_decoupling.model.families import FAMILIES, Family
from parallel_decoupling.model.identity import load_trainable_state, trainable_state
from tests.support.families import TEXT_FAMILIES, TINY_FAMILIES, raw_input, save_tiny_family
from tests.support.tiny import noise_image

FROZEN = AdapterConfig(kind="frozen")
UNLISTED = Family()
ROWS = [
    raw_input("read the word"),
    raw_input("what colour is the large triangle?", noise_image(64, 20)),
    raw_input("count the objects", noise_image(20, 60, 1), noise_image(30, 30, 2)),
    raw_input("", noise_image(32, 48, 3)),
]
TEXTS = [
    raw_input("read the word"),
    raw_input("what colour is the large triangle? a red circle left of a small blue square"),
    raw_input("count the objects"),
    raw_input("a"),
]
CLOSE: dict[str, float] = {"rtol": 1e-5, "atol": 1e-5}
VISION_TARGETS = {
    "qwen2_vl": {"qkv", "proj", "fc1", "fc2"},
    "qwen2_5_vl": {"qkv", "proj", "gate_proj", "up_proj", "down_proj"},
    "qwen3_vl": {"qkv", "proj", "linear_fc1", "linear_fc2"},
    "internvl": {"q_proj", "k_proj", "v_proj", "projection_layer", "fc1", "fc2"},
}
LAST_LAYER_UNREAD = ("llava", "llava_next_mistral", "llava_next_vicuna")
CLIP_TARGETS = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}


@pytest.fixture(scope="module", params=[*TINY_FAMILIES, *TEXT_FAMILIES])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    logging.disable_progress_bar()
    return save_tiny_family(name, tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def load(name: str, folder: str) -> Callable[..., Backbone]:
    return partial(load_backbone, folder, family=None if name != "llava" else UNLISTED)


@pytest.fixture(scope="module")
def frozen(load: Callable[..., Backbone]) -> Backbone:
    return load(adapter=FROZEN)


@pytest.fixture(scope="module")
def rows(name: str) -> list[RawInput]:
    return ROWS if name in TINY_FAMILIES else TEXTS


@pytest.fixture(scope="module")
def inputs(frozen: Backbone, rows: list[RawInput]) -> EncoderInputs:
    return collate(frozen, rows)


@pytest.fixture(scope="module")
def stock(folder: str) -> Any:
    return AutoModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(folder: str) -> Any:
    return AutoProcessor.from_pretrained(folder)


def collate(model: Backbone | Encoder, rows: list[RawInput]) -> EncoderInputs:
    return Collator(model.processor, image_token=model.image_token).encode_inputs(rows)


def encoder_of(backbone: Backbone, **options: Any) -> ParallelEncoder:
    return ParallelEncoder(backbone, **{"num_paths": 3, "prefix_length": 4, **options})


def stock_alone(
    stock: Any, processor: Any, image_token: str, row: RawInput, prefix: Mapping[int, Tensor]
) -> Tensor:
    """The slow version: one row, one path, the last token's unit state.

    ``prefix`` has keys and values ``[2, K, P, H]`` by layer, which fill a cache. What a token sees is said
    token by token: the prefix, also in front of a window, and the tokens up to itself.
    """
    text = row.text.replace(IMAGE_PLACEHOLDER, image_token)
    images = {"images": [list(row.images)]} if row.images else {}
    data = dict(processor(text=[text], **images, return_tensors="pt"))
    if not prefix:
        return F.normalize(stock(**data).last_hidden_state[0, -1], dim=-1)
    ids, mask = data["input_ids"], data.pop("attention_mask")
    length = ids.shape[1]
    positions = torch.arange(length)[None]
    if hasattr(stock, "get_rope_index"):
        types, grid = data["mm_token_type_ids"], data.get("image_grid_thw")
        positions, _ = stock.get_rope_index(ids, types, image_grid_thw=grid, attention_mask=mask)
    cache = DynamicCache()
    for layer, (key, value) in prefix.items():
        cache.update(key[None], value[None], layer)

    def explicit_mask(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        slots = prefix[module.layer_idx].shape[2] if module.layer_idx in prefix else 0
        window = getattr(module, "sliding_window", None) or length
        sees = [
            [True] * slots + [0 <= query - key < window for key in range(length)] for query in range(length)
        ]
        return args, {**kwargs, "attention_mask": torch.tensor(sees).float().log()[None, None]}

    attentions = [module for module in stock.get_decoder().modules() if hasattr(module, "layer_idx")]
    hooks = [each.register_forward_pre_hook(explicit_mask, with_kwargs=True) for each in attentions]
    output = stock(**data, position_ids=positions, past_key_values=cache, use_cache=True)
    for hook in hooks:
        hook.remove()
    return F.normalize(output.last_hidden_state[0, -1], dim=-1)


@torch.no_grad()
def test_without_prefix_rows_equal_the_stock_model(
    frozen: Backbone, rows: list[RawInput], inputs: EncoderInputs, stock: Any, processor: Any
) -> None:
    embeddings = encoder_of(frozen, num_paths=1, prefix_length=0)(inputs)
    for row, embedding in zip(rows, embeddings[:, 0], strict=True):
        torch.testing.assert_close(
            embedding, stock_alone(stock, processor, frozen.image_token, row, {}), **CLOSE
        )


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_paths_of_a_mixed_batch_equal_the_stock_model_with_a_filled_cache(
    frozen: Backbone,
    rows: list[RawInput],
    stock: Any,
    processor: Any,
    side: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frozen.processor.tokenizer, "padding_side", side)
    inputs = collate(frozen, rows)
    assert inputs.tokens["attention_mask"][0, 0 if side == "left" else -1] == 0
    encoder = encoder_of(frozen)
    assert encoder.prefixes is not None
    embeddings = encoder(inputs)
    for path, prefix in enumerate(encoder.prefixes.key_values):
        for row, embedding in zip(rows, embeddings[:, path], strict=True):
            expected = stock_alone(stock, processor, frozen.image_token, row, dict(enumerate(prefix)))
            torch.testing.assert_close(embedding, expected, **CLOSE)
    assert not torch.allclose(embeddings[:, 0], embeddings[:, 1], atol=1e-2)


@pytest.mark.parametrize("prefix_layers", [0, 1])
@torch.no_grad()
def test_n_paths_in_one_pass_equal_n_passes(
    frozen: Backbone, inputs: EncoderInputs, prefix_layers: int
) -> None:
    encoder = encoder_of(frozen, prefix_layers=prefix_layers)
    together = encoder(inputs)
    apart = torch.cat([encoder(inputs, [path]) for path in range(3)], dim=1)
    torch.testing.assert_close(together, apart, **CLOSE)
    torch.testing.assert_close(encoder(inputs, [2, 0]), together[:, [2, 0]], **CLOSE)
    with pytest.raises(ValueError, match="0 to 2"):
        encoder(inputs, [3])


@torch.no_grad()
def test_batch_of_one_equals_batch_of_many(
    frozen: Backbone, rows: list[RawInput], inputs: EncoderInputs
) -> None:
    encoder = encoder_of(frozen)
    together = encoder(inputs)
    for index, row in enumerate(rows):
        torch.testing.assert_close(encoder(collate(frozen, [row]))[0], together[index], **CLOSE)
    torch.testing.assert_close(encoder(inputs.select([2, 1])), together[[2, 1]], **CLOSE)


@torch.no_grad()
def test_eager_attention_and_a_second_batch_agree(
    load: Callable[..., Backbone], frozen: Backbone, rows: list[RawInput], inputs: EncoderInputs
) -> None:
    encoder, eager = encoder_of(frozen), encoder_of(load(adapter=FROZEN, attention="eager"))
    first = encoder(inputs)
    torch.testing.assert_close(eager(inputs), first, **CLOSE)
    encoder(collate(frozen, [rows[3], rows[0]]))  # other sizes in between must leave nothing behind
    assert torch.equal(encoder(inputs), first)


def test_vision_tower_runs_once_and_lower_layers_see_each_row_once(
    frozen: Backbone, inputs: EncoderInputs
) -> None:
    seen: list[int] = []
    vision: list[None] = []
    layers = list(frozen.layers)
    tower = frozen.vision_tower
    handles = [tower.register_forward_hook(lambda *_: vision.append(None))]
    handles += [layer.register_forward_hook(lambda *call: seen.append(len(call[2]))) for layer in layers]
    encoder_of(frozen, prefix_layers=1, prefix_init="random")(inputs)
    for handle in handles:
        handle.remove()
    assert len(vision) == any(inputs.vision)
    assert seen[-len(layers) :] == [len(inputs)] + [3 * len(inputs)] * (len(layers) - 1)


def gradients(encoder: ParallelEncoder, passes: list[list[int]], inputs: EncoderInputs) -> dict[str, Any]:
    weight = torch.randn(len(inputs), 3, encoder.embed_dim, generator=torch.Generator().manual_seed(0))
    for paths in passes:
        (encoder(inputs, paths) * weight[:, paths]).sum().backward()
    return {name: parameter.grad for name, parameter in encoder.named_parameters()}


@pytest.mark.parametrize("prefix_layers", [0, 1])
def test_gradients_equal_with_checkpointing_and_with_separate_passes(
    load: Callable[..., Backbone], inputs: EncoderInputs, prefix_layers: int
) -> None:
    def make(**options: Any) -> ParallelEncoder:
        return encoder_of(load(adapter=AdapterConfig(kind="full"), **options), prefix_layers=prefix_layers)

    calls: list[None] = []
    plain = gradients(make(), [[0, 1, 2]], inputs)
    recomputing = make(gradient_checkpointing=True)
    recomputing.backbone.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    checkpointed = gradients(recomputing, [[0, 1, 2]], inputs)
    assert len(calls) == 2
    apart = gradients(make(), [[0], [1], [2]], inputs)
    assert plain["prefixes.key_values"].abs().sum() > 0
    for parameter, gradient in plain.items():
        if gradient is None:  # a layer of the vision tower above the one that is read
            assert checkpointed[parameter] is None
            assert apart[parameter] is None
            continue
        torch.testing.assert_close(checkpointed[parameter], gradient, rtol=1e-5, atol=1e-6, msg=parameter)
        torch.testing.assert_close(apart[parameter], gradient, rtol=1e-3, atol=1e-4, msg=parameter)


@pytest.mark.parametrize("kind", ["frozen", "lora", "dora", "full"])
def test_training_step_and_checkpoint_round_trip(
    load: Callable[..., Backbone], name: str, inputs: EncoderInputs, kind: Any
) -> None:
    adapter = AdapterConfig(kind=kind, scope="both" if name in TINY_FAMILIES else "language")
    encoder = encoder_of(load(adapter=adapter), num_paths=2)
    before = {key: parameter.detach().clone() for key, parameter in encoder.named_parameters()}
    trainable = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0)

    def loss() -> Tensor:
        paths_NBD = encoder(inputs).transpose(0, 1)
        scores = paths_NBD @ paths_NBD.roll(1, 0).transpose(1, 2) / 0.1
        return F.cross_entropy(scores.flatten(0, 1), torch.arange(len(inputs)).repeat(2))

    for _ in range(2):  # LoRA's first step moves B alone, as B starts at zero
        first = loss()
        optimizer.zero_grad()
        first.backward()
        optimizer.step()
    tower = encoder.backbone.family.vision_module or "no tower"
    if kind != "full":  # LLaVA reads the last but one layer of its vision tower
        tower = "vision_tower.encoder.layers.1." if name in LAST_LAYER_UNREAD else "no tower"
    for key, parameter in encoder.named_parameters():
        moved = not torch.equal(parameter, before[key])
        if parameter.grad is not None:
            assert moved or (kind == "full" and not parameter.grad.any()), key
        else:  # frozen, or above the layer of the vision tower that is read
            assert not moved
            assert not parameter.requires_grad or tower in key, key
    state = trainable_state(encoder)
    again = encoder_of(load(adapter=adapter), num_paths=2, seed=7)
    load_trainable_state(again, state)
    assert torch.equal(again(inputs), encoder(inputs))
    assert not torch.allclose(first, loss())


@torch.no_grad()
def test_paths_with_adapters_of_their_own(load: Callable[..., Backbone], inputs: EncoderInputs) -> None:
    encoder = encoder_of(load(adapter=AdapterConfig(per_path=True)))
    shared = encoder(inputs)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in encoder.named_parameters():
        if "path_lora" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    together = encoder(inputs)
    apart = torch.cat([encoder(inputs, [path]) for path in range(3)], dim=1)
    torch.testing.assert_close(together, apart, **CLOSE)
    assert (together - shared).abs().amax(dim=(0, 2)).min() > 1e-2


@pytest.mark.parametrize("scope", ["language", "vision", "both"])
def test_adapters_go_where_the_scope_says(load: Callable[..., Backbone], name: str, scope: Any) -> None:
    if name in TEXT_FAMILIES and scope != "language":
        with pytest.raises(ValueError, match=f"adapter.scope={scope}: the backbone has no vision tower"):
            load(adapter=AdapterConfig(scope=scope))
        return
    backbone = load(adapter=AdapterConfig(scope=scope))
    family, base = backbone.family, backbone.base
    vision = VISION_TARGETS.get(name, CLIP_TARGETS)
    roots = {"language": family.language_module, "vision": family.vision_module}
    expected = set()
    for part, targets in (("language", set(family.language_targets)), ("vision", vision)):
        if scope in (part, "both"):
            root = roots[part] or "layers"
            found = {path.rsplit(".", 1)[-1] for path in adapted_layers(backbone.base) if root in path}
            assert found == targets
            expected.add(root)
    assert {path.split(".")[0] for path in adapted_layers(backbone.base)} == expected
    trains = {path.split(".")[0] for path, p in base.named_parameters() if p.requires_grad}
    assert trains == expected


def test_meta_backbone_has_the_shapes_of_the_loaded_one(folder: str, frozen: Backbone, name: str) -> None:
    meta = load_backbone(folder, adapter=FROZEN, family=UNLISTED if name == "llava" else None, meta=True)
    shapes = {path: p.shape for path, p in meta.named_parameters()}
    assert shapes == {path: p.shape for path, p in frozen.named_parameters()}
    assert len(frozen.layers) == frozen.num_layers


def test_bfloat16_gives_unit_fp32_embeddings_near_those_of_fp32(
    load: Callable[..., Backbone], frozen: Backbone, inputs: EncoderInputs
) -> None:
    half = encoder_of(load(adapter=FROZEN, dtype="bfloat16"))
    embeddings = half(inputs)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(len(inputs), 3))
    assert F.cosine_similarity(embeddings, encoder_of(frozen)(inputs), dim=-1).min() > 0.9


@pytest.mark.parametrize("llava_name", ["llava_next_mistral", "llava_next_vicuna", "llava_onevision"])
def test_older_names_of_published_weights_load(llava_name: str, tmp_path: Path) -> None:
    """Towers lost a level of their paths in transformers 5; files on the hub, and an older head, have it."""
    folder = save_tiny_family(llava_name, tmp_path)
    saved = load_backbone(folder, adapter=FROZEN)
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {key.replace("vision_tower.", "vision_tower.vision_model."): w for key, w in weights.items()}
    assert renamed.keys() != weights.keys()
    renamed["language_model.lm_head.weight"] = torch.zeros(2, 32)
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    published = load_backbone(folder, adapter=FROZEN)
    for own, other in zip(published.parameters(), saved.parameters(), strict=True):
        assert torch.equal(own, other)


def test_every_family_of_the_table_is_tested() -> None:
    tested = {build()[1].model_type for build in {**TINY_FAMILIES, **TEXT_FAMILIES}.values()}
    assert tested == {*FAMILIES, "llava"}


def test_deepstack_features_reach_every_path(tmp_path: Path) -> None:
    """With the image features between the layers taken away, Qwen3-VL's embeddings change in all paths."""
    backbone = load_backbone(save_tiny_family("qwen3_vl", tmp_path), adapter=FROZEN)
    inputs = collate(backbone, ROWS)
    for prefix_layers in (0, 1):
        encoder = encoder_of(backbone, prefix_layers=prefix_layers)
        full = encoder(inputs)
        language: Any = backbone.language_model
        process = language._deepstack_process
        language._deepstack_process = lambda hidden, mask, visual: hidden
        without = encoder(inputs)
        language._deepstack_process = process
        assert torch.equal(without[0], full[0])  # the row without an image
        assert (without[1:] - full[1:]).abs().amax(-1).min() > 1e-3
