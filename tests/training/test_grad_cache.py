"""Chunks against one graph, on a toy encoder with dropout."""

from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from parallel_decoupling.batch import EncoderInputs
from parallel_decoupling.training.grad_cache import LENGTH_GROUPS, encode_in_chunks, length_groups

ROWS, LENGTH, PATHS, WIDTH = 7, 5, 2, 6


class ToyEncoder(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(WIDTH, PATHS * WIDTH)

    def forward(self, inputs: EncoderInputs) -> Tensor:
        mask_BL1 = inputs.tokens["attention_mask"][..., None]
        states = (self.dropout(self.embed(inputs.tokens["input_ids"]).tanh()) * mask_BL1).sum(dim=1)
        return self.project(states).unflatten(1, (PATHS, WIDTH)).float()


def toy_inputs() -> EncoderInputs:
    """Rows of 5, 2, 4, 1, 3, 5 and 2 tokens, padded on the left."""
    ids = torch.randint(1, 20, (ROWS, LENGTH))
    mask = torch.arange(LENGTH) >= LENGTH - torch.tensor([5, 2, 4, 1, 3, 5, 2])[:, None]
    return EncoderInputs({"input_ids": ids * mask, "attention_mask": mask.long()}, ({},) * ROWS)


def loss_of(embeddings: Tensor) -> Tensor:
    scores = torch.einsum("bnd,cnd->nbc", embeddings, embeddings.roll(1, 0))
    return scores.logsumexp(dim=-1).mean() + embeddings.var(dim=0).sum()


def gradients(
    encoder: ToyEncoder, inputs: EncoderInputs, chunk_size: int | None
) -> tuple[Tensor, list[Tensor]]:
    encoder.zero_grad()
    encoding = encode_in_chunks(encoder, inputs, chunk_size=chunk_size, seed_parts=(0, "query"))
    loss = loss_of(encoding.embeddings)
    loss.backward()
    encoding.backward()
    return loss.detach(), [p.grad.clone() for p in encoder.parameters() if p.grad is not None]


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_chunks_give_the_gradient_of_one_graph(chunk_size: int) -> None:
    encoder, inputs = ToyEncoder(dropout=0.0), toy_inputs()
    plain_loss, plain = gradients(encoder, inputs, None)
    loss, chunked = gradients(encoder, inputs, chunk_size)
    torch.testing.assert_close(loss, plain_loss)
    assert len(plain) == len(chunked) == 3
    for one, other in zip(plain, chunked, strict=True):
        torch.testing.assert_close(one, other)


def test_short_rows_are_not_padded_to_long_ones() -> None:
    inputs, shapes = toy_inputs(), []

    def encoder(chunk: EncoderInputs) -> Tensor:
        shapes.append(tuple(chunk.tokens["input_ids"].shape))
        return torch.zeros(len(chunk), PATHS, WIDTH)

    encode_in_chunks(encoder, inputs, chunk_size=2, seed_parts=(0,))
    assert shapes == [(2, 2), (2, 3), (2, 5), (1, 5)]
    shapes.clear()
    encode_in_chunks(encoder, inputs, chunk_size=None, seed_parts=(0,))
    assert len(shapes) == LENGTH_GROUPS
    assert sum(rows * length for rows, length in shapes) == int(inputs.lengths.sum()), "5 lengths at most"


def test_the_second_pass_replays_the_dropout_of_the_first() -> None:
    encoder, inputs = ToyEncoder(dropout=0.5), toy_inputs()
    encoding = encode_in_chunks(encoder, inputs, chunk_size=2, seed_parts=(3, 1, "query"))
    assert encoding.replay is not None
    for rows, chunk_BND in encoding.replay():
        assert torch.equal(chunk_BND, encoding.embeddings[rows])
    other = encode_in_chunks(encoder, inputs, chunk_size=2, seed_parts=(3, 2, "query"))
    assert not torch.equal(other.embeddings, encoding.embeddings)


def test_length_groups_have_the_least_padding_of_all_cuts() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 3, 5):
        for _ in range(20):
            lengths = torch.randint(1, 9, (8,), generator=generator)
            groups = length_groups(lengths, count)
            assert sorted(row for rows in groups for row in rows) == list(range(8))
            assert len(groups) == count
            ordered = lengths.sort().values
            cuts = combinations(range(1, 8), count - 1)
            padded = [
                sum(len(part) * int(part[-1]) for part in ordered.tensor_split(list(cut))) for cut in cuts
            ]
            assert sum(len(rows) * int(lengths[rows].max()) for rows in groups) == min(padded)
    assert length_groups(torch.tensor([4, 4]), 5) == [[0], [1]], "never more groups than rows"


class AdaptedEncoder(ToyEncoder):
    """The toy with a frozen linear layer and LoRA's two small ones beside it, both trained in fp32."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.embed.requires_grad_(False)
        self.project.requires_grad_(False)
        self.lora_A = nn.Linear(WIDTH, 3, bias=False)
        self.lora_B = nn.Linear(3, PATHS * WIDTH, bias=False)

    def forward(self, inputs: EncoderInputs) -> Tensor:
        states = self.embed(inputs.tokens["input_ids"]).tanh() * inputs.tokens["attention_mask"][..., None]
        pooled = states.sum(dim=1)
        return (self.project(pooled) + self.lora_B(self.lora_A(pooled))).unflatten(1, (PATHS, WIDTH)).float()


def test_autocast_weights_of_the_first_pass_do_not_cut_off_the_second() -> None:
    """Guards torch up to 2.9 (before PyTorch PR 165068), whose cache kept casts made under ``no_grad``."""
    encoder, inputs = AdaptedEncoder(), toy_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        _, plain = gradients(encoder, inputs, None)
    with torch.autocast("cpu", torch.bfloat16):
        _, chunked = gradients(encoder, inputs, 3)
    assert len(plain) == len(chunked) == 2, "lora_A and lora_B"
    for one, other in zip(plain, chunked, strict=True):
        assert one.abs().max() > 0.1
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02)
