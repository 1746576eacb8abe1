"""Pre-train the tiny backbone that the package ships: ``make backbone``.

A stock transformers Qwen2-VL of about 2.3 M parameters with a byte-level BPE tokenizer of its own and
the stock processor learns captions, questions, one-aspect descriptions, edits, crops and glyphs of the
embedded world by next-token prediction on the answers. Everything is drawn from one seed. The unseen
shape and color combinations of ``scenes.HELD_OUT`` and one glyph face never occur.

Writes the folder of ``--output_dir``: weights (bfloat16), configuration, tokenizer, processor, and
``training.json`` with the recipe and the held-out accuracy by factor, measured on the weights as saved.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    Qwen2TokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from parallel_decoupling.batch import IMAGE_PLACEHOLDER
from parallel_decoupling.world import glyphs, questions, scenes
from parallel_decoupling.world.rows import WORLD_TASKS

IMAGE_TOKEN = "<|image_pad|>"
IMAGE_SLOTS = (scenes.IMAGE_SIZE // 16) ** 2
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    IMAGE_TOKEN,
    "<|video_pad|>",
)
DEFAULT_OUTPUT_DIR = Path(__file__).parents[1] / "src/parallel_decoupling/model/tiny"


def aspects(scene: scenes.Scene) -> dict[str, str]:
    """Describe one aspect at a time; the keys are ``META_PROMPTS``."""
    items = [item for _, item in scene.objects]
    return {
        "describe the shapes": ", ".join(item.shape for item in items),
        "describe the colors": ", ".join(item.color for item in items),
        "describe the positions": ", ".join(scenes.POSITIONS[index] for index, _ in scene.objects),
        "read the word": scene.word or "none",
        "count the objects": scenes.NUMBERS[len(items)],
        "describe the background": scene.background,
        "describe the sizes": ", ".join(item.size for item in items),
        "describe the picture": scene.caption(),
    }


@dataclass
class Example:
    """A training sequence: text pieces, whether each is predicted, and the picture if there is one.

    Attributes:
        pieces: text and whether the loss counts it, in order.
        picture: shown at ``IMAGE_TOKEN``, or None for text only.
    """

    pieces: list[tuple[str, bool]]
    picture: Image.Image | None = None

    def num_characters(self) -> int:
        """Length for sorting: text that is padded together should be of similar length."""
        return sum(len(text) for text, _ in self.pieces)


def sample_example(rng: np.random.Generator, questions_share: float = 0.0) -> Example:
    """Draw one sequence of the mixture; with probability ``questions_share`` only questions or a glyph."""
    if questions_share and rng.random() < questions_share:
        if rng.random() < 0.2:
            return glyph_example(rng)
        scene = scenes.sample_scene(rng, num_objects=int(rng.integers(2, 5)))
        pieces = [(f"{IMAGE_TOKEN}\n", False), *_turns(rng, scene, 6, by_place=False)]
        return Example(pieces, scenes.render(scene))
    kind = rng.choice(["ask", "aspect", "read", "edit", "crop", "glyph"], p=[0.44, 0.2, 0.08, 0.1, 0.08, 0.1])
    if kind == "glyph":
        return glyph_example(rng)
    scene = scenes.sample_scene(rng)
    picture = scenes.render(scene)
    if kind == "crop":
        index, item = scene.objects[rng.integers(len(scene.objects))]
        question = [("what color is it? ", item.color), ("what shape is it? ", item.shape)][rng.integers(2)]
        pieces = [
            (f"{IMAGE_TOKEN}\n", False),
            (f"{item}\n", True),
            (question[0], False),
            (f"{question[1]}\n", True),
        ]
        return Example(pieces, scenes.crop(picture, index))
    if kind == "edit":
        instruction, after = questions.sample_edit(rng, scene)
        return Example([(f"{IMAGE_TOKEN}\n{instruction}\n", False), (f"{after.caption()}\n", True)], picture)
    if kind == "aspect":
        prompt, answer = list(aspects(scene).items())[rng.integers(8)]
        before = bool(rng.random() < 0.7)
        text = f"{prompt}\n{IMAGE_TOKEN}\n" if before else f"{IMAGE_TOKEN}\n{prompt}\n"
        return Example([(text, False), (f"{answer}\n", True), *_turns(rng, scene, 1)], picture)
    if kind == "read":
        return Example([(f"{scene.caption()}\n", False), *_turns(rng, scene, 4)])
    if rng.random() < 0.35:
        pieces = [(f"{scene.caption()}\n", True), *_turns(rng, scene, 2)]
    else:
        pieces = _turns(rng, scene, 4)
    return Example([(f"{IMAGE_TOKEN}\n", False), *pieces], picture)


def glyph_example(rng: np.random.Generator) -> Example:
    """Draw a rendered character, to be named."""
    character = str(rng.choice(list(glyphs.CHARACTERS)))
    font = str(rng.choice(glyphs.TRAINING_FONTS))
    picture = glyphs.render_glyph(character, font, rng, coarse=bool(rng.random() < 0.4))
    return Example([(f"{IMAGE_TOKEN}\n", False), (f"{glyphs.unicode_name(character)}\n", True)], picture)


def _turns(
    rng: np.random.Generator, scene: scenes.Scene, count: int, *, by_place: bool = True
) -> list[tuple[str, bool]]:
    """Questions and answers; without those by place, which are learned first, more have to find an object."""
    asked = questions.questions(scene) + questions.relation_questions(scene)
    asked = [question for question in asked if by_place or "object at the" not in question.text]
    pieces: list[tuple[str, bool]] = []
    for index in rng.permutation(len(asked))[:count]:
        pieces += [(f"{asked[index].text}\n", False), (f"{asked[index].answer}\n", True)]
    return pieces


def train_tokenizer(seed: int, vocabulary_size: int = 640) -> Qwen2TokenizerFast:
    """Train a byte-level BPE on the corpus and the benchmark's prompts; other strings fall back to bytes."""
    rng = np.random.default_rng([seed, 1])
    corpus = ["".join(text for text, _ in sample_example(rng).pieces) for _ in range(4000)]
    corpus += [f" {glyphs.unicode_name(character)}\n" for character in glyphs.CHARACTERS] * 20
    rows = [task.draw(rng) for task in WORLD_TASKS for _ in range(20)]
    corpus += [text for row in rows for text in (row.query.text, row.positive.text)]
    corpus = [text.replace(IMAGE_TOKEN, "").replace(IMAGE_PLACEHOLDER, "") for text in corpus]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return Qwen2TokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[3:]),
        padding_side="left",
    )


def build_processor(tokenizer: Qwen2TokenizerFast) -> Qwen2VLProcessor:
    """Return the stock processor: every picture becomes 64 x 64 pixels, patches of 8, merged 2 x 2."""
    pixels = scenes.IMAGE_SIZE**2
    geometry = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 1}
    size = {"shortest_edge": pixels, "longest_edge": pixels}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, **geometry),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size, **geometry),
    )


def build_model(tokenizer: Qwen2TokenizerFast) -> Qwen2VLForConditionalGeneration:
    """Return the stock model at tiny size with random weights."""
    token_id = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": math.ceil(len(tokenizer) / 16) * 16,
            "hidden_size": 160,
            "intermediate_size": 400,
            "num_hidden_layers": 5,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|endoftext|>"),
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 4,
            "embed_dim": 112,
            "hidden_size": 160,
            "num_heads": 4,
            "mlp_ratio": 4,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
        },
        image_token_id=token_id(IMAGE_TOKEN),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return Qwen2VLForConditionalGeneration(config)


def collate(examples: list[Example], processor: Qwen2VLProcessor) -> dict[str, Tensor]:
    """Tokenise and pad sequences on the right; labels are -100 where nothing is predicted."""
    rows, targets = [], []
    for example in examples:
        ids: list[int] = []
        labels: list[int] = []
        for text, predicted in example.pieces:
            text = text.replace(IMAGE_TOKEN, IMAGE_TOKEN * IMAGE_SLOTS)
            piece = processor.tokenizer(text)["input_ids"]
            ids += piece
            labels += piece if predicted else [-100] * len(piece)
        rows.append(ids)
        targets.append(labels)
    longest = max(len(row) for row in rows)
    pad = processor.tokenizer.pad_token_id
    input_ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        "labels": torch.tensor([row + [-100] * (longest - len(row)) for row in targets]),
        "mm_token_type_ids": (input_ids == processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)).long(),
    }
    pictures = [example.picture for example in examples if example.picture is not None]
    if pictures:
        batch |= dict(processor.image_processor(pictures, return_tensors="pt"))
    return batch


@torch.inference_mode()
def accuracy_by_factor(
    model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, *, seed: int, num_scenes: int
) -> dict[str, float]:
    """Share of answers that greedy decoding gets exactly right, on scenes drawn from another seed.

    All tokens of the answer and the line end must be the most probable ones given the tokens before
    them, which is what greedy decoding produces. Glyphs are drawn in the training faces.
    """
    rng = np.random.default_rng([seed, 2])
    asked: list[tuple[str, Example]] = []
    for _ in range(num_scenes):
        scene = scenes.sample_scene(rng)
        picture = scenes.render(scene)
        options = questions.questions(scene) + questions.relation_questions(scene)
        for index in rng.permutation(len(options))[:6]:
            question = options[index]
            pieces = [(f"{IMAGE_TOKEN}\n{question.text}\n", False), (f"{question.answer}\n", True)]
            asked.append((question.factor, Example(pieces, picture)))
        character = str(rng.choice(list(glyphs.CHARACTERS)))
        picture = glyphs.render_glyph(character, str(rng.choice(glyphs.TRAINING_FONTS)), rng)
        pieces = [(f"{IMAGE_TOKEN}\n", False), (f"{glyphs.unicode_name(character)}\n", True)]
        asked.append(("glyph", Example(pieces, picture)))
    model.eval()
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(asked), 128):
        chunk = asked[start : start + 128]
        batch = collate([example for _, example in chunk], processor)
        labels = batch.pop("labels")[:, 1:]
        predicted = model(**batch, use_cache=False).logits[:, :-1].argmax(-1)
        correct = ((predicted == labels) | (labels == -100)).all(-1)
        for (factor, _), hit in zip(chunk, correct.tolist(), strict=True):
            right[factor].append(hit)
    model.train()
    return {factor: sum(hits) / len(hits) for factor, hits in sorted(right.items())}


CONTENTS = (None, *scenes.SHAPES, *scenes.WORDS)
COLORS = (None, *scenes.COLORS)
SIZES = (None, *scenes.SIZES)


def train_vision(
    model: Qwen2VLForConditionalGeneration,
    processor: Qwen2VLProcessor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Stage 1: every image token names its place and what its quadrant holds, through throw-away heads.

    As published backbones, the tiny one starts language training with a vision tower that already sees.
    """
    visual = model.model.visual
    classes = {"content": len(CONTENTS), "color": len(COLORS), "size": len(SIZES), "place": IMAGE_SLOTS}
    classes["glyph"] = len(glyphs.CHARACTERS)
    width = model.config.text_config.hidden_size
    heads = torch.nn.ModuleDict({name: torch.nn.Linear(width, count) for name, count in classes.items()})
    parameters = [*visual.parameters(), *heads.parameters()]
    optimizer, schedule = build_optimizer(parameters, steps, learning_rate)
    started = time.monotonic()
    for step in range(steps):
        rng = np.random.default_rng([seed, 4, step])
        pictures, labels = sample_labelled_pictures(rng, batch_size)
        data = processor.image_processor(pictures, return_tensors="pt")
        tokens = visual(data["pixel_values"], data["image_grid_thw"]).pooler_output.view(
            -1, IMAGE_SLOTS, width
        )
        losses = {
            name: torch.nn.functional.cross_entropy(
                head(tokens).flatten(0, 1), labels[name].flatten(), ignore_index=-100
            )
            for name, head in heads.items()
        }
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            text = " ".join(f"{name} {value.item():.2f}" for name, value in losses.items())
            print(f"vision step {step} {text} {(time.monotonic() - started):.0f} s", flush=True)


def sample_labelled_pictures(
    rng: np.random.Generator, count: int
) -> tuple[list[Image.Image], dict[str, Tensor]]:
    """Draw scenes and one glyph in four; labels per image token ``[count, IMAGE_SLOTS]``, -100 for none."""
    side = int(math.sqrt(IMAGE_SLOTS))
    quadrant = [(slot // side * 2 // side) * 2 + (slot % side) * 2 // side for slot in range(IMAGE_SLOTS)]
    labels = {
        name: torch.full((count, IMAGE_SLOTS), -100)
        for name in ("content", "color", "size", "place", "glyph")
    }
    pictures = []
    for row in range(count):
        if row % 4 == 0:
            index = int(rng.integers(len(glyphs.CHARACTERS)))
            font = str(rng.choice(glyphs.TRAINING_FONTS))
            coarse = bool(rng.random() < 0.4)
            pictures.append(glyphs.render_glyph(glyphs.CHARACTERS[index], font, rng, coarse=coarse))
            labels["glyph"][row] = index
            continue
        scene = scenes.sample_scene(rng, num_objects=int(rng.integers(2, 5)), word_share=0.7)
        pictures.append(scenes.render(scene))
        labels["place"][row] = torch.arange(IMAGE_SLOTS)
        for slot, index in enumerate(quadrant):
            cell = scene.cells[index]
            item = cell if isinstance(cell, scenes.Item) else None
            labels["content"][row, slot] = CONTENTS.index(item.shape if item else cell)
            labels["color"][row, slot] = COLORS.index(item.color if item else None)
            labels["size"][row, slot] = SIZES.index(item.size if item else None)
    return pictures, labels


def build_optimizer(
    parameters: list[torch.nn.Parameter], steps: int, learning_rate: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with 100 steps of warm-up, then cosine to 1 %."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.01 + 0.495 * (1 + math.cos(math.pi * step / steps)))
    )


def train(
    model: Qwen2VLForConditionalGeneration,
    processor: Qwen2VLProcessor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    questions_share: float = 0.0,
) -> None:
    """Stages 2 and 3: minimise the next-token loss of the answers, all weights trainable."""
    optimizer, schedule = build_optimizer(list(model.parameters()), steps, learning_rate)
    started = time.monotonic()
    for step in range(steps):
        rng = np.random.default_rng([seed, 5 if questions_share else 3, step])
        examples = [sample_example(rng, questions_share) for _ in range(batch_size)]
        examples.sort(key=Example.num_characters)
        middle = batch_size // 2  # two halves of similar length need less padding than one batch
        halves = [collate(examples[:middle], processor), collate(examples[middle:], processor)]
        predicted = sum(int((half["labels"] != -100).sum()) for half in halves)
        optimizer.zero_grad()
        mean_loss = 0.0
        for half in halves:
            loss = model(**half, use_cache=False, num_items_in_batch=predicted).loss
            loss.backward()
            mean_loss += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step} loss {mean_loss:.3f} {(time.monotonic() - started):.0f} s", flush=True)
        if step % 500 == 499:
            scores = accuracy_by_factor(model, processor, seed=seed, num_scenes=100)
            print({factor: round(value, 2) for factor, value in scores.items()}, flush=True)


def main() -> None:
    """Train, save, reload and measure."""
    parser = argparse.ArgumentParser(description="Pre-train the tiny backbone and write it to a folder.")
    parser.add_argument("--vision_steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--question_steps", type=int, default=2600)
    parser.add_argument("--start_dir", type=Path, help="skip stages 1 and 2, start from these weights")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=DEFAULT_OUTPUT_DIR)
    args = parser.parse_args()
    recipe = {name: value for name, value in vars(args).items() if name not in ("output_dir", "start_dir")}
    torch.manual_seed(args.seed)
    processor = build_processor(train_tokenizer(args.seed))
    model = build_model(processor.tokenizer).train()
    print(f"{model.num_parameters():,} parameters, {len(processor.tokenizer)} tokens")
    started = time.monotonic()
    common = {"batch_size": args.batch_size, "seed": args.seed}
    if args.start_dir is None:
        train_vision(model, processor, steps=args.vision_steps, learning_rate=args.learning_rate, **common)
        train(model, processor, steps=args.steps, learning_rate=args.learning_rate, **common)
    else:
        model = Qwen2VLForConditionalGeneration.from_pretrained(args.start_dir, dtype=torch.float32).train()
        processor = Qwen2VLProcessor.from_pretrained(args.start_dir)
    train(
        model,
        processor,
        steps=args.question_steps,
        learning_rate=args.learning_rate / 2,
        questions_share=0.7,
        **common,
    )
    minutes = (time.monotonic() - started) / 60
    if args.start_dir is not None:
        minutes += json.loads((args.start_dir / "training.json").read_text())["minutes"]
    model.to(torch.bfloat16).save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    saved = Qwen2VLForConditionalGeneration.from_pretrained(args.output_dir, dtype=torch.float32)
    scores = accuracy_by_factor(saved, processor, seed=args.seed, num_scenes=500)
    record = {
        "recipe": recipe,
        "parameters": saved.num_parameters(),
        "minutes": round(minutes, 1),
        "held_out_accuracy": {factor: round(value, 4) for factor, value in scores.items()},
    }
    (args.output_dir / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
