from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.flex_attention as flex_integration
import transformers.modeling_flash_attention_utils as flash_utils
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from parallel_decoupling.batch import EncoderInputs
from parallel_decoupling.model.attention import prefix_attention
from parallel_decoupling.model.backbone import AdapterConfig, load_backbone
from parallel_decoupling.model.encoder import ParallelEncoder, nested_dims, truncate
from parallel_decoupling.model.paths import CALL
from parallel_decoupling.model.prefixes import META_PROMPTS
from tests.model.test_attention import FROZEN, ROWS
from tests.support.tiny import tiny_inputs


def make(
    folder: str, *, adapter: AdapterConfig = FROZEN, attention: Any = "sdpa", **options: Any
) -> ParallelEncoder:
    return ParallelEncoder(load_backbone(folder, adapter=adapter, attention=attention), **options)


def rows_of(encoder: ParallelEncoder, rows: Any = ROWS, **options: Any) -> EncoderInputs:
    return tiny_inputs(encoder.processor, rows, **options)


def test_a_forward_leaves_no_trace(tiny_backbone_dir: str) -> None:
    encoder = make(tiny_backbone_dir)
    encoder(rows_of(encoder))
    assert CALL.get() is None
    with pytest.raises(TypeError):  # no input_ids: the stock forward fails half-way
        encoder(EncoderInputs({"attention_mask": torch.ones(1, 2)}, ({},)))
    assert CALL.get() is None


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
    mean, concat, learned = (
        make(tiny_backbone_dir, aggregation=aggregation) for aggregation in ("mean", "concat", "learned")
    )
    expected = torch.stack([sum(row) / torch.stack(list(row)).sum(0).norm() for row in embeddings])
    torch.testing.assert_close(mean.aggregate(embeddings), expected)
    torch.testing.assert_close(learned.aggregate(embeddings), expected)
    assert mean.aggregate_dim == learned.aggregate_dim == 32
    assert concat.aggregate_dim == 128
    together = concat.aggregate(embeddings)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(5))
    aligned = torch.einsum("and,bnd->abn", embeddings, embeddings).mean(-1)
    torch.testing.assert_close(together @ together.T, aligned)
    with torch.no_grad():
        learned.path_logits.copy_(torch.tensor([0.0, 90.0, 0.0, 0.0]))
    torch.testing.assert_close(learned.aggregate(embeddings), embeddings[:, 1])
    for encoder in (mean, concat):
        torch.testing.assert_close(encoder.aggregate(embeddings[:, :1]), embeddings[:, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_paths": 0}, "num_paths must be 1 or more"),
        ({"num_paths": 2, "prefix_length": 0}, "num_paths=1"),
        ({"num_paths": 9}, "prefix_init='random'"),
        ({"aggregation": "sum"}, "aggregation must be 'mean', 'concat' or 'learned'"),
    ],
)
def test_impossible_sizes_raise(tiny_backbone_dir: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tiny_backbone_dir, **options)


def test_unknown_path_raises(tiny_backbone_dir: str, tmp_path: Path) -> None:
    encoder = make(tiny_backbone_dir)
    for paths in ([], [4], [-1], [0.5], [True]):
        with pytest.raises(ValueError, match="0 to 3"):
            encoder(rows_of(encoder), paths)


def test_truncated_paths_are_first_coordinates_of_unit_norm() -> None:
    paths = torch.nn.functional.normalize(torch.randn(4, 3, 8), dim=-1)
    short = truncate(paths, 5)
    torch.testing.assert_close(short, paths[..., :5] / paths[..., :5].norm(dim=-1, keepdim=True))
    torch.testing.assert_close(truncate(paths, 8), paths)
    torch.testing.assert_close(truncate(short, 2), truncate(paths, 2))


def test_nested_dims_are_those_below_the_full_one() -> None:
    assert nested_dims(None, 8) == nested_dims([], 8) == nested_dims([8], 8) == ()
    assert nested_dims([2, 8, 4, 2], 8) == (4, 2)


@pytest.mark.parametrize("dim", [0, 9, -1, 2.0, True])
def test_dimensions_that_do_not_exist_raise(dim: Any) -> None:
    with pytest.raises(ValueError, match="matryoshka_dims.*8 dimensions"):
        nested_dims([4, dim], 8)
