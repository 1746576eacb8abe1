"""The encoder and its prefixes, and prefix attention against a filled key/value cache of the stock model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.flex_attention as flex_integration
import transformers.modeling_flash_attention_utils as flash_utils
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers import AutoModel, PreTrainedModel, masking_utils

from parallel_decoupling.batch import EncoderInputs, RawInput
from parallel_decoupling.model.attention import PathStates, prefix_attention
from parallel_decoupling.model.backbone import AdapterConfig, load_backbone
from parallel_decoupling.model.encoder import ParallelEncoder, nested_dims
from parallel_decoupling.model.paths import CALL
from parallel_decoupling.model.prefixes import META_PROMPTS
from tests.model.test_families import TEXTS, collate, stock_alone
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


def join(inputs: EncoderInputs) -> dict[str, Tensor]:
    keys = {key for row in inputs.vision for key in row}
    return {key: torch.cat([row[key] for row in inputs.vision if key in row]) for key in keys}


def make(
    folder: str, *, adapter: AdapterConfig = FROZEN, attention: Any = "sdpa", **options: Any
) -> ParallelEncoder:
    return ParallelEncoder(load_backbone(folder, adapter=adapter, attention=attention), **options)


def rows_of(encoder: ParallelEncoder, rows: Any = ROWS, **options: Any) -> EncoderInputs:
    return tiny_inputs(encoder.processor, rows, **options)


def hidden(encoder: ParallelEncoder, inputs: EncoderInputs) -> Tensor:
    """The last states ``[N, B, L, D]`` of all real tokens."""
    paths = range(encoder.num_paths)
    states = PathStates(paths, encoder.prefixes.states(paths, encoder.backbone), encoder.prefix_range.start)
    states_NBLD = encoder.backbone(inputs.tokens, join(inputs), states).unflatten(0, (len(paths), -1))
    return states_NBLD * inputs.tokens["attention_mask"][..., None]


def with_attention(encoder: ParallelEncoder, attention: str) -> ParallelEncoder:
    """The encoder itself with another attention; loading flash would ask for a GPU."""
    encoder.backbone.language_model.config._attn_implementation_internal = prefix_attention(attention)
    return encoder


def cached(stock: Any, processor: Any, row: tuple[str, Any], prefix: Mapping[int, Tensor]) -> Tensor:
    """The embedding of a row by the stock model with a filled cache."""
    return stock_alone(stock, processor, "", RawInput(row[0], tuple(row[1])), prefix)


def test_prefix_gradient_equals_that_of_the_filled_cache(tiny_backbone_dir: str) -> None:
    encoder = make(tiny_backbone_dir, num_paths=3, prefix_length=5, prefix_init="random")
    stock = AutoModel.from_pretrained(tiny_backbone_dir, attn_implementation="sdpa")
    weight = torch.randn(len(ROWS), 3, encoder.embed_dim)
    (encoder(rows_of(encoder)) * weight).sum().backward()
    for path, gradient in enumerate(encoder.prefixes.key_values.grad):
        key_values = encoder.prefixes.key_values[path].detach().requires_grad_()
        for row, weight_D in zip(ROWS, weight[:, path], strict=True):
            embedding = cached(stock, encoder.processor, row, dict(enumerate(key_values)))
            (embedding * weight_D).sum().backward()
        torch.testing.assert_close(gradient, key_values.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bounds", [[0, 1], [1, 2], [0, 2], [1, 3]])
@torch.no_grad()
def test_a_range_of_layers_equals_a_cache_in_these_layers(three_layers_dir: str, bounds: list[int]) -> None:
    encoder = make(three_layers_dir, num_paths=2, prefix_length=4, prefix_layers=bounds)
    stock = AutoModel.from_pretrained(three_layers_dir, attn_implementation="sdpa")
    for path, key_values in enumerate(encoder.prefixes.key_values):
        prefix = dict(zip(range(*bounds), key_values, strict=True))
        expected = torch.stack([cached(stock, encoder.processor, row, prefix) for row in ROWS])
        torch.testing.assert_close(encoder(rows_of(encoder))[:, path], expected, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("prefix_layers", [0, 1, [1, 2]])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "flash_attention_2", "flex_attention"])
def test_every_attention_equals_sdpa(
    three_layers_dir: str, flash: None, flex: None, attention: str, padding_side: str, prefix_layers: Any
) -> None:
    encoder = make(three_layers_dir, num_paths=3, prefix_init="random", prefix_layers=prefix_layers)
    inputs = [rows_of(encoder, rows, padding_side=padding_side) for rows in (ROWS, ROWS[1:2])]
    expected = [hidden(encoder, each) for each in inputs]
    with_attention(encoder, attention)
    torch.testing.assert_close([hidden(encoder, each) for each in inputs], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_gpu_attention_shows_the_prefix_in_front_of_every_window(
    tmp_path: Path, flash: None, flex: None, attention: str
) -> None:
    encoder = make(save_tiny_family("gemma3_text", tmp_path), num_paths=3, prefix_init="random")
    backbone = encoder.backbone
    short, long = collate(backbone, [TEXTS[0], TEXTS[3]]), collate(backbone, TEXTS)
    window = backbone.config.sliding_window = short.tokens["input_ids"].shape[1]
    for layer in backbone.layers:
        layer.self_attn.sliding_window = layer.self_attn.sliding_window and window
    expected = [hidden(encoder, inputs) for inputs in (short, long)]
    with_attention(encoder, attention)
    torch.testing.assert_close(hidden(encoder, short), expected[0], rtol=1e-5, atol=1e-5)
    if attention == "flash_attention_2":
        with pytest.raises(ValueError, match=f"texts of .* a window of {window}: use attention='sdpa'"):
            hidden(encoder, long)
    else:
        torch.testing.assert_close(hidden(encoder, long), expected[1], rtol=1e-5, atol=1e-5)


def test_a_forward_leaves_no_trace(tiny_backbone_dir: str) -> None:
    encoder = make(tiny_backbone_dir)
    encoder(rows_of(encoder))
    assert CALL.get() is None
    with pytest.raises(TypeError):  # no input_ids: the stock forward fails half-way
        encoder(EncoderInputs({"attention_mask": torch.ones(1, 2)}, ({},)))
    assert CALL.get() is None


def test_the_last_mlp_runs_on_the_pooled_tokens_alone(three_layers_dir: str) -> None:
    """Slow version: every token through it, gradients included."""
    encoder = make(three_layers_dir, num_paths=2, prefix_init="random")
    inputs, seen = rows_of(encoder), []
    hook = encoder.backbone.layers[-1].mlp.up_proj.register_forward_hook(lambda *args: seen.append(args[2]))
    pooled = encoder(inputs)
    hook.remove()
    assert seen[0].shape[:2] == (2 * len(inputs), 1)
    weight = torch.randn_like(pooled)
    (pooled * weight).sum().backward()
    gradients = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.requires_grad}
    encoder.zero_grad()
    last = inputs.tokens["attention_mask"].cumsum(-1).argmax(-1)
    states_BNLD = hidden(encoder, inputs).transpose(0, 1)
    whole = F.normalize(states_BNLD[torch.arange(len(inputs)), :, last], dim=-1)
    torch.testing.assert_close(pooled, whole, rtol=1e-5, atol=1e-5)
    (whole * weight).sum().backward()
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)


def test_meta_prefixes_equal_the_states_of_their_prompts(three_layers_dir: str) -> None:
    encoder = make(three_layers_dir, num_paths=8, prefix_length=20, prefix_layers=1)
    stock = AutoModel.from_pretrained(three_layers_dir, attn_implementation="sdpa")
    for path, prompt in enumerate(META_PROMPTS):
        text = " ".join([prompt] * 20)
        ids = encoder.processor.tokenizer(text, return_tensors="pt")["input_ids"][:, :20]
        cache = stock(input_ids=ids, use_cache=True).past_key_values
        for layer in (1, 2):
            keys, values = encoder.prefixes.key_values[path, layer - 1]
            torch.testing.assert_close(keys, cache.layers[layer].keys[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(values, cache.layers[layer].values[0], rtol=1e-5, atol=1e-5)


def test_random_prefixes_have_the_scale_of_real_states(tiny_backbone_dir: str) -> None:
    encoder = make(tiny_backbone_dir, prefix_init="random", num_paths=12, prefix_length=16)
    states = [encoder.backbone.text_states(prompt) for prompt in META_PROMPTS]
    for layer in range(2):
        for part in range(2):
            real = torch.cat([state[layer, part].flatten() for state in states]).std()
            ours = encoder.prefixes.key_values[:, layer, part].std()
            torch.testing.assert_close(ours, real, rtol=0.1, atol=0)
    embeddings = encoder(rows_of(encoder))
    assert (embeddings[0] @ embeddings[0].T - torch.eye(12)).max() < 0.999


@pytest.fixture
def no_kernel_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with flash-attn and a GPU: what asks for them passes, both kernels refuse CPU tensors."""

    def kernel(query: Tensor, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(f"no kernel on {query.device}")

    def options(**_: Any) -> dict[str, Any]:
        return {}

    kernels = (kernel, kernel, None, flash_utils._pad_input, flash_utils._unpad_input)
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda _: (kernels, (options, options)))
    monkeypatch.setattr(flex_integration, "compile_friendly_flex_attention", kernel)
    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", lambda _, name, **__: name)


@pytest.mark.parametrize("prefix_init", ["meta", "random"])
@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_prefixes_start_on_the_cpu_without_the_gpu_kernel(
    tiny_backbone_dir: str, no_kernel_on_cpu: None, attention: Any, prefix_init: Any
) -> None:
    loading = {"dtype": "bfloat16", "adapter": FROZEN}
    encoder, plain = (
        ParallelEncoder(
            load_backbone(tiny_backbone_dir, attention=each, **loading), num_paths=3, prefix_init=prefix_init
        )
        for each in (attention, "sdpa")
    )
    assert torch.equal(encoder.prefixes.key_values, plain.prefixes.key_values)
    wanted = prefix_attention(attention)
    assert encoder.backbone.language_model.config._attn_implementation == wanted
    with pytest.raises(RuntimeError, match="no kernel on cpu"):
        encoder(rows_of(encoder, ROWS[1:2]))


def test_seed_decides_random_prefixes_and_adapters(tiny_backbone_dir: str) -> None:
    def trainable(seed: int) -> list[Tensor]:
        torch.rand(seed + 1)
        before = torch.get_rng_state()
        encoder = make(tiny_backbone_dir, adapter=AdapterConfig(), prefix_init="random", seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        named = encoder.named_parameters()
        return [p for name, p in named if p.requires_grad and "lora_B" not in name]  # which starts at zero

    first, again, other = trainable(0), trainable(0), trainable(1)
    assert len(first) == 14 + 1
    for parameter, same, different in zip(first, again, other, strict=True):
        assert torch.equal(parameter, same)
        assert not torch.equal(parameter, different)


@pytest.mark.parametrize(
    ("kind", "adapters"), [("frozen", 0), ("lora", 2 * 7 * 2), ("dora", 3 * 7 * 2), ("full", None)]
)
def test_trainable_names_are_exact(tiny_backbone_dir: str, kind: Any, adapters: int | None) -> None:
    encoder = make(tiny_backbone_dir, adapter=AdapterConfig(kind=kind), aggregation="learned")
    groups = encoder.parameter_groups()
    counted = [groups[name] for name in ("prefixes", "adapters", "aggregation")]
    trainable = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert {id(p) for group in counted for p in group} == {id(p) for p in trainable.values()}
    others = {name for name in trainable if not name.startswith("backbone.base.")}
    assert others == {"prefixes.key_values", "path_logits"}
    expected = len(list(encoder.backbone.parameters())) if adapters is None else adapters
    assert [len(group) for group in counted] == [1, expected, 1]


def test_aggregates_equal_their_definitions(tiny_backbone_dir: str) -> None:
    embeddings = F.normalize(torch.randn(5, 4, 32), dim=-1)
    names = "mean", "concat", "learned", "linear"
    mean, concat, learned, linear = (make(tiny_backbone_dir, aggregation=name) for name in names)
    expected = torch.stack([sum(row) / torch.stack(list(row)).sum(0).norm() for row in embeddings])
    torch.testing.assert_close(mean.aggregate(embeddings), expected)
    for encoder in (learned, linear):
        torch.testing.assert_close(encoder.aggregate(embeddings), expected)
        assert mean.aggregate_dim == encoder.aggregate_dim == 32
    assert concat.aggregate_dim == 128
    together = concat.aggregate(embeddings)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(5))
    aligned = torch.einsum("and,bnd->abn", embeddings, embeddings).mean(-1)
    torch.testing.assert_close(together @ together.T, aligned)
    with torch.no_grad():
        learned.path_logits.copy_(torch.tensor([0.0, 90.0, 0.0, 0.0]))
        linear.path_maps.copy_(torch.randn(4, 32, 32))
    torch.testing.assert_close(learned.aggregate(embeddings), embeddings[:, 1])
    sums = [sum(path @ each for path, each in zip(row, linear.path_maps, strict=True)) for row in embeddings]
    torch.testing.assert_close(linear.aggregate(embeddings), F.normalize(torch.stack(sums), dim=-1))
    for encoder in (mean, concat, learned, linear):
        torch.testing.assert_close(encoder.aggregate(embeddings[:, :1]), embeddings[:, 0])


OWN = AdapterConfig(per_path=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_paths": 0}, "num_paths must be 1 or more"),
        ({"prefix_length": 0}, "unless num_paths=1 or adapter.per_path"),
        ({"num_paths": 9}, "prefix_init='random'"),
        ({"aggregation": "sum"}, "aggregation must be 'mean', 'concat', 'learned' or 'linear'"),
        ({"prefix_type": "broad"}, "prefix_type must be 'deep' or 'shallow'"),
        ({"prefix_type": "shallow", "prefix_layers": [0, 1]}, "set prefix_layers=0"),
        ({"prefix_type": "shallow", "adapter": OWN}, "prefix_type='deep'"),
    ],
)
def test_what_does_not_go_together(tiny_backbone_dir: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tiny_backbone_dir, **options)


def test_nested_dims_are_those_below_the_full_one() -> None:
    assert nested_dims(None, 8) == nested_dims([], 8) == nested_dims([8], 8) == ()
    assert nested_dims([2, 8, 4, 2], 8) == (4, 2)


@pytest.mark.parametrize("dim", [0, 9, -1, 2.0, True])
def test_dimensions_that_do_not_exist_raise(dim: Any) -> None:
    with pytest.raises(ValueError, match="matryoshka_dims.*8 dimensions"):
        nested_dims([4, dim], 8)
