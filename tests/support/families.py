"""A tiny random-weight model of every backbone family: stock classes, stock processors, made from code.

Text models are 32 wide with two or three layers and grouped key/value heads; images have a few tokens each.
``save_tiny_family`` writes what a published folder holds: a generation checkpoint with its processor.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers as hf
import transformers.models.smolvlm.processing_smolvlm as smolvlm_processing
from PIL import Image
from tokenizers import ByteLevelBPETokenizer, SentencePieceBPETokenizer

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, RawInput
from tests.support.tiny import CORPUS, SPECIAL_TOKENS, save_random_model, special_ids, wrap

if smolvlm_processing.num2words is None:  # needed for videos alone, but demanded at construction
    smolvlm_processing.num2words = str

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024, "initializer_range": 0.3}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP |= {"initializer_range": 0.3}
PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]


def byte_level(kind: type, special_tokens: tuple[str, ...], **options: Any) -> Any:
    """Train a byte-level BPE on ``CORPUS`` and wrap it as a stock tokenizer class."""
    trainer = ByteLevelBPETokenizer(add_prefix_space=False)
    trainer.train_from_iterator(CORPUS, vocab_size=400, min_frequency=1, show_progress=False)
    return wrap(kind, trainer, special_tokens, **options)


def sentence_piece(kind: type, begin: list[str], special_tokens: tuple[str, ...], **options: Any) -> Any:
    """Train a BPE with spaces as in sentencepiece, and a vocabulary that begins with some special tokens."""
    trainer = SentencePieceBPETokenizer()
    trainer.train_from_iterator(CORPUS, 400, 1, show_progress=False, special_tokens=begin)
    return wrap(kind, trainer, special_tokens, **options)


def llama_tokenizer() -> hf.LlamaTokenizer:
    """As LLaVA-1.6 has it, with a token at the start of every text."""
    begin, special_tokens = ["<unk>", "<s>", "</s>"], ("<image>", "<pad>")
    return sentence_piece(hf.LlamaTokenizer, begin, special_tokens, pad_token="<pad>")


QWEN_PROCESSORS = {
    "qwen2_vl": (hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor),
    "qwen2_5_vl": (hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor),
    "qwen3_vl": (hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor),
}


def qwen_processor(model_type: str, tokenizer: Any, size: dict[str, int], patch_size: int) -> Any:
    """The stock processor for images of between ``shortest_edge`` and ``longest_edge`` pixels."""
    sizes: dict[str, Any] = {
        "size": size,
        "patch_size": patch_size,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    processor, video = QWEN_PROCESSORS[model_type]
    image = hf.Qwen2VLImageProcessor(**sizes)
    return processor(image_processor=image, tokenizer=tokenizer, video_processor=video(**sizes))


def qwen(model_type: str, vision: dict[str, Any], text: dict[str, Any], patch_size: int = 8) -> Any:
    tokenizer = byte_level(hf.Qwen2Tokenizer, SPECIAL_TOKENS)
    size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    processor = qwen_processor(model_type, tokenizer, size, patch_size)
    sizes = {"patch_size": patch_size, "spatial_merge_size": 2, "temporal_patch_size": 2}
    ends = {"bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>"}
    text |= {key: tokenizer.convert_tokens_to_ids(name) for key, name in ends.items()}
    config = hf.AutoConfig.for_model(
        model_type,
        text_config={**TEXT, "vocab_size": len(tokenizer), **text},
        vision_config={**sizes, **vision},
        tie_word_embeddings=True,
        **special_ids(tokenizer),
    )
    return processor, config


def qwen2_vl(num_layers: int = 2) -> Any:
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 2}
    text = {"rope_parameters": MROPE, "num_hidden_layers": num_layers}
    return qwen("qwen2_vl", {**vision, "initializer_range": 0.3}, text)


def qwen2_5_vl() -> Any:
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32, "num_heads": 2}
    vision |= {"window_size": 32, "fullatt_block_indexes": [1], "initializer_range": 0.3}
    return qwen("qwen2_5_vl", vision, {"rope_parameters": MROPE})


def qwen3_vl() -> Any:
    vision = {"depth": 3, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32, "num_heads": 2}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1], "initializer_range": 0.3}
    text = {"num_hidden_layers": 3, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
    return qwen("qwen3_vl", vision, text)  # features are added after the first two of three layers


def llava_like(model_type: str, text: dict[str, Any], image: Any, kind: type, **options: Any) -> Any:
    """LLaVA and LLaVA-NeXT: Llama's tokenizer, a CLIP tower of which the last layer but one is read."""
    tokenizer = llama_tokenizer()
    reading = {"vision_feature_select_strategy": "default"}
    config = hf.AutoConfig.for_model(
        model_type,
        text_config={**TEXT, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **text},
        vision_config={"model_type": "clip_vision_model", **CLIP, "image_size": 16, "patch_size": 8},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        tie_word_embeddings=False,
        **reading,
        **options,
    )
    processor = kind(
        image_processor=image, tokenizer=tokenizer, patch_size=8, num_additional_image_tokens=1, **reading
    )
    return processor, config


def llava_next(text: dict[str, Any]) -> Any:
    image = hf.LlavaNextImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=PINPOINTS
    )
    return llava_like("llava_next", text, image, hf.LlavaNextProcessor, image_grid_pinpoints=PINPOINTS)


def llava_next_mistral() -> Any:
    return llava_next({"model_type": "mistral", "sliding_window": None})


def llava_next_vicuna() -> Any:
    return llava_next({"model_type": "llama"})


def llava() -> Any:
    """LLaVA-1.5, which has no row in the family table."""
    image = hf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return llava_like("llava", {"model_type": "llama"}, image, hf.LlavaProcessor, image_seq_length=4)


SIGLIP = {"image_size": 16, "patch_size": 8, "vision_use_head": False}


def llava_onevision() -> Any:
    tokenizer = byte_level(hf.Qwen2Tokenizer, ("<|endoftext|>", "<|im_end|>", "<image>", "<video>"))
    config = hf.AutoConfig.for_model(
        "llava_onevision",
        text_config={"model_type": "qwen2", **TEXT, "vocab_size": len(tokenizer)},
        vision_config={"model_type": "siglip_vision_model", **CLIP, **SIGLIP},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    size = {"height": 16, "width": 16}
    processor = hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
        tokenizer=tokenizer,
        video_processor=hf.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
    )
    return processor, config


def idefics(model_type: str, image: type, **videos: Any) -> Any:
    rows = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
    special = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *rows, "<pad>")
    tokenizer = byte_level(hf.GPT2Tokenizer, special, pad_token="<pad>")
    processor_class = {"smolvlm": hf.SmolVLMProcessor, "idefics3": hf.Idefics3Processor}[model_type]
    config = hf.AutoConfig.for_model(
        model_type,
        text_config={"model_type": "llama", **TEXT, "vocab_size": len(tokenizer)},
        vision_config={**CLIP, "image_size": 32, "patch_size": 8},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
        tie_word_embeddings=True,
    )
    images = image(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True)
    return processor_class(image_processor=images, tokenizer=tokenizer, image_seq_len=4, **videos), config


def smolvlm() -> Any:
    video = hf.SmolVLMVideoProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return idefics("smolvlm", hf.SmolVLMImageProcessor, video_processor=video)


def idefics3() -> Any:
    return idefics("idefics3", hf.Idefics3ImageProcessor)


def internvl() -> Any:
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"}
    named |= {"context_image_token": "<IMG_CONTEXT>"}
    tokenizer = byte_level(
        hf.Qwen2Tokenizer, ("<|endoftext|>", "<|im_end|>", *named.values()), extra_special_tokens=named
    )
    config = hf.AutoConfig.for_model(
        "internvl",
        text_config={"model_type": "qwen2", **TEXT, "vocab_size": len(tokenizer)},
        vision_config={**CLIP, "image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    size = {"height": 32, "width": 32}
    image = hf.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4)
    video = hf.InternVLVideoProcessor(size=size)
    processor = hf.InternVLProcessor(
        image_processor=image, tokenizer=tokenizer, video_processor=video, image_seq_length=4
    )
    return processor, config


def text_model(model_type: str, tokenizer: Any, **options: Any) -> Any:
    """A causal language model without vision, whose processor is its tokenizer."""
    config = hf.AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        **{**TEXT, "tie_word_embeddings": True, **options},
    )
    return tokenizer, config


def gemma3_text() -> Any:
    """Two layers with a window of four tokens, around one without."""
    tokenizer = sentence_piece(hf.GemmaTokenizer, ["<pad>", "<eos>", "<bos>", "<unk>"], ())
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    sizes = {"num_hidden_layers": 3, "layer_types": layers, "sliding_window": 4, "query_pre_attn_scalar": 8}
    return text_model("gemma3_text", tokenizer, **sizes)


def llama() -> Any:
    """With a head of its own, and a tokenizer without a padding token."""
    tokenizer = sentence_piece(hf.LlamaTokenizer, ["<unk>", "<s>", "</s>"], ())
    return text_model("llama", tokenizer, tie_word_embeddings=False)


def qwen2() -> Any:
    return text_model("qwen2", byte_level(hf.Qwen2Tokenizer, SPECIAL_TOKENS))


def qwen3() -> Any:
    return text_model("qwen3", byte_level(hf.Qwen2Tokenizer, SPECIAL_TOKENS))


_BUILDERS = [qwen2_vl, qwen2_5_vl, qwen3_vl, llava_next_mistral, llava_next_vicuna, llava]
_BUILDERS += [llava_onevision, smolvlm, idefics3, internvl]
TINY_FAMILIES: dict[str, Callable[[], Any]] = {builder.__name__: builder for builder in _BUILDERS}
"""Builders of (processor, config) by name."""
TEXT_FAMILIES = {builder.__name__: builder for builder in (gemma3_text, llama, qwen2, qwen3)}
"""Those without vision."""


def save_tiny_family(name: str, folder: str | Path, *, seed: int = 0) -> str:
    """Write a tiny backbone of a family as real ones are published; returns ``folder`` as a string."""
    processor, config = {**TINY_FAMILIES, **TEXT_FAMILIES}[name]()
    return save_random_model(processor, config, folder, seed)


def save_tiny_backbone(folder: str | Path, *, num_layers: int = 2, seed: int = 0) -> str:
    """Write the tiny Qwen2-VL that most tests take, with so many layers; returns ``folder`` as a string."""
    return save_random_model(*qwen2_vl(num_layers), folder, seed)


def raw_input(text: str, *images: Image.Image) -> RawInput:
    """Write a row as MMEB does: a line per image, then the text; a text alone has nothing added."""
    lines = [IMAGE_PLACEHOLDER] * len(images) + [text] * bool(text)
    return RawInput("".join(f"{line}\n" for line in lines), images) if images else RawInput(text)
