"""Prefix attention against a pre-filled key/value cache in the stock model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.flex_attention as flex_integration
import transformers.modeling_flash_attention_utils as flash_utils
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers import AutoModel, DynamicCache, masking_utils

from parallel_decoupling.batch import EncoderInputs
from parallel_decoupling.model.attention import (
    prefix_attention,
)
from parallel_decoupling.model.backbone import AdapterConfig, Backbone, load_backbone
from parallel_decoupling.model.prefixes import DeepPrefixes, init_random
from tests.model.test_families import TEXTS, collate
from tests.support.families import save_tiny_family
from tests.support.tiny import noise_image, tiny_inputs

FROZEN = AdapterConfig(kind="frozen")
ROWS = [
    ("<|image_pad|>what colour is the large triangle?", [noise_image(64, 64)]),
    ("read the word", []),
    ("<|image_pad|>a red circle<|image_pad|>", [noise_image(32, 64, 1), noise_image(64, 32, 2)]),
]
OTHER_SIZES = [
    ("count the objects<|image_pad|>", [noise_image(48, 32, 3)]),
    ("<|image_pad|>", [noise_image(64, 16, 4)]),
]


def random_prefixes(
    backbone: Backbone, *, num_paths: int = 3, length: int = 5, num_layers: int = 2
) -> DeepPrefixes:
    heads, size = backbone.num_key_value_heads, backbone.head_dim
    prefixes = DeepPrefixes((num_paths, num_layers, 2, heads, length, size))
    init_random(prefixes.key_values, torch.ones(()), torch.Generator().manual_seed(1))
    return prefixes


def join(inputs: EncoderInputs) -> dict[str, Tensor]:
    keys = {key for row in inputs.vision for key in row}
    return {key: torch.cat([row[key] for row in inputs.vision if key in row]) for key in keys}


def forward_with_cache(stock: Any, inputs: EncoderInputs, key_values: Tensor) -> Tensor:
    """Slow version: one path, the prefix as an already filled cache of the stock model."""
    mask, vision = inputs.tokens["attention_mask"], join(inputs)
    batch_size = len(inputs)
    cache = DynamicCache(config=stock.config.get_text_config())
    for index, (key, value) in enumerate(key_values):
        cache.update(key.expand(batch_size, -1, -1, -1), value.expand(batch_size, -1, -1, -1), index)
    positions, _ = stock.get_rope_index(
        inputs.tokens["input_ids"],
        mm_token_type_ids=inputs.tokens["mm_token_type_ids"],
        image_grid_thw=vision.get("image_grid_thw"),
        attention_mask=mask,
    )
    output = stock(
        input_ids=inputs.tokens["input_ids"],
        attention_mask=torch.cat((mask.new_ones(batch_size, key_values.shape[3]), mask), dim=1),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        **vision,
    )
    return output.last_hidden_state * mask[..., None]


def test_prefix_gradient_equals_that_of_the_filled_cache(tiny_backbone_dir: str) -> None:
    backbone = load_backbone(tiny_backbone_dir, adapter=FROZEN)
    stock = AutoModel.from_pretrained(tiny_backbone_dir, attn_implementation="sdpa")
    prefixes = random_prefixes(backbone)
    inputs = tiny_inputs(backbone.processor, ROWS)
    real = inputs.tokens["attention_mask"][..., None]
    hidden = backbone(inputs.tokens, join(inputs), prefixes.states(range(3), 0, torch.float32))
    weight = torch.randn(3, len(ROWS), *hidden.shape[1:])
    (hidden.unflatten(0, (3, -1)) * real * weight).sum().backward()
    for path in range(3):
        key_values = prefixes.key_values[path].detach().requires_grad_()
        (forward_with_cache(stock, inputs, key_values) * weight[path]).sum().backward()
        torch.testing.assert_close(prefixes.key_values.grad[path], key_values.grad, rtol=1e-4, atol=1e-4)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    causal: bool,
    **_: Any,
) -> Tensor:
    """What FlashAttention documents: sequence after sequence, the causal mask aligned to the last key."""
    assert causal
    outputs = []
    bounds = list(zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True))
    for (query_start, key_start), (query_stop, key_stop) in zip(bounds, bounds[1:], strict=False):
        queries = query[query_start:query_stop].transpose(0, 1)
        keys, values = (part[key_start:key_stop].transpose(0, 1) for part in (key, value))
        sizes = queries.shape[1], keys.shape[1]
        mask = torch.ones(*sizes, dtype=torch.bool).tril(sizes[1] - sizes[0])
        output = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=softmax_scale, enable_gqa=True
        )
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


def even_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """The same for sequences of one length, ``[B, L, heads, H]``."""
    ends = [torch.tensor([0, part.shape[1]]) for part in (query, key)]
    options |= {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1]}
    rows = zip(query, key, value, strict=True)
    return torch.stack([packed_attention(*row, **options) for row in rows])


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention's two kernels written in torch, under all that transformers does around them."""
    kernels = (even_attention, packed_attention, None, flash_utils._pad_input, flash_utils._unpad_input)

    def options(**given: Any) -> dict[str, Any]:
        return {"causal": given["is_causal"], "softmax_scale": given["softmax_scale"]}

    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda _: (kernels, (options, options)))


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flex attention's compiled kernel written in torch, under all that transformers does around it."""

    def dense(
        query: Tensor, key: Tensor, value: Tensor, *, block_mask: Any, scale: float, **_: Any
    ) -> Tensor:
        rows, _, length, _ = query.shape
        assert block_mask.shape == (rows, 1, length, key.shape[2])
        mask = create_mask(block_mask.mask_mod, rows, 1, length, key.shape[2], device="cpu")
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)

    def uncompiled(*args: Any, _compile: bool = False, **options: Any) -> Any:
        return create_block_mask(*args, **options)

    monkeypatch.setattr(flex_integration, "compile_friendly_flex_attention", dense)
    monkeypatch.setattr(masking_utils, "create_block_mask", uncompiled)


@pytest.mark.parametrize("first_layer", [0, 1])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("rows", [ROWS, ROWS[1:2]])
@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_gpu_attention_equals_sdpa(
    tiny_backbone_dir: str,
    flash: None,
    flex: None,
    attention: str,
    rows: Any,
    padding_side: str,
    first_layer: int,
) -> None:
    backbone = load_backbone(tiny_backbone_dir, adapter=FROZEN)
    prefixes = random_prefixes(backbone, num_layers=2 - first_layer)
    inputs = tiny_inputs(backbone.processor, rows, padding_side=padding_side)

    def hidden() -> Tensor:
        states = prefixes.states(range(3), first_layer, torch.float32)
        real = inputs.tokens["attention_mask"].repeat(3, 1)[..., None]
        return backbone(inputs.tokens, join(inputs), states) * real

    expected = hidden()
    name = prefix_attention(attention)
    backbone.language_model.config._attn_implementation_internal = name  # loading flash would ask for a GPU
    torch.testing.assert_close(hidden(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_gpu_attention_shows_the_prefix_in_front_of_every_window(
    tmp_path: Path, flash: None, flex: None, attention: str
) -> None:
    backbone = load_backbone(save_tiny_family("gemma3_text", tmp_path), adapter=FROZEN)
    prefixes = random_prefixes(backbone, num_layers=3)
    short, long = collate(backbone, [TEXTS[0], TEXTS[3]]), collate(backbone, TEXTS)
    window = backbone.config.sliding_window = short.tokens["input_ids"].shape[1]
    for layer in backbone.layers:
        layer.self_attn.sliding_window = layer.self_attn.sliding_window and window

    def hidden(inputs: EncoderInputs) -> Tensor:
        real = inputs.tokens["attention_mask"].repeat(3, 1)[..., None]
        return backbone(inputs.tokens, {}, prefixes.states(range(3), 0, torch.float32)) * real

    expected = [hidden(inputs) for inputs in (short, long)]
    backbone.config._attn_implementation_internal = prefix_attention(attention)
    torch.testing.assert_close(hidden(short), expected[0], rtol=1e-5, atol=1e-5)
    if attention == "flash_attention_2":
        with pytest.raises(ValueError, match=f"texts of .* a window of {window}: use attention='sdpa'"):
            hidden(long)
    else:
        torch.testing.assert_close(hidden(long), expected[1], rtol=1e-5, atol=1e-5)
