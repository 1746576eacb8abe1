"""The plan against what really exists: parameters, tensors that autograd keeps, operations, processors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoProcessor

from parallel_decoupling.cli import main
from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.model.backbone import AdapterConfig, load_backbone, meta_backbone
from parallel_decoupling.model.encoder import ParallelEncoder
from parallel_decoupling.model.families import FAMILIES
from parallel_decoupling.training import arithmetic, memory
from parallel_decoupling.training.module import PDFEmbedder
from parallel_decoupling.training.plan import NATURAL_IMAGE, Layout, Plan
from parallel_decoupling.training.settings import as_plain
from tests.support.families import save_tiny_family
from tests.support.tiny import noise_image, save_tiny_backbone, tiny_inputs

GIB = 2**30


def defaults(kind: type) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}


def make_plan(
    model: dict[str, Any], data: dict[str, Any] | None = None, gpu_memory_gib: float = 80.0, **trainer: Any
) -> Plan:
    """A plan of settings that differ from the defaults; dictionaries of ``trainer`` win over one process."""
    one = {"devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "bf16-mixed", "max_steps": 10}
    return Plan(
        defaults(PDFEmbedder) | model,
        defaults(MMEBDataModule) | (data or {}),
        {**one, **trainer},
        gpu_memory_gib,
    )


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava_next_mistral"])
@pytest.mark.parametrize("size", [(16, 16), (32, 32), (48, 32), (40, 64), (90, 30)])
def test_image_tokens_are_the_processors(tmp_path: Path, family: str, size: tuple[int, int]) -> None:
    folder = save_tiny_family(family, tmp_path)
    backbone = meta_backbone(folder)
    processor = AutoProcessor.from_pretrained(folder)
    token = backbone.image_token
    data = processor(text=[token], images=[Image.new("RGB", size)], return_tensors="pt")
    cost = arithmetic.image_cost(backbone.config, size[1], size[0])
    assert memory.pixel_bytes(backbone.config, cost) == data["pixel_values"].nbytes
    assert cost.tokens == int((data["input_ids"] == processor.tokenizer.convert_tokens_to_ids(token)).sum())
    if arithmetic.image_factor(backbone.config) > 1:
        assert cost.patches == data["pixel_values"].shape[0]
    else:
        assert cost.patches == data["pixel_values"].shape[1] * cost.context


@pytest.mark.parametrize(
    "model",
    [
        {"num_paths": 3, "prefix_length": 5, "prefix_layers": 1, "aggregation": "learned"},
        {"num_paths": 3, "prefix_length": 5, "prefix_layers": [0, 1]},
        {"num_paths": 3, "prefix_length": 5, "prefix_type": "shallow"},
        {"adapter": {"kind": "dora", "scope": "both"}, "learn_temperature": True, "mi": {"kind": "hsic"}},
        {"adapter": {"kind": "full"}},
        {"num_paths": 1, "prefix_length": 0, "mi_weight": 0.0, "aggregate_weight": 0.0},
    ],
)
def test_parameters_and_their_memory_are_the_embedders(model: dict[str, Any], tiny_backbone_dir: str) -> None:
    model = {"backbone": tiny_backbone_dir, "prefix_init": "random", **model}
    plan, module = make_plan(model), PDFEmbedder(**model)
    language = {id(p) for p in module.encoder.backbone.language_model.parameters()}
    base = list(module.encoder.backbone.base.parameters())
    expected = {
        "frozen": sum(p.numel() for p in module.parameters() if not p.requires_grad),
        "language model": sum(p.numel() for p in base if p.requires_grad and id(p) in language),
        "vision tower and projector": sum(
            p.numel() for p in base if p.requires_grad and id(p) not in language
        ),
        "prefixes": sum(p.numel() for p in module.encoder.prefix_parameters()),
        "aggregation": sum(p.numel() for p in module.encoder.aggregation_parameters()),
        "temperature": 0 if module.log_temperature is None else 1,
        "estimator": sum(p.numel() for p in module.mutual_information.parameters()),
    }
    found = dict.fromkeys(expected, 0)
    for group in plan.parameters:
        found[group.name.split(", ")[0] if group.trains else "frozen"] += group.count
    assert found == expected
    assert plan.memory["weights"] == sum(p.numel() * p.itemsize for p in module.parameters())
    trained = sum(p.numel() * p.itemsize for p in module.parameters() if p.requires_grad)
    assert plan.memory["gradients"] == trained
    assert plan.memory["optimizer states"] == 2 * trained


def test_nested_dimensions_add_their_terms_and_no_pass_of_the_model(tiny_backbone_dir: str) -> None:
    data = {"batch_size": 64}
    plain, nested = (
        make_plan({"backbone": tiny_backbone_dir, "matryoshka_dims": dims}, data)
        for dims in (None, [16, 8, 32])
    )
    assert nested.flops == plain.flops
    assert nested.token_passes == plain.token_passes
    assert nested.parameters == plain.parameters
    assert nested.memory["gathered embeddings"] == plain.memory["gathered embeddings"] * 1.75
    # the scores of every dimension are as large as those of the full one, the embeddings behind them are not
    assert 2 < nested.memory["contrastive terms"] / plain.memory["contrastive terms"] < 3


@pytest.mark.parametrize(("kind", "checkpointing"), [("lora", False), ("lora", True), ("full", False)])
def test_operations_are_those_that_torch_counts(tmp_path: Path, kind: Any, checkpointing: bool) -> None:
    folder = save_tiny_backbone(tmp_path, num_layers=4)
    options: dict[str, Any] = {"attention": "eager", "gradient_checkpointing": checkpointing}
    backbone = load_backbone(folder, adapter=AdapterConfig(kind=kind, rank=1), **options)
    encoder = ParallelEncoder(backbone, num_paths=2, prefix_length=2)
    text = "<|image_pad|>\n" + "describe the shapes the colors the positions " * 10
    inputs = tiny_inputs(backbone.processor, [(text, [noise_image(64, 64)])] * 2)
    with FlopCounterMode(display=False) as counter:
        encoder(inputs).sum().backward()
    image = arithmetic.image_cost(backbone.config, 64, 64)
    planned = arithmetic.step_flops(
        backbone,
        rows=2,
        images=2,
        text_tokens=inputs.tokens["input_ids"].shape[1] - image.tokens,
        image=image,
        paths=2,
        prefix_length=2,
        replayed=False,
        checkpointing=checkpointing,
    )
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_grad_cache_and_paths_cost_what_they_say(tiny_backbone_dir: str) -> None:
    def flops(**model: Any) -> float:
        return make_plan({"backbone": tiny_backbone_dir, **model}, {"batch_size": 16}).flops

    chunks = {"query_chunk_size": 2, "candidate_chunk_size": 2}
    one_side = flops(query_chunk_size=2)
    assert flops() < one_side < flops(**chunks)
    assert flops(candidate_chunk_size=2) + one_side == pytest.approx(flops() + flops(**chunks))
    vision = 2 * flops(num_paths=2) - flops(num_paths=4)
    assert 0 < vision < flops(num_paths=2)  # the tower runs once for all paths
    half = (flops(num_paths=4) - vision) * (0.5 / 4 + 0.5) + vision
    assert flops(num_paths=4, prefix_layers=1) == pytest.approx(half, rel=1e-3)
    twice = make_plan(
        {"backbone": tiny_backbone_dir, "optimizer": {"accumulate_batches": 2}}, {"batch_size": 16}
    )
    assert twice.flops == 2 * flops()


@pytest.mark.parametrize("chunks", [{}, {"query_chunk_size": 3, "candidate_chunk_size": 4}])
def test_shallow_prompts_cost_their_tokens_in_every_forward_pass(
    tiny_backbone_dir: str, chunks: dict[str, int]
) -> None:
    settings = {"backbone": tiny_backbone_dir, "num_paths": 3, "prefix_length": 5, **chunks}
    data = {"batch_size": 16}
    deep, shallow = (make_plan({**settings, "prefix_type": kind}, data) for kind in ("deep", "shallow"))
    passes = 6 + 4 if chunks else 4 + 4
    assert shallow.token_passes - deep.token_passes == pytest.approx(passes * 3 * 5)
    assert deep.token_passes == pytest.approx(deep.tokens * 3)
    assert shallow.flops > deep.flops
    assert shallow.memory["activations"] > deep.memory["activations"]
    two = make_plan({**settings, "prefix_type": "shallow"}, data, devices=2)
    per_process = (3 + 2) if chunks else 8
    assert two.token_passes - deep.token_passes == pytest.approx(2 * per_process * 3 * 5)


def test_layers_above_a_range_cost_every_path(tiny_backbone_dir: str) -> None:
    low, start = (
        make_plan({"backbone": tiny_backbone_dir, "num_paths": 4, "prefix_layers": layers})
        for layers in ([0, 1], 0)
    )
    assert low.token_passes == start.token_passes
    assert low.flops == start.flops


def test_memory_follows_the_layout(tiny_backbone_dir: str) -> None:
    model = {"backbone": tiny_backbone_dir, "adapter": {"kind": "full"}}
    data = {"batch_size": 64}
    precision = {"precision": "32-true"}  # without copies of weights
    one = make_plan(model, data, **precision)
    ddp = make_plan(model, data, devices=2, num_nodes=2, strategy="ddp", **precision)
    fsdp2 = make_plan(model, data, devices=4, strategy="fsdp2", **precision)
    assert [plan.layout.processes for plan in (one, ddp, fsdp2)] == [1, 4, 4]
    assert one.memory["gradient buckets of DDP"] == one.memory["weights gathered by FSDP2"] == 0
    assert ddp.memory["weights"] == one.memory["weights"]
    assert ddp.memory["gradient buckets of DDP"] == ddp.memory["gradients"]
    (language,) = (group.num_bytes for group in one.parameters if group.name == "language model")
    assert fsdp2.memory["weights"] == one.memory["weights"] - language * 3 / 4
    assert fsdp2.memory["optimizer states"] == one.memory["optimizer states"] - 2 * language * 3 / 4
    assert one.memory["activations"] == pytest.approx(4 * ddp.memory["activations"])
    images = arithmetic.image_cost(one.backbone.config, *reversed(NATURAL_IMAGE))
    in_one = (0.77 + 0.45) * 64 * memory.pixel_bytes(one.backbone.config, images)
    assert one.memory["pixels of the batch"] == pytest.approx(in_one)
    assert ddp.memory["pixels of the batch"] == pytest.approx(in_one / 4)
    for part in ("gathered embeddings", "contrastive terms", "estimator"):
        assert ddp.memory[part] == one.memory[part] > 0


def test_the_worst_moment_and_whether_it_fits(tiny_backbone_dir: str) -> None:
    chunks, data = (
        {"query_chunk_size": 4, "candidate_chunk_size": 8},
        {"batch_size": 32, "hard_negatives": 1},
    )
    precision = {"precision": "32-true"}  # without copies of weights
    chunked = make_plan({"backbone": tiny_backbone_dir, **chunks}, data, **precision)
    direct = make_plan({"backbone": tiny_backbone_dir}, data, **precision)
    assert chunked.graph_rows == (0, 8)
    assert direct.graph_rows == (32 + 64, 0)
    assert direct.memory["activations"] == pytest.approx(12 * chunked.memory["activations"])
    assert direct.peak == pytest.approx(sum(direct.memory.values()))
    assert chunked.peak < sum(chunked.memory.values())
    exact = make_plan({"backbone": tiny_backbone_dir}, data, direct.peak / GIB, **precision)
    assert direct.fits
    assert not exact.fits


@pytest.mark.parametrize(
    ("trainer", "layout"),
    [
        ({"devices": 1, "num_nodes": 1, "strategy": "auto"}, Layout(1, 1, "single")),
        ({"devices": "8", "num_nodes": 2, "strategy": "auto"}, Layout(8, 2, "ddp")),
        ({"devices": [0, 3], "num_nodes": 1, "strategy": "ddp_spawn"}, Layout(2, 1, "ddp")),
        ({"devices": "0,1,2", "num_nodes": 1, "strategy": "fsdp2"}, Layout(3, 1, "fsdp2")),
        (
            {
                "devices": 2,
                "num_nodes": 1,
                "strategy": {"class_path": "lightning.pytorch.strategies.DDPStrategy"},
            },
            Layout(2, 1, "ddp"),
        ),
        (
            {"devices": 2, "num_nodes": 1, "strategy": {"class_path": "parallel_decoupling.FSDP2Strategy"}},
            Layout(2, 1, "fsdp2"),
        ),
    ],
)
def test_layout_is_read_from_the_trainers_settings(trainer: dict[str, Any], layout: Layout) -> None:
    assert Layout.from_trainer(trainer) == layout


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda name: make_plan({"backbone": name}, devices=2, strategy="fsdp"), "strategy=fsdp"),
        (lambda name: make_plan({"backbone": name}, {"batch_size": 10}, devices=4), "multiple of the 4"),
        (lambda name: make_plan({"backbone": name, "num_paths": 0}), "num_paths"),
        (lambda name: make_plan({"backbone": name + "/nothing"}), "does not exist"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    tiny_backbone_dir: str, make: Callable[[str], Plan], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(tiny_backbone_dir)


def test_command_prints_a_plan_without_loading_anything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr("parallel_decoupling.model.encoder.load_backbone", refuse)
    options = ["--model.backbone", "Qwen/Qwen2-VL-2B-Instruct", "--model.dtype", "bfloat16"]
    options += ["--trainer.devices", "8", "--trainer.max_steps", "100", "--data.batch_size", "512"]
    main(["plan", *options, "--gpu_memory_gib", "24"])
    text = capsys.readouterr().out
    assert "1,543,714,304" in text
    assert "GPU of 24 GiB" in text
    assert "512 pairs, 64 per process" in text
    assert "gradient_checkpointing=true" in text  # the advice


def test_bfloat16_copies_of_fp32_weights_are_planned(tiny_backbone_dir: str) -> None:
    def difference(**model: Any) -> float:
        """What fp32 weights add to the activations of bfloat16 ones."""
        plans = [
            make_plan({"backbone": tiny_backbone_dir, "dtype": dtype, **model}, {"batch_size": 16})
            for dtype in ("float32", "bfloat16")
        ]
        return plans[0].memory["activations"] - plans[1].memory["activations"]

    backbone = meta_backbone(tiny_backbone_dir)
    layer = 2 * sum(
        p.numel()
        for p in backbone.language_model.layers[0].parameters()
        if p.ndim > 1 and not p.requires_grad
    )
    chunks = {"query_chunk_size": 2, "candidate_chunk_size": 2}
    assert difference() == pytest.approx(2 * 8 * layer)  # layers, forward passes in one graph
    assert difference(**chunks) == pytest.approx(2 * layer)
    assert difference(query_chunk_size=2) == pytest.approx(2 * 4 * layer)
    assert difference(adapter={"kind": "frozen"}, prefix_layers=1, **chunks) == pytest.approx(layer)
    assert difference(prefix_type="shallow", **chunks) == pytest.approx(2 * 2 * layer)
    whole = make_plan({"backbone": tiny_backbone_dir, **chunks}, {"batch_size": 16})
    stream = 2 * whole.row_tokens * 4 * 2 * 32 * 2  # rows, tokens, paths, layers, width, half of fp32
    assert difference(gradient_checkpointing=True, **chunks) == pytest.approx(layer + stream)


def test_a_family_without_a_row_is_planned_as_it_loads(
    tiny_backbone_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"backbone": tiny_backbone_dir}
    expected, family = make_plan(settings), as_plain(FAMILIES["qwen2_vl"])
    monkeypatch.delitem(FAMILIES, "qwen2_vl")
    with pytest.raises(ValueError, match="option `family`"):
        make_plan(settings)
    plan = make_plan({**settings, "family": family})
    assert (plan.parameters, plan.memory) == (expected.parameters, expected.memory)


def test_four_bit_weights_are_planned_as_bitsandbytes_stores_them() -> None:
    settings = {"backbone": "Qwen/Qwen2-VL-7B-Instruct", "dtype": "bfloat16"}
    plain, small = (make_plan({**settings, "quantization": bits}) for bits in (None, "4bit"))
    assert [group.count for group in small.parameters] == [group.count for group in plain.parameters]
    language, vision = (next(g for g in small.parameters if g.name.startswith(part)) for part in ("l", "v"))
    embedding, norms, biases = 152064 * 3584, 57 * 3584, 28 * (3584 + 2 * 512)
    linear = language.count - embedding - norms - biases
    blocks = linear / 64  # a byte of scale each, and a scale of scales for 256 of them
    stored = linear / 2 + blocks + 4 * blocks / 256
    assert language.num_bytes == pytest.approx(stored + 2 * (embedding + norms + biases), rel=1e-6)
    assert vision.num_bytes < 0.3 * 2 * vision.count
    weights = [plan.memory["weights"] / GIB for plan in (plain, small)]
    assert 14.4 < weights[0] < 14.6
    assert 4.4 < weights[1] < 4.7
    for name in ("gradients", "optimizer states", "activations"):
        assert small.memory[name] == plain.memory[name]
    fp32 = make_plan({**settings, "quantization": "4bit", "dtype": "float32"})
    assert fp32.memory["activations"] == pytest.approx(small.memory["activations"])  # no copies


@pytest.mark.parametrize(
    ("model", "trainer", "message"),
    [
        ({"quantization": "4bit", "adapter": {"kind": "full"}}, {}, "cannot train"),
        ({"quantization": "4bit"}, {"devices": 2, "strategy": "fsdp2"}, "4-bit"),
        ({"dtype": "bfloat16", "adapter": {"kind": "full"}}, {}, "model.dtype=float32"),
    ],
)
def test_what_fit_refuses_is_not_planned(
    tiny_backbone_dir: str, model: dict[str, Any], trainer: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan({"backbone": tiny_backbone_dir, **model}, **trainer)


def test_an_initial_adapter_is_read_from_a_folder_and_named_otherwise(
    tiny_backbone_dir: str, tmp_path: Path
) -> None:
    targets = ["q_proj", "down_proj"]
    LoraConfig(r=5, lora_alpha=10, target_modules=targets).save_pretrained(str(tmp_path))
    (tmp_path / "adapter_model.safetensors").touch()
    settings = {"backbone": tiny_backbone_dir, "initial_adapter": str(tmp_path)}
    asked = {"rank": 5, "alpha": 10, "targets": tuple(targets)}
    expected = make_plan({"backbone": tiny_backbone_dir, "adapter": asked})
    plan = make_plan(settings)
    assert (plan.parameters, plan.memory) == (expected.parameters, expected.memory)
    frozen = make_plan({**settings, "adapter": {"kind": "frozen"}})
    plain = make_plan({"backbone": tiny_backbone_dir, "adapter": {"kind": "frozen"}})
    adapters = 2 * 5 * (32 + 32 + 64 + 32)
    assert frozen.memory["gradients"] == plain.memory["gradients"]
    assert frozen.memory["weights"] == plain.memory["weights"] + 4 * adapters
    copies = 8 * 2 * adapters  # of eight forward passes
    assert frozen.memory["activations"] == pytest.approx(plain.memory["activations"] + copies)

    unread = make_plan({**settings, "initial_adapter": "TIGER-Lab/VLM2Vec-Qwen2VL-7B"})
    *counted, row = unread.parameters
    assert counted == make_plan({"backbone": tiny_backbone_dir}).parameters
    assert "TIGER-Lab/VLM2Vec-Qwen2VL-7B: not counted" in row.name
    assert row.count == 0
