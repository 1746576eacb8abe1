"""What stands around an input: stock embedding models are reproduced, and a prompt is kept and checked."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModel, AutoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from parallel_decoupling.batch import RawInput, Template
from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.data.images import ImagePolicy
from parallel_decoupling.data.prompts import fill, prompt, to_raw_inputs
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
    {"images": [noise_image(20, 20, seed=1)]},
    {
        "images": [noise_image(90, 40, seed=2)],
        "text": "what colour is it?",
        "instruction": "Count the objects.",
    },
    {"images": [noise_image(40, 40, seed=3), noise_image(30, 60, seed=4)], "text": "left of which?"},
]


def shipped(name: str) -> Family:
    return Family(**yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["family"])


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = save_tiny_family("qwen3_vl", tmp_path_factory.mktemp("qwen3"))
    Path(folder, "chat_template.jinja").write_text(CHAT)
    return folder


def our(folder: str, family: Family, **options: Any) -> Embedder:
    backbone = load_backbone(folder, family=family, adapter=AdapterConfig(kind="frozen"))
    encoder = ParallelEncoder(backbone, num_paths=1, prefix_length=0)
    return Embedder(encoder.eval(), images=ImagePolicy(None, *PIXELS.values()), **options)


@torch.no_grad()
def published(folder: str, item: dict[str, Any], is_gme: bool) -> torch.Tensor:
    """One input, as QwenLM/Qwen3-VL-Embedding at 8ce3aab (src/models/qwen3_vl_embedding.py) embeds it.

    Or as mteb's gme_v_models.py at 00ace09: its language model (transformers < 4.52) counts positions itself.
    """
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    found = item.get("images", [])
    sizes = [smart_resize(each.height, each.width, factor=16, **PIXELS)[::-1] for each in found]
    pictures = [each.resize(size) for each, size in zip(found, sizes, strict=True)] or None
    user = "<|vision_start|><|image_pad|><|vision_end|>" * len(found) + item.get("text", "")
    default = "You are a helpful assistant." if is_gme else "Represent the user's input."
    system = item.get("instruction", default)
    system += "" if is_gme or system.endswith(".") else "."
    text = (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    )
    if not is_gme:
        inputs = processor(text=[text], images=pictures, do_resize=False, return_tensors="pt")
        return F.normalize(model(**inputs).last_hidden_state[0, -1], dim=-1)
    inputs = processor(text=[text + "<|endoftext|>"], images=pictures, return_tensors="pt")
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    if pictures:
        features = model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        embeddings[inputs["input_ids"] == model.config.image_token_id] = features
    states = model.language_model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])
    return F.normalize(states.last_hidden_state[0, -1], dim=-1)


def test_qwen3_vl_embedding_and_gme_as_bases_give_their_own_embeddings(qwen3: str, tmp_path: Path) -> None:
    qwen2, gme = save_tiny_family("qwen2_vl", tmp_path), shipped("gme_qwen2_vl_2b")
    for folder, family in ((qwen3, shipped("qwen3_vl_embedding_2b")), (qwen2, gme)):
        expected = torch.stack([published(folder, item, family is gme) for item in ITEMS])
        torch.testing.assert_close(our(folder, family).encode(ITEMS), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(our(folder, Family()).encode(ITEMS), expected, atol=1e-2)
    axes = our(qwen2, Family(prompt=gme.prompt)).encode(ITEMS)  # as Qwen2-VL itself counts pictures
    assert (axes - expected).abs().amax(dim=1).gt(1e-2).tolist() == [False, False, True, True, True]
    with pytest.raises(ValueError, match="Give a pattern"):
        our(qwen2, Family(prompt=Template())).encode("a text")


def test_training_evaluation_and_a_server_use_the_prompt_of_encode(qwen3: str) -> None:
    pytest.importorskip("fastapi")
    from parallel_decoupling.serve import Server
    from tests.test_serve import ask, client_of, data_uri, numbers

    embedder = our(qwen3, shipped("qwen3_vl_embedding_2b"))
    rows = to_raw_inputs(ITEMS)
    collators = embedder.collator, MMEBDataModule("mini-mmeb").connect(embedder).collator
    expected, found = (collator.encode_inputs(rows).tokens["input_ids"] for collator in collators)
    assert torch.equal(found, expected)
    items = [{key: value for key, value in item.items() if key != "images"} for item in ITEMS[:4]]
    for item, of_item in zip(items[2:], ITEMS[2:], strict=False):
        item["image"] = data_uri(of_item["images"][0])
    answer = numbers(ask(client_of(Server(embedder)), input=items))
    torch.testing.assert_close(answer, embedder.encode(ITEMS[:4]), rtol=1e-5, atol=1e-5)


def test_patterns() -> None:
    row, template = (
        prompt("a {images} cat", images=["a.png"] * 2, instruction="find"),
        Template(instruction="none"),
    )
    assert "".join(fill("{images}[{text}]", row, template, "ii")) == "ii[find a {images} cat]"
    assert fill("s {instruction}{images} {text}!", row, template, "ii") == (
        "s findii ",
        "a {images} cat",
        "!",
    )
    written = RawInput("<|image_1|>\na cat\n", ("a.png",))
    assert "".join(fill("{instruction} {images}{text}", written, template, "i")) == "none ia cat"
    with pytest.raises(ValueError, match="hold {images} and later {text}"):
        Template("{text}{images}")


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


def test_a_prompt_is_exported_checked_and_part_of_the_identity(qwen3: str, tmp_path: Path) -> None:
    embedder, plain = our(qwen3, shipped("qwen3_vl_embedding_2b")), our(qwen3, Family())
    embedder.save_pretrained(tmp_path / "model")
    loaded = Embedder.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.encode(ITEMS), embedder.encode(ITEMS))
    assert encoder_identity(embedder.encoder)["sha256"] != encoder_identity(plain.encoder)["sha256"]
    split, whole = prompt("circle", instruction="a red"), prompt("red circle", instruction="a")
    assert split.text == whole.text
    assert rows_hash([split]) != rows_hash([whole])
    options: dict[str, Any] = {"backbone": qwen3, "num_paths": 2, "adapter": {"kind": "frozen"}}
    model = PDFEmbedder(**options, family={"prompt": {"instruction": "none"}})  # type: ignore[arg-type]
    content: dict[str, Any] = {"state_dict": {}, "hyper_parameters": dict(model.hparams)}
    content["pytorch-lightning_version"] = "2.5"
    model.on_save_checkpoint(content)
    PDFEmbedder(**model.hparams).on_load_checkpoint(content)
    with pytest.raises(ValueError, match=r"trained with the prompt.*set model\.family\.prompt"):
        PDFEmbedder(**options).on_load_checkpoint(content)
