"""One real-size training step on the CPU: run as ``python -m benchmarks.real_size`` from the repository root.

Qwen2-VL-2B in its published size with random bfloat16 weights, LoRA on the language model, prefixes in every
layer, two short rows (a picture with a question; a short answer), InfoNCE on every path and on the aggregate.
Prints each part's seconds over those of the forward pass, and the peak memory of the process over the bytes
of the weights. ``--layers 2`` is a quick try with fewer language layers, whose numbers mean nothing.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModel

from parallel_decoupling.batch import EncoderInputs
from parallel_decoupling.model.adapters import add_adapters
from parallel_decoupling.model.backbone import AdapterConfig, Backbone
from parallel_decoupling.model.encoder import ParallelEncoder
from parallel_decoupling.model.families import FAMILIES
from parallel_decoupling.objective.contrastive import info_nce
from tests.support.published_sizes import PUBLISHED
from tests.support.tiny import tiny_tokenizer

NAME = "Qwen/Qwen2-VL-2B-Instruct"
NUM_PATHS = 3
PREFIX_LENGTH = 8
IMAGE_SIZE = 224
QUESTION_TOKENS = 32
ANSWER_TOKENS = 8
BATCH_SIZE = 2


def main() -> None:
    """Print the table."""
    arguments = parse_arguments()
    torch.manual_seed(0)
    backbone = random_backbone(arguments.layers, arguments.gradient_checkpointing)
    encoder = ParallelEncoder(
        backbone, num_paths=NUM_PATHS, prefix_length=PREFIX_LENGTH, prefix_init="random"
    )
    trainable = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    query, candidate = rows(backbone, with_image=True), rows(backbone, with_image=False)
    print(
        f"{NAME}, {backbone.num_layers} language layers, {millions(encoder.parameters())} M parameters, "
        f"{millions(trainable)} M train; {NUM_PATHS} paths, prefix {PREFIX_LENGTH}; queries {BATCH_SIZE} x "
        f"{int(query.lengths.sum()) // BATCH_SIZE} tokens, candidates {BATCH_SIZE} x "
        f"{int(candidate.lengths.sum()) // BATCH_SIZE}; {torch.get_num_threads()} threads"
    )
    seconds: dict[str, float] = {}
    with timed("forward", seconds):
        loss = objective(encoder, encoder(query), encoder(candidate))
    with timed("backward", seconds):
        loss.backward()
    with timed("optimizer", seconds):
        optimizer.step()
    for part, value in seconds.items():
        print(f"{part + ' / forward':<28}{value / seconds['forward']:>8.2f}{value:>8.1f} s")
    without = [p for p in trainable if p.grad is None]
    print(f"loss {loss.item():.4f}, trainable tensors without a gradient: {len(without)}")
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weights = sum(parameter.numel() * parameter.itemsize for parameter in encoder.parameters())
    print(f"{'peak memory / weights':<28}{peak / weights:>8.2f}{peak / 2**30:>8.2f} GiB")


def parse_arguments() -> argparse.Namespace:
    """Read the two options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=None, help="language layers instead of all 28")
    parser.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def random_backbone(layers: int | None, gradient_checkpointing: bool) -> Backbone:
    """Build the published size with random bfloat16 weights; its tokenizer knows a few hundred words."""
    arguments = dict(PUBLISHED[NAME])
    if layers is not None:
        arguments["text_config"] = {**arguments["text_config"], "num_hidden_layers": layers}
    config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    base = AutoModel.from_config(config, dtype=torch.bfloat16)
    processor = SimpleNamespace(tokenizer=tiny_tokenizer())
    backbone = Backbone(
        base, processor, FAMILIES["qwen2_vl"], name=NAME, gradient_checkpointing=gradient_checkpointing
    )
    add_adapters(base, backbone.family, AdapterConfig(kind="lora", rank=16, alpha=64))
    return backbone.train()


def rows(backbone: Backbone, *, with_image: bool) -> EncoderInputs:
    """Random rows as the processor would make them: an image of 64 tokens and a question, or an answer."""
    config = backbone.config
    patches = IMAGE_SIZE // config.vision_config.patch_size
    image_tokens = patches**2 // config.vision_config.spatial_merge_size**2 if with_image else 0
    length = image_tokens + (QUESTION_TOKENS if with_image else ANSWER_TOKENS)
    ids = torch.randint(0, 1000, (BATCH_SIZE, length))
    ids[:, :image_tokens] = config.image_token_id
    tokens = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
    }
    if not with_image:
        return EncoderInputs(tokens, ({},) * BATCH_SIZE)
    values = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
    vision = {
        "pixel_values": torch.randn(patches**2, values),
        "image_grid_thw": torch.tensor([[1, patches, patches]]),
    }
    return EncoderInputs(tokens, (vision,) * BATCH_SIZE)


def objective(encoder: ParallelEncoder, query: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """InfoNCE on every path and on the aggregate."""
    own = torch.arange(BATCH_SIZE)
    options = {"positive": own, "candidate_ids": own, "temperature": 0.02}
    paths = info_nce(query, candidate, **options).mean()
    aggregates = [encoder.aggregate(side)[:, None] for side in (query, candidate)]
    return paths + info_nce(*aggregates, **options).mean()


def millions(parameters: Iterator[torch.nn.Parameter] | list[torch.nn.Parameter]) -> str:
    """Count values, in millions."""
    return f"{sum(parameter.numel() for parameter in parameters) / 1e6:.1f}"


@contextmanager
def timed(part: str, seconds: dict[str, float]) -> Iterator[None]:
    """Keep how long the block took."""
    start = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - start


if __name__ == "__main__":
    main()
