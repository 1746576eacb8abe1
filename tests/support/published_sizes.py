"""Published backbones without their weights: real configs and image processors, a tiny tokenizer.

Plain arguments of the published ``config.json`` files, by hub id. ``save_published`` writes a folder that can
be planned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests.support.families import llama_tokenizer
from tests.support.tiny import tiny_tokenizer


def _qwen2_vl(
    hidden_size: int, intermediate_size: int, heads: int, kv_heads: int, vocab_size: int, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": "qwen2_vl",
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "tie_word_embeddings": tied,
        "text_config": {
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": 28,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocab_size,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [16, 24, 24],
            },
        },
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "hidden_size": hidden_size,
            "mlp_ratio": 4,
            "num_heads": 16,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


def _llava_next(text_config: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "llava_next",
        "image_token_index": 32000,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {
            "vocab_size": 32064,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "rms_norm_eps": 1e-5,
            **text_config,
        },
        "vision_config": {  # openai/clip-vit-large-patch14-336
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
        },
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-VL-2B-Instruct": _qwen2_vl(1536, 8960, 12, 2, 151936, tied=True),
    "Qwen/Qwen2-VL-7B-Instruct": _qwen2_vl(3584, 18944, 28, 4, 152064, tied=False),
    "llava-hf/llava-v1.6-mistral-7b-hf": _llava_next(
        {
            "model_type": "mistral",
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "sliding_window": None,
        }
    ),
    "llava-hf/llava-v1.6-vicuna-7b-hf": _llava_next(
        {
            "model_type": "llama",
            "intermediate_size": 11008,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
        }
    ),
    "Qwen/Qwen3-VL-2B-Instruct": {
        "model_type": "qwen3_vl",
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "tie_word_embeddings": True,
        "text_config": {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5000000.0,
                "mrope_interleaved": True,
                "mrope_section": [24, 20, 20],
            },
        },
        "vision_config": {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    },
}
"""Arguments of the published config by hub id."""


def save_published(name: str, folder: Path) -> str:
    """Write config and processor of a published backbone; no weights."""
    arguments = dict(PUBLISHED[name])
    config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    config.save_pretrained(folder)
    vision = config.vision_config
    if config.model_type == "llava_next":
        side = vision.image_size
        image: Any = LlavaNextImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_grid_pinpoints=config.image_grid_pinpoints,
        )
        processor: Any = LlavaNextProcessor(
            image_processor=image,
            tokenizer=llama_tokenizer(),
            patch_size=vision.patch_size,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    else:
        sizes: dict[str, Any] = {
            "patch_size": vision.patch_size,
            "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384},
        }
        new = config.model_type == "qwen3_vl"
        kind, video = (
            (Qwen3VLProcessor, Qwen3VLVideoProcessor) if new else (Qwen2VLProcessor, Qwen2VLVideoProcessor)
        )
        image = Qwen2VLImageProcessor(**sizes)
        processor = kind(image_processor=image, tokenizer=tiny_tokenizer(), video_processor=video(**sizes))
    processor.save_pretrained(folder)
    return str(folder)
