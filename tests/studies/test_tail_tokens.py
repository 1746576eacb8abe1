"""The rival arm with trained tokens at the end of one pass."""

import torch
import torch.nn.functional as F
from PIL import Image

from parallel_decoupling.batch import EncoderInputs
from parallel_decoupling.model.backbone import load_backbone
from studies.tail_tokens import TailTokenEncoder


def test_tail_tokens_equal_the_stock_backbone_on_embeddings_with_the_tail_behind_them() -> None:
    encoder = TailTokenEncoder(load_backbone("tiny"), num_tokens=3, seed=0).eval()
    texts = ["a red circle", "the blue square left of a star"]
    tokens = dict(encoder.processor(text=texts, padding=True, return_tensors="pt"))
    embeddings_BND = encoder(EncoderInputs(tokens, ({}, {})))

    assert embeddings_BND.shape == (2, 3, encoder.embed_dim)
    base = encoder.backbone.base
    for row, text in enumerate(texts):
        ids = encoder.processor(text=[text], return_tensors="pt")["input_ids"]
        embedded_1LD = base.get_input_embeddings()(ids)
        tailed_1LD = torch.cat((embedded_1LD, encoder.tail[None]), dim=1)
        states_1LD = base(inputs_embeds=tailed_1LD, use_cache=False).last_hidden_state
        torch.testing.assert_close(embeddings_BND[row], F.normalize(states_1LD[0, -3:], dim=-1))


def test_every_tail_token_learns_from_its_embedding_alone_and_from_those_before_it() -> None:
    encoder = TailTokenEncoder(load_backbone("tiny"), num_tokens=3, seed=0)
    tokens = dict(encoder.processor(text=["a red circle"], return_tensors="pt"))
    encoder(EncoderInputs(tokens, ({},)))[0, 1].sum().backward()

    assert encoder.tail.grad is not None
    assert [bool(row.any()) for row in encoder.tail.grad] == [True, True, False]


def test_a_row_with_a_picture_does_not_depend_on_its_neighbours() -> None:
    encoder = TailTokenEncoder(load_backbone("tiny"), num_tokens=2, seed=0).eval()
    picture = Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1), 20).convert("RGB")
    mixed = [f"{encoder.image_token} what is it", "a text that is longer than the other one by some words"]
    both = dict(encoder.processor(text=mixed, images=[picture], padding=True, return_tensors="pt"))
    alone = dict(encoder.processor(text=mixed[:1], images=[picture], return_tensors="pt"))
    vision = {name: both.pop(name) for name in ("pixel_values", "image_grid_thw")}
    own = {name: alone.pop(name) for name in ("pixel_values", "image_grid_thw")}

    embeddings_BND = encoder(EncoderInputs(both, (vision, {})))

    torch.testing.assert_close(embeddings_BND[0], encoder(EncoderInputs(alone, (own,)))[0])
