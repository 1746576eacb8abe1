"""Published backbones without their weights: real configs and image processors, a tiny tokenizer."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlavaNextImageProcessor, LlavaNextProcessor, Qwen2Tokenizer

from tests.support.families import QWEN_PROCESSORS, byte_level, llama_tokenizer, qwen_processor
from tests.support.tiny import SPECIAL_TOKENS

QWEN_IDS = {"image_token_id": 151655, "video_token_id": 151656}
QWEN_IDS |= {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
PATCHES = {"spatial_merge_size": 2, "temporal_patch_size": 2}


def _rope(**options: Any) -> dict[str, Any]:
    return {"rope_type": "default", **options}


def _text(hidden_size: int, intermediate_size: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": kv_heads}


def _qwen2_vl(text: dict[str, Any], vocab_size: int, tied: bool) -> dict[str, Any]:
    rope = _rope(rope_theta=1000000.0, mrope_section=[16, 24, 24])
    text = {**text, "vocab_size": vocab_size, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": text["hidden_size"], "mlp_ratio": 4}
    vision |= {"num_heads": 16, "patch_size": 14, **PATCHES}
    configs = {"text_config": {**text, "rope_parameters": rope}, "vision_config": vision}
    return {"model_type": "qwen2_vl", **QWEN_IDS, "tie_word_embeddings": tied, **configs}


def _qwen3_vl(text: dict[str, Any]) -> dict[str, Any]:
    rope = _rope(rope_theta=5000000.0, mrope_interleaved=True, mrope_section=[24, 20, 20])
    text = {**text, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 262144}
    text |= {"rms_norm_eps": 1e-6, "rope_parameters": rope}
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16}
    vision |= {"out_hidden_size": 2048, "patch_size": 16, **PATCHES, "num_position_embeddings": 2304}
    configs = {"text_config": text, "vision_config": {**vision, "deepstack_visual_indexes": [5, 11, 17]}}
    return {"model_type": "qwen3_vl", **QWEN_IDS, "tie_word_embeddings": True, **configs}


def _llava_next(text: dict[str, Any]) -> dict[str, Any]:
    vision = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "projection_dim": 768}
    vision |= {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    reading = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    return {
        "model_type": "llava_next",
        "image_token_index": 32000,
        "image_grid_pinpoints": pinpoints,
        "text_config": {"vocab_size": 32064, "rms_norm_eps": 1e-5, **text},
        "vision_config": {**vision, "num_hidden_layers": 24},  # openai/clip-vit-large-patch14-336
        **reading,
    }


_MISTRAL = {"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": None}
_MISTRAL |= {"rope_parameters": _rope(rope_theta=1000000.0)}
_VICUNA = {"model_type": "llama", "max_position_embeddings": 4096}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-VL-2B-Instruct": _qwen2_vl(_text(1536, 8960, 28, 12, 2), 151936, tied=True),
    "Qwen/Qwen2-VL-7B-Instruct": _qwen2_vl(_text(3584, 18944, 28, 28, 4), 152064, tied=False),
    "llava-hf/llava-v1.6-mistral-7b-hf": _llava_next({**_text(4096, 14336, 32, 32, 8), **_MISTRAL}),
    "llava-hf/llava-v1.6-vicuna-7b-hf": _llava_next({**_text(4096, 11008, 32, 32, 32), **_VICUNA}),
    "Qwen/Qwen3-VL-2B-Instruct": _qwen3_vl(_text(2048, 6144, 28, 16, 8)),
}
"""Arguments of the published config by hub id."""


def save_published(name: str, folder: Path) -> str:
    """Write config and processor of a published backbone; no weights."""
    arguments = dict(PUBLISHED[name])
    config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    config.save_pretrained(folder)
    vision = config.vision_config
    if config.model_type in QWEN_PROCESSORS:
        size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}
        tokenizer = byte_level(Qwen2Tokenizer, SPECIAL_TOKENS)
        processor = qwen_processor(config.model_type, tokenizer, size, patch_size=vision.patch_size)
    else:
        side = vision.image_size
        image = LlavaNextImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_grid_pinpoints=config.image_grid_pinpoints,
        )
        processor = LlavaNextProcessor(
            image_processor=image,
            tokenizer=llama_tokenizer(),
            patch_size=vision.patch_size,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    processor.save_pretrained(folder)
    return str(folder)
