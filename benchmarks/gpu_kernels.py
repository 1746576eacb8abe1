"""Sections of ``benchmarks.gpu`` about single kernels: products, attention, four bits, tests marked gpu."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2VLConfig

from benchmarks.gpu_machine import Machine, Row, random_backbone
from parallel_decoupling.batch import EncoderInputs
from parallel_decoupling.model.adapters import AdapterConfig
from parallel_decoupling.model.encoder import ParallelEncoder
from parallel_decoupling.training.module import PDFEmbedder
from tests.support.families import qwen2_vl
from tests.support.tiny import noise_image, save_random_model, tiny_inputs

FROZEN = AdapterConfig(kind="frozen")
LIMITS = {"bfloat16": 5e-3, "float32": 1e-5}
GRADIENT_LIMITS = {"bfloat16": 3e-2, "float32": 1e-4}
"""Most that one minus a cosine with fp64 may be; a wrong mask gives 0.1 and more."""
KINDS: tuple[Literal["4bit"] | None, ...] = ("4bit", None)
PACKAGES = {"flash_attention_2": "flash_attn", "four_bit": "bitsandbytes"}


def products(machine: Machine) -> list[Row]:
    """Multiply large matrices."""
    side = machine.size.product
    a, b = (torch.randn(side, side, device=machine.device, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * side**3 / machine.seconds(lambda: a @ b, repeats=10) / 1e12
    known = machine.peak == machine.peak
    beside = machine.peak / 1e12 if known else None
    return [Row(f"{side} x {side} x {side}, bf16", rate, "TFLOP/s", beside, "published peak")]


def wide_model() -> tuple[Any, Qwen2VLConfig]:
    """Return a processor and a small config with heads as wide as real ones; kernels refuse narrow ones."""
    processor, config = qwen2_vl()
    text = config.text_config.to_dict() | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    rope = {**config.text_config.rope_parameters, "mrope_section": [16, 8, 8]}
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope}
    text |= {**sizes, "initializer_range": 0.05}
    vision = config.vision_config.to_dict() | {"embed_dim": 64, "hidden_size": 256, "num_heads": 2}
    top = {"image_token_id": config.image_token_id, "video_token_id": config.video_token_id}
    top |= {"vision_start_token_id": config.vision_start_token_id, "tie_word_embeddings": True}
    top["vision_end_token_id"] = config.vision_end_token_id
    return processor, Qwen2VLConfig(text_config=text, vision_config=vision, **top)


def encoded(encoder: ParallelEncoder, inputs: EncoderInputs) -> tuple[Tensor, Tensor | None]:
    """Return embeddings and the gradient of the prefixes, in fp64 on the CPU."""
    embeddings_BND = encoder(inputs.to(encoder.backbone.base.device))
    gradient = None
    if encoder.prefixes is not None:
        weight = torch.linspace(-1, 1, embeddings_BND.shape[-1], device=embeddings_BND.device)
        (embeddings_BND * weight).sum().backward()
        (parameter,) = encoder.prefixes.parameters()
        gradient = cast(Tensor, parameter.grad).double().cpu().flatten(1)
    return embeddings_BND.detach().double().cpu(), gradient


def pair(folder: str, device: str, kernel: str, dtype: str, length: int) -> list[ParallelEncoder]:
    """Build an encoder of a kernel, and one of the same weights in fp64 on the CPU."""
    encoders = []
    for place, attention in ((device, kernel), ("cpu", "sdpa")):
        torch.manual_seed(0)
        backbone = random_backbone(folder, place, adapter=FROZEN, attention=attention, dtype=dtype)
        paths = 2 if length else 1
        encoder = ParallelEncoder(backbone, num_paths=paths, prefix_length=length, prefix_init="random")
        encoders.append(encoder.to(place))
    found, exact = encoders
    exact.load_state_dict(found.state_dict())
    exact.backbone.base.double()
    return encoders


def attention(machine: Machine, kernel: str, dtypes: tuple[str, ...]) -> list[Row]:
    """Compare one kernel with fp64 on the CPU, of the same weights."""
    package = PACKAGES.get(kernel)
    if package and importlib.util.find_spec(package) is None:
        return [Row(f"{package} is not installed", note="not checked")]
    if kernel == "flex_attention" and not machine.is_cuda:
        return [Row("it has no backward pass on a CPU", note="not checked")]
    rows = []
    texts = ["what colour is it?", "a red circle left of a small blue square " * 3, "a star"]
    image = [noise_image(64, 48)]
    inputs = [("<|image_pad|>\n" + texts[0], image), (texts[1], []), (texts[2], [])]
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(*wide_model(), folder, seed=0)
        for dtype, length in product(dtypes, (0, 8)):
            encoders = pair(folder, machine.device, kernel, dtype, length)
            for padding, chosen in (("padded", inputs), ("unpadded", inputs[:1])):
                batch = tiny_inputs(encoders[0].processor, chosen)
                (ours, gradient), (wanted, wanted_gradient) = (encoded(each, batch) for each in encoders)
                what = f"{dtype}, {f'prefix {length}' if length else 'no prefix'}, {padding}"
                rows.append(distance(f"{what}: embeddings", ours, wanted, LIMITS[dtype]))
                if gradient is not None and wanted_gradient is not None:
                    limit = GRADIENT_LIMITS[dtype]
                    rows.append(distance(f"{what}: gradient", gradient, wanted_gradient, limit))
                    for encoder in encoders:
                        encoder.zero_grad()
    return rows


def distance(what: str, found: Tensor, wanted: Tensor, limit: float) -> Row:
    """Return the worst of one minus the cosines."""
    distance = float((1 - F.cosine_similarity(found, wanted, dim=-1)).abs().max())
    return Row(what, distance, "", limit, "limit", ok=distance <= limit)


def four_bit(machine: Machine) -> list[Row]:
    """Train one step with a backbone in four bits, and compare its embeddings with those in bf16."""
    if importlib.util.find_spec(PACKAGES["four_bit"]) is None:
        return [Row("bitsandbytes is not installed", note="not checked")]
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(*wide_model(), folder, seed=0)
        options: dict[str, Any] = {"num_paths": 2, "prefix_length": 4, "prefix_init": "random"}
        options |= {"dtype": "bfloat16", "adapter": AdapterConfig(kind="lora", per_path=True)}
        models = [PDFEmbedder(folder, quantization=kind, **options) for kind in KINDS]
        quantized, plain = (model.to(machine.device).eval() for model in models)
        texts = ["a red circle", "two yellow crosses above a green star"]
        both = (model.encode(texts, paths="all").double() for model in (quantized, plain))
        rows = [distance("embeddings against bf16", *both, limit=0.3)]
        batch = tiny_inputs(quantized.encoder.processor, [(text, []) for text in texts])
        quantized.train()
        (quantized(batch.to(machine.device))[..., 0]).sum().backward()
        trained = [p for p in quantized.encoder.parameters() if p.requires_grad]
        missing = [p for p in trained if p.grad is None or not bool(p.grad.isfinite().all())]
        rows.append(Row("trained tensors without a finite gradient", len(missing), ok=not missing))
    return rows


def tests(machine: Machine) -> list[Row]:
    """Run the tests that are marked gpu; without a GPU they skip themselves."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests", "-p", "no:cacheprovider"]
    timeout = max(1.0, machine.seconds_left)
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    print(done.stdout, done.stderr)
    last = done.stdout.strip().splitlines()[-1]
    return [Row("pytest -m gpu", done.returncode, "exit code", note=last, ok=done.returncode == 0)]


SECTIONS: dict[str, Callable[[Machine], list[Row]]] = {
    "products": products,
    "sdpa": partial(attention, kernel="sdpa", dtypes=("bfloat16", "float32")),
    "flash_attention_2": partial(attention, kernel="flash_attention_2", dtypes=("bfloat16",)),
    "flex_attention": partial(attention, kernel="flex_attention", dtypes=("bfloat16", "float32")),
    "four_bit": four_bit,
    "tests": tests,
}
