"""Where prefixes enter: at the input alone (prompt tuning), or in a range of layers; how they start."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel

from parallel_decoupling.batch import EncoderInputs
from parallel_decoupling.model.backbone import AdapterConfig, load_backbone
from parallel_decoupling.model.encoder import ParallelEncoder
from parallel_decoupling.model.prefixes import prefix_range
from tests.model.test_encoder import OTHER_SIZES, ROWS, make, rows_of
from tests.support.embedders import tiny_embedder


def stock_with_prompt(stock: Any, inputs: EncoderInputs, prompt_PD: Tensor) -> Tensor:
    """Slow version: one row after the other, [prompt embeddings; token embeddings] in one sequence."""
    embeddings = []
    for row, vision in enumerate(inputs.vision):
        real = inputs.tokens["attention_mask"][row].bool()
        ids_1L = inputs.tokens["input_ids"][row, real].unsqueeze(0)
        tokens_1LD = stock.get_input_embeddings()(ids_1L)
        if vision:
            features = stock.get_image_features(vision["pixel_values"], vision["image_grid_thw"])
            pictures = torch.cat(list(features.pooler_output))
            tokens_1LD = tokens_1LD.masked_scatter(
                (ids_1L == stock.config.image_token_id)[..., None], pictures
            )
        positions, _ = stock.get_rope_index(
            ids_1L,
            mm_token_type_ids=inputs.tokens["mm_token_type_ids"][row, real].unsqueeze(0),
            image_grid_thw=vision.get("image_grid_thw"),
        )
        of_prompt = torch.arange(len(prompt_PD)).expand(3, 1, -1)
        length = len(prompt_PD) + ids_1L.shape[1]
        output = stock.language_model(
            inputs_embeds=torch.cat((prompt_PD[None], tokens_1LD), dim=1),
            position_ids=torch.cat((of_prompt, positions), dim=2),
            # the order in the sequence, not the positions, says what a token may see
            attention_mask=torch.ones(length, length).tril().log()[None, None],
        )
        embeddings.append(F.normalize(output.last_hidden_state[0, -1], dim=-1))
    return torch.stack(embeddings)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_shallow_prompt_equals_the_stock_model_on_prompt_and_tokens(
    tiny_backbone_dir: str, attention: str, padding_side: str
) -> None:
    options: dict[str, Any] = {"num_paths": 3, "prefix_length": 4, "prefix_init": "random"}
    encoder = make(tiny_backbone_dir, prefix_type="shallow", attention=attention, **options)
    stock = AutoModel.from_pretrained(tiny_backbone_dir, attn_implementation=attention)
    for rows in (ROWS, OTHER_SIZES):
        inputs = rows_of(encoder, rows, padding_side=padding_side)
        embeddings = encoder(inputs)
        for path in range(3):
            expected = stock_with_prompt(stock, inputs, encoder.prefixes.embeddings[path])
            torch.testing.assert_close(embeddings[:, path], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                encoder(inputs, [path])[:, 0], embeddings[:, path], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_of_a_shallow_prompt_is_that_of_the_stock_model(
    tiny_backbone_dir: str, checkpointing: bool
) -> None:
    backbone = load_backbone(
        tiny_backbone_dir, adapter=AdapterConfig(kind="full"), gradient_checkpointing=checkpointing
    )
    encoder = ParallelEncoder(backbone, num_paths=2, prefix_length=4, prefix_type="shallow")
    stock = AutoModel.from_pretrained(tiny_backbone_dir, attn_implementation="sdpa")
    inputs, weight = rows_of(encoder), torch.randn(3, 2, 32)
    assert encoder.training
    (encoder(inputs) * weight).sum().backward()
    assert all(module.training for module in backbone.modules())
    for path in range(2):
        prompt_PD = encoder.prefixes.embeddings[path].detach().requires_grad_()
        (stock_with_prompt(stock, inputs, prompt_PD) * weight[:, path]).sum().backward()
        torch.testing.assert_close(
            encoder.prefixes.embeddings.grad[path], prompt_PD.grad, rtol=1e-3, atol=1e-4
        )
    for (name, parameter), other in zip(backbone.base.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_shallow_and_deep_start_as_one_model_from_meta_prompts(tiny_backbone_dir: str) -> None:
    shallow, deep = (make(tiny_backbone_dir, num_paths=4, prefix_type=kind) for kind in ("shallow", "deep"))
    inputs = rows_of(shallow)
    torch.testing.assert_close(shallow(inputs), deep(inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["shallow", "deep"])
def test_half_precision_and_autocast_give_fp32_near_single(tiny_backbone_dir: str, kind: Any) -> None:
    options = {"kind": "dora", "aggregation": "learned", "prefix_type": kind}
    exact, bfloat, half = (
        tiny_embedder(tiny_backbone_dir, **options, loading={"dtype": dtype}).encoder
        for dtype in ("float32", "bfloat16", "float16")
    )
    inputs = rows_of(exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = exact(inputs)
    for encoder, other in ((exact, mixed), (bfloat, bfloat(inputs)), (half, half(inputs))):
        for found, wanted in (
            (other, exact(inputs)),
            (encoder.aggregate(other), exact.aggregate(exact(inputs))),
        ):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.norm(dim=-1), torch.ones(found.shape[:-1]))
            assert F.cosine_similarity(found, wanted, dim=-1).min() > 0.98
    bfloat(inputs).sum().backward()
    (parameter,) = bfloat.prefixes.parameters()
    assert parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ["shallow", "deep"])
def test_a_random_path_is_the_same_whatever_the_number_of_paths(tiny_backbone_dir: str, kind: Any) -> None:
    options = {"prefix_type": kind, "prefix_init": "random"}
    few, many = (
        next(make(tiny_backbone_dir, num_paths=number, **options).prefixes.parameters()) for number in (2, 5)
    )
    assert torch.equal(few, many[:2])
    assert not torch.equal(few[0], few[1])


@pytest.mark.parametrize(
    ("prefix_layers", "layers"),
    [(0, [0, 1, 2]), (2, [2]), ([0, 3], [0, 1, 2]), ([0, 1], [0]), ((1, 2), [1]), ([1, 3], [1, 2])],
)
def test_layers_with_a_prefix(prefix_layers: Any, layers: list[int]) -> None:
    assert list(prefix_range(prefix_layers, 3)) == layers


@pytest.mark.parametrize("prefix_layers", [3, -1, [1, 1], [2, 1], [0, 4], [-1, 2], [1], [0, 1, 2]])
def test_layers_that_do_not_exist_raise(prefix_layers: Any) -> None:
    with pytest.raises(ValueError, match=r"0 to 2 .* stop <= 3; got"):
        prefix_range(prefix_layers, 3)
