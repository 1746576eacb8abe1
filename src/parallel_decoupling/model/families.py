"""What differs between model families: one row each, keyed by the ``model_type`` of the published config.

Data only. Elsewhere: loading a backbone by its row (``backbone``), adding adapters to the layers that a row
names (``adapters``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LANGUAGE_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of a Llama-like decoder layer."""
CLIP_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
"""Linear layers of a CLIP or SigLIP block."""


@dataclass(frozen=True)
class Family:
    """What differs between model families; one row of ``FAMILIES``.

    A family that is not in the table works from the first five values, if its text model uses the attention
    interface of transformers.

    Attributes:
        image_token: placeholder that the processor expands to an image's tokens.
        language_module: name of the language model inside the base model.
        vision_module: name of the vision tower inside the base model.
        layers: name of the list of decoder layers inside the base model.
        position_ids: mrope (time, height and width of each token) or sequential.
        language_targets: last names of the linear layers that adapters go to in the language model.
        vision_targets: the same for the vision tower.
        blocks: class names of the repeated blocks, for sharding; empty is the class of the decoder layers.
        ignored_weights: weights of the published checkpoint that the base model rightly leaves out.
    """

    image_token: str
    language_module: str
    vision_module: str
    layers: str
    position_ids: Literal["mrope", "sequential"]
    language_targets: tuple[str, ...] = LANGUAGE_TARGETS
    vision_targets: tuple[str, ...] = (*CLIP_TARGETS, "qkv", "proj")
    blocks: tuple[str, ...] = ()
    ignored_weights: tuple[str, ...] = ("lm_head.weight", "language_model.lm_head.weight")


FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(
        image_token="<|image_pad|>",
        language_module="language_model",
        vision_module="visual",
        layers="language_model.layers",
        position_ids="mrope",
        vision_targets=("qkv", "proj", "fc1", "fc2"),
        blocks=("Qwen2VLDecoderLayer", "Qwen2VLVisionBlock"),
    ),
    "qwen2_5_vl": Family(
        image_token="<|image_pad|>",
        language_module="language_model",
        vision_module="visual",
        layers="language_model.layers",
        position_ids="mrope",
        vision_targets=("qkv", "proj", "gate_proj", "up_proj", "down_proj"),
        blocks=("Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"),
    ),
    "qwen3_vl": Family(
        image_token="<|image_pad|>",
        language_module="language_model",
        vision_module="visual",
        layers="language_model.layers",
        position_ids="mrope",
        vision_targets=("qkv", "proj", "linear_fc1", "linear_fc2"),
        blocks=("Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock"),
    ),
    "llava_next": Family(  # LLaVA-1.6
        image_token="<image>",
        language_module="language_model",
        vision_module="vision_tower",
        layers="language_model.layers",
        position_ids="sequential",
        vision_targets=CLIP_TARGETS,
        blocks=("MistralDecoderLayer", "LlamaDecoderLayer", "CLIPEncoderLayer"),
    ),
    "llava_onevision": Family(
        image_token="<image>",
        language_module="language_model",
        vision_module="vision_tower",
        layers="language_model.layers",
        position_ids="sequential",
        vision_targets=CLIP_TARGETS,
        blocks=("Qwen2DecoderLayer", "SiglipEncoderLayer"),
    ),
    "smolvlm": Family(
        image_token="<image>",
        language_module="text_model",
        vision_module="vision_model",
        layers="text_model.layers",
        position_ids="sequential",
        vision_targets=CLIP_TARGETS,
        blocks=("LlamaDecoderLayer", "SmolVLMEncoderLayer"),
    ),
    "idefics3": Family(
        image_token="<image>",
        language_module="text_model",
        vision_module="vision_model",
        layers="text_model.layers",
        position_ids="sequential",
        vision_targets=CLIP_TARGETS,
        blocks=("LlamaDecoderLayer", "Idefics3EncoderLayer"),
    ),
    "internvl": Family(
        image_token="<IMG_CONTEXT>",
        language_module="language_model",
        vision_module="vision_tower",
        layers="language_model.layers",
        position_ids="sequential",
        vision_targets=("q_proj", "k_proj", "v_proj", "projection_layer", "fc1", "fc2"),
        blocks=("Qwen2DecoderLayer", "Qwen3DecoderLayer", "LlamaDecoderLayer", "InternVLVisionLayer"),
    ),
}
"""Supported families by ``model_type`` of their config."""
