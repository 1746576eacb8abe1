"""What N paths cost: run as ``python -m benchmarks.paths`` from the repository root.

Training: forward and backward of N paths in one pass, against N separate passes and against one path, next
to the arithmetic floor (multiply-adds of all layers, the vision tower counted once). Inference: one path with
its prefix against the plain backbone, with a goal per batch size. Contenders take turns in every round and
each line is the median over rounds of the ratio within the round: a busy machine disturbs both sides alike.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from parallel_decoupling.batch import EncoderInputs
from parallel_decoupling.model.backbone import TINY_BACKBONE_DIR, Backbone, load_backbone
from parallel_decoupling.model.encoder import ParallelEncoder
from tests.support.families import save_tiny_backbone
from tests.support.tiny import noise_image, tiny_inputs

NUM_PATHS = 4
BATCH_SIZE = 16
GOALS = {64: 1.05, 16: 1.05, 1: 1.10}
"""Of inference, by batch size."""
ROUNDS = 15
TEXT = (
    "<|image_pad|>\nRepresent the given image with the following question: what colour is the large circle?\n"
)
BACKWARD = (
    2  # a frozen layer with gradient through it costs its forward twice in all; frozen vision only once
)


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        name = "tiny" if TINY_BACKBONE_DIR.is_dir() else save_tiny_backbone(folder)
        backbone = load_backbone(name)
    middle = backbone.num_layers // 2
    inputs = make_inputs(backbone)
    deep = ParallelEncoder(backbone, num_paths=NUM_PATHS)
    upper = ParallelEncoder(backbone, num_paths=NUM_PATHS, prefix_layers=middle)
    print(
        f"backbone {name if name == 'tiny' else 'random-weight tiny'}: {backbone.num_layers} layers, width "
        f"{backbone.hidden_size}; batch {BATCH_SIZE} x {int(inputs.lengths.sum()) // BATCH_SIZE} tokens, "
        f"{NUM_PATHS} paths, prefix {deep.prefix_length}, {torch.get_num_threads()} threads, {ROUNDS} rounds"
    )
    contenders: dict[str, Callable[[], None]] = {
        "one path": lambda: train(deep, inputs, [[0]]),
        "N paths, one pass": lambda: train(deep, inputs, [list(range(NUM_PATHS))]),
        "N paths, N passes": lambda: train(deep, inputs, [[path] for path in range(NUM_PATHS)]),
        f"N paths, prefix from layer {middle}": lambda: train(upper, inputs, [list(range(NUM_PATHS))]),
    }
    rounds = measure(list(contenders.values()))
    floors = [floor(backbone, inputs, first_layer) for first_layer in (0, middle)]
    print(f"\n{'training step':<44}{'ratio':>8}{'floor':>8}")
    report("N paths, one pass / one path", [r[1] / r[0] for r in rounds], floors[0])
    report(f"N paths, prefix from layer {middle} / one path", [r[3] / r[0] for r in rounds], floors[1])
    report("N paths, one pass / N passes", [r[1] / r[2] for r in rounds], floors[0] / NUM_PATHS)
    print(f"{'one path, seconds':<44}{statistics.median(r[0] for r in rounds):>8.3f}")
    report_inference(backbone, deep)


def report_inference(backbone: Backbone, deep: ParallelEncoder) -> None:
    """Print the cost of a prefix at inference, from a full batch to a single input."""
    plain = ParallelEncoder(backbone, num_paths=1, prefix_length=0)
    print(f"\n{'inference':<44}{'ratio':>8}{'goal':>8}")
    for encoder in (plain, deep):
        encoder.eval()
    for batch_size, goal in GOALS.items():
        rows = make_inputs(backbone, batch_size)
        with torch.inference_mode():
            rounds = measure([lambda: plain(rows), lambda: deep(rows, [0])], repeats=3)  # noqa: B023
        report(f"one path / plain backbone, batch {batch_size}", [r[1] / r[0] for r in rounds], goal)


def make_inputs(backbone: Backbone, count: int = BATCH_SIZE) -> EncoderInputs:
    """Return rows of one 64x64 image and a text of 3 lengths, so that most are padded."""
    rows = [(TEXT + "yes " * (index % 3), [noise_image(64, 64, seed=index)]) for index in range(count)]
    return tiny_inputs(backbone.processor, rows)


def train(encoder: ParallelEncoder, inputs: EncoderInputs, passes: Sequence[Sequence[int]]) -> None:
    """Run forward and backward for each group of paths."""
    encoder.zero_grad()
    for paths in passes:
        encoder(inputs, paths).square().sum().backward()


def measure(contenders: Sequence[Callable[[], object]], repeats: int = 1) -> list[list[float]]:
    """Return seconds per round and contender; the order rotates and a warm-up round is dropped."""
    rounds = []
    for index in range(ROUNDS + 1):
        seconds = [0.0] * len(contenders)
        for turn in range(len(contenders)):
            which = (turn + index) % len(contenders)
            start = time.perf_counter()
            for _ in range(repeats):
                contenders[which]()
            seconds[which] = time.perf_counter() - start
        rounds.append(seconds)
    return rounds[1:]


def floor(backbone: Backbone, inputs: EncoderInputs, first_layer: int) -> float:
    """Multiply-adds of N paths over those of one path, from tokens x weights of every layer."""
    patches = sum(row["pixel_values"].shape[0] for row in inputs.vision)
    vision = patches * num_matrix_weights(backbone.vision_tower)
    layers = backbone.layers
    language = BACKWARD * inputs.tokens["input_ids"].numel() * num_matrix_weights(layers)
    shared = first_layer / backbone.num_layers
    return (vision + language * (shared + NUM_PATHS * (1 - shared))) / (vision + language)


def num_matrix_weights(module: nn.Module) -> int:
    """Count the weights that every token of ``module`` is multiplied with."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)


def report(name: str, ratios: Sequence[float], reference: float) -> None:
    """Print one line."""
    print(f"{name:<44}{statistics.median(ratios):>8.2f}{reference:>8.2f}")


if __name__ == "__main__":
    main()
