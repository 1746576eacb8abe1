"""Model families: the names inside a base model, asked of transformers where it knows them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from parallel_decoupling.batch import Template

LANGUAGE_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of a Llama-like decoder layer."""
VISION_TARGETS = (
    *("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),  # CLIP, SigLIP
    *("qkv", "proj", "gate_proj", "up_proj", "down_proj", "linear_fc1", "linear_fc2"),  # Qwen-VL
    "projection_layer",  # InternVL
)
"""Linear layers of the blocks of all known vision towers."""


@dataclass(frozen=True)
class Family:
    """Names inside a base model; one that is not given is asked of transformers.

    A family that is not in ``FAMILIES`` works if its text model uses the attention interface of transformers.
    A language model without vision is its own ``language_module``, with the empty name, and has neither
    ``image_token`` nor ``vision_module``.

    Attributes:
        image_token: placeholder that the processor expands to an image's tokens.
        language_module: name of the language model inside the base model.
        vision_module: name of the vision tower inside the base model.
        layers: name of the list of decoder layers inside the base model.
        position_ids: mrope (time, height and width of each token) or sequential.
        language_targets: last names of the linear layers that adapters go to in the language model.
        vision_targets: the same for the vision tower.
        ignored_weights: weights of the published checkpoint that the base model rightly leaves out.
        prompt: what stands around every input; null is nothing, as in VLM2Vec.
    """

    image_token: str | None = None
    language_module: str = ""
    vision_module: str | None = None
    layers: str = ""
    position_ids: Literal["mrope", "sequential"] | None = None
    language_targets: tuple[str, ...] = LANGUAGE_TARGETS
    vision_targets: tuple[str, ...] = VISION_TARGETS
    ignored_weights: tuple[str, ...] = ("lm_head.weight", "language_model.lm_head.weight")
    prompt: Template | None = None

    def __post_init__(self) -> None:
        """Take the prompt as a checkpoint holds it, too."""
        if isinstance(self.prompt, Mapping):
            object.__setattr__(self, "prompt", Template(**self.prompt))

    def resolved(self, base: Any, processor: Any) -> "Family":
        """Return the family with every name filled in, from the stock base model and its processor."""
        names = {id(module): name for name, module in base.named_modules()}
        language = self.language_module or names[id(base.get_decoder())]
        return replace(
            self,
            image_token=self.image_token or getattr(processor, "image_token", None),
            language_module=language,
            vision_module=self.vision_module or names[id(base.get_encoder(modality="image"))] or None,
            layers=self.layers or f"{language}.layers".removeprefix("."),
            position_ids=self.position_ids or ("mrope" if hasattr(base, "get_rope_index") else "sequential"),
        )


FAMILIES: Mapping[str, Family] = dict.fromkeys(
    ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_next", "llava_onevision")
    + ("smolvlm", "idefics3", "internvl")
    + ("gemma3_text", "llama", "qwen2", "qwen3"),  # without vision
    Family(),
)
"""Families that passed the tests, by ``model_type`` of their config."""
