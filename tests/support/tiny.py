"""What tiny models are made of: a corpus, special tokens, random weights; and their inputs.

The shipped ``tiny`` backbone is trained and made elsewhere.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from parallel_decoupling.batch import EncoderInputs

_NAMES = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in _NAMES)
CORPUS = (
    "describe the shapes the colors the positions the sizes the background the picture",
    "read the word and count the objects: a red circle left of a small blue square",
    "Represent the given image with the following question: what colour is the large triangle?",
    "Find an image that matches the given caption. a green star above two yellow crosses",
)


def wrap(kind: type, trainer: Any, special_tokens: Sequence[str], **options: Any) -> Any:
    """Wrap what a trainer of ``tokenizers`` learned as a stock tokenizer class."""
    merges = [tuple(pair) for pair in json.loads(trainer._tokenizer.to_str())["model"]["merges"]]
    tokenizer = kind(vocab=trainer.get_vocab(), merges=merges, padding_side="left", **options)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special_tokens)})
    return tokenizer


def special_ids(tokenizer: Any) -> dict[str, int]:
    """Token ids that the config of a Qwen-VL names."""
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    return {key: int(tokenizer.convert_tokens_to_ids(f"<|{name}|>")) for key, name in names.items()}


def save_random_model(processor: Any, config: Any, folder: str | Path, seed: int) -> str:
    """Write a generation checkpoint of random weights; returns ``folder`` as a string."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        is_text = config.get_text_config() is config
        model = (AutoModelForCausalLM if is_text else AutoModelForImageTextToText).from_config(config)
        with torch.no_grad():  # zero biases and unit norms would hide a forgotten one
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return an image of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def tiny_inputs(
    processor: Any, rows: Sequence[tuple[str, Sequence[Image.Image]]], *, padding_side: str = "left"
) -> EncoderInputs:
    """Tokenise rows of (text with ``<|image_pad|>``, images) with the stock processor, row by row."""
    encoded = [
        dict(processor(text=[text], images=list(images) or None, return_tensors="pt"))
        for text, images in rows
    ]
    length = max(row["input_ids"].shape[1] for row in encoded)
    tokens: dict[str, torch.Tensor] = {}
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        padded = []
        for row in encoded:
            missing = length - row["input_ids"].shape[1]
            sides = (missing, 0) if padding_side == "left" else (0, missing)
            padded.append(torch.nn.functional.pad(row[key][0], sides))
        tokens[key] = torch.stack(padded)
    vision = tuple({key: value for key, value in row.items() if key not in tokens} for row in encoded)
    return EncoderInputs(tokens, vision)
