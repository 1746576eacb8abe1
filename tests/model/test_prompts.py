"""What stands around an input: stock embedding models are reproduced, and a prompt is kept and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from transformers import AutoModel, AutoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from parallel_decoupling.batch import RawInput, Template
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.data.images import ImagePolicy
from parallel_decoupling.data.prompts import prompt
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.model.backbone import AdapterConfig, load_backbone
from parallel_decoupling.model.encoder import ParallelEncoder
from parallel_decoupling.model.families import Family
from parallel_decoupling.model.identity import encoder_identity, rows_hash
from parallel_decoupling.training.module import PDFEmbedder
from tests.support.families import save_tiny_family
from tests.support.tiny import noise_image

CONFIGS = Path(__file__).parents[2] / "lightning_configs" / "backbone"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""What the published template of Qwen3-VL makes of a system message and one of a user, without tools."""
PIXELS = {"min_pixels": 4 * 16 * 16, "max_pixels": 9 * 16 * 16}
ITEMS: list[dict[str, Any]] = [
    {"text": "a red circle"},
    {"text": "a green star", "instruction": "Find an image that matches the given caption"},
    {"image": noise_image(20, 20, seed=1)},
    {"image": noise_image(90, 40, seed=2), "text": "what colour is it?", "instruction": "Count the objects."},
    {"images": [noise_image(40, 40, seed=3), noise_image(30, 60, seed=4)], "text": "left of which?"},
]


def shipped(name: str) -> Family:
    return Family(**yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["family"])


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = save_tiny_family("qwen3_vl", tmp_path_factory.mktemp("qwen3"))
    Path(folder, "chat_template.jinja").write_text(CHAT)
    return folder


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_family("qwen2_vl", tmp_path_factory.mktemp("qwen2"))


def our(folder: str, family: Family, **options: Any) -> Embedder:
    backbone = load_backbone(folder, family=family, adapter=AdapterConfig(kind="frozen"))
    encoder = ParallelEncoder(backbone, num_paths=1, prefix_length=0)
    return Embedder(encoder.eval(), images=ImagePolicy(None, *PIXELS.values()), **options)


def pictures_of(item: dict[str, Any]) -> list[Image.Image]:
    """Resized as both published codes do before the processor."""
    found = item.get("images", [item["image"]] if "image" in item else [])
    sizes = [smart_resize(each.height, each.width, factor=16, **PIXELS)[::-1] for each in found]
    return [each.resize(size) for each, size in zip(found, sizes, strict=True)]


@torch.no_grad()
def qwen3_vl_embedding(folder: str, item: dict[str, Any]) -> torch.Tensor:
    """QwenLM/Qwen3-VL-Embedding at 8ce3aab, src/models/qwen3_vl_embedding.py, for one input."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    instruction = item.get("instruction", "Represent the user's input.")
    instruction += "" if instruction.endswith(".") else "."
    pictures = pictures_of(item)
    content = [{"type": "image", "image": each} for each in pictures]
    content += [{"type": "text", "text": item["text"]}] if "text" in item else []
    system = {"role": "system", "content": [{"type": "text", "text": instruction}]}
    conversation = [system, {"role": "user", "content": content}]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=pictures or None, do_resize=False, return_tensors="pt")
    return F.normalize(model(**inputs).last_hidden_state[0, -1], dim=-1)


@torch.no_grad()
def gme(folder: str, item: dict[str, Any]) -> torch.Tensor:
    """mteb's gme_v_models.py at 00ace09: its language model (transformers < 4.52) counts positions itself."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    pictures = pictures_of(item)
    user = "<|vision_start|><|image_pad|><|vision_end|>" * len(pictures) + item.get("text", "")
    system = item.get("instruction", "You are a helpful assistant.")
    text = (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = processor(text=[text + "<|endoftext|>"], images=pictures or None, return_tensors="pt")
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    if pictures:
        features = model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        embeddings[inputs["input_ids"] == model.config.image_token_id] = features
    states = model.language_model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])
    return F.normalize(states.last_hidden_state[0, -1], dim=-1)


def test_qwen3_vl_embedding_as_a_base_gives_its_own_embeddings(qwen3: str) -> None:
    expected = torch.stack([qwen3_vl_embedding(qwen3, item) for item in ITEMS])
    found = our(qwen3, shipped("qwen3_vl_embedding_2b")).encode(ITEMS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(our(qwen3, Family()).encode(ITEMS), expected, atol=1e-2)


def test_gme_as_a_base_gives_its_own_embeddings(qwen2: str) -> None:
    expected = torch.stack([gme(qwen2, item) for item in ITEMS])
    found = our(qwen2, shipped("gme_qwen2_vl_2b")).encode(ITEMS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    axes = our(qwen2, Family(prompt=shipped("gme_qwen2_vl_2b").prompt)).encode(ITEMS)
    assert torch.allclose(axes[:2], expected[:2], atol=1e-5)
    assert not torch.allclose(axes[2:], expected[2:], atol=1e-2)


@pytest.mark.parametrize(
    ("pattern", "row", "text"),
    [
        ("{images}[{text}]", prompt("a cat", instruction="find"), "[find a cat]"),
        ("{images}<{text}>", prompt("a {images} {text}"), "<a {images} {text}>"),
        ("s {instruction} u {images} {text}", prompt("a cat", instruction="find"), "s find u  a cat"),
        (
            "s {instruction} u {images} {text}",
            RawInput("<|image_1|>\na cat\n", ("a.png",)),
            "s none u i a cat",
        ),
        ("{images}{text}!", prompt("what?", images=["a.png", "b.png"], instruction="look"), "iilook what?!"),
    ],
)
def test_patterns(pattern: str, row: RawInput, text: str, qwen2: str) -> None:
    template = Template(pattern, image="i", instruction="none")
    collator = Collator(AutoProcessor.from_pretrained(qwen2), image_token="<|image_pad|>", template=template)
    assert "".join(collator.text_parts(row)) == text


def test_a_language_model_s_chat_template(tmp_path: Path) -> None:
    folder = save_tiny_family("qwen2", tmp_path)
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    Path(folder, "chat_template.jinja").write_text(plain)
    collator = our(folder, Family(prompt=Template(instruction="none"))).collator
    assert "".join(collator.text_parts(prompt("a cat"))) == "system: none\nuser: a cat\n"


def test_a_long_text_keeps_the_end_of_the_prompt(qwen3: str) -> None:
    family = shipped("qwen3_vl_embedding_2b")
    whole, short = our(qwen3, family).collator, our(qwen3, family, max_tokens=60).collator
    rows = [prompt("a red circle " * 20, noise_image(32, 32, seed=1), "count"), prompt("a cat")]
    ids, cut = (
        each.encode_inputs(rows).select([0]).tokens["input_ids"][0].tolist() for each in (whole, short)
    )
    end = len(whole.processor.tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    assert cut == ids[: 60 - end] + ids[-end:]
    with pytest.raises(ValueError, match=f"with {end} for the end"):
        our(qwen3, family, max_tokens=15).collator.encode_inputs(rows[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "{text}"}, "hold {images} and later {text}"),
        ({"pattern": "{text}{images}"}, "hold {images} and later {text}"),
    ],
)
def test_prompts_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Template(**options)


def test_a_processor_without_a_usable_template_is_refused(qwen2: str, qwen3: str) -> None:
    with pytest.raises(ValueError, match="Give a pattern"):
        our(qwen2, Family(prompt=Template())).encode("a text")
    processor = AutoProcessor.from_pretrained(qwen3)
    processor.chat_template = "{{ messages[1].content[0].text }}"
    with pytest.raises(ValueError, match="does not show a system message"):
        Collator(processor, image_token="<|image_pad|>", template=Template())


def test_a_prompt_is_exported_and_part_of_the_identity(qwen3: str, tmp_path: Path) -> None:
    embedder, plain = our(qwen3, shipped("qwen3_vl_embedding_2b")), our(qwen3, Family())
    embedder.save_pretrained(tmp_path / "model")
    loaded = Embedder.from_pretrained(tmp_path / "model")
    assert loaded.encoder.template == embedder.encoder.template
    assert torch.equal(loaded.encode(ITEMS), embedder.encode(ITEMS))
    found, other = (encoder_identity(each.encoder) for each in (embedder, plain))
    assert found["sha256"] != other["sha256"]
    assert found["backbone_sha256"] == other["backbone_sha256"]
    split, whole = prompt("circle", instruction="a red"), prompt("red circle", instruction="a")
    assert split.text == whole.text
    assert rows_hash([split]) != rows_hash([whole])


def test_a_checkpoint_is_not_loaded_with_another_prompt(qwen3: str) -> None:
    options: dict[str, Any] = {
        "backbone": qwen3,
        "num_paths": 2,
        "prefix_length": 2,
        "adapter": {"kind": "frozen"},
    }
    model = PDFEmbedder(**options, family={"prompt": {"instruction": "none"}})  # type: ignore[arg-type]
    content: dict[str, Any] = {"state_dict": {}, "hyper_parameters": dict(model.hparams)}
    model.on_save_checkpoint(content)
    PDFEmbedder(**model.hparams).on_load_checkpoint(content)
    with pytest.raises(ValueError, match="trained with the prompt.*set model.family.prompt"):
        PDFEmbedder(**options).on_load_checkpoint(content)
