"""Every shipped config builds, every row of the docs plans, and the plan is what really exists."""

import inspect
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import step_flops, step_seconds
from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.lightning_cli import PlanCLI, RunCLI, run
from parallel_decoupling.model.backbone import AdapterConfig, load_backbone
from parallel_decoupling.model.encoder import ParallelEncoder
from parallel_decoupling.plan import Plan, read_layout, saved_bytes
from parallel_decoupling.training.module import PDFEmbedder
from recipes.ready_configs import READY, ROWS, ready_config
from tests.support.families import save_tiny_backbone
from tests.support.published_sizes import PUBLISHED, save_published
from tests.support.tiny import noise_image, tiny_inputs

PROJECT_DIR = Path(__file__).parent.parent
CONFIG_DIR = PROJECT_DIR / "lightning_configs"
CONFIG_FILES = sorted(CONFIG_DIR.glob("*.yaml"))


class BuiltCLI(RunCLI):
    """Builds everything and stops before the run."""

    def _run_subcommand(self, subcommand: str) -> None:
        self.built = subcommand


@pytest.fixture
def on_this_machine(
    tiny_backbone_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> list[str]:
    """Options that put a tiny backbone on one CPU instead of what a config asks for."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.WARNING)
    hardware = {
        "accelerator": "cpu",
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
        "precision": "32-true",
    }
    options = {f"trainer.{name}": value for name, value in hardware.items()}
    options |= {"trainer.default_root_dir": str(tmp_path), "model.dtype": "float32"}
    options |= {"model.backbone": tiny_backbone_dir, "model.backbone_revision": "null"}
    return [f"--{name}={value}" for name, value in options.items()]


@pytest.mark.parametrize("config_file", CONFIG_FILES, ids=lambda file: file.stem)
def test_config_parses_and_instantiates(config_file: Path, on_this_machine: list[str]) -> None:
    written = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    cli = BuiltCLI(["fit", "--config", str(config_file), *on_this_machine])
    assert cli.built == "fit"
    assert isinstance(cli.model, PDFEmbedder)
    assert isinstance(cli.datamodule, MMEBDataModule)
    assert cli.trainer.max_steps == written["trainer"]["max_steps"]
    assert cli.model.encoder.num_paths == written["model"]["num_paths"]
    assert cli.datamodule.batch_size == written["data"]["batch_size"]


def test_demo_and_its_baseline_differ_only_in_paths_and_steps() -> None:
    demo, single = (
        yaml.safe_load((CONFIG_DIR / name).read_text(encoding="utf-8"))
        for name in ("demo.yaml", "demo_single_path.yaml")
    )
    for config in (demo, single):
        for name in ("num_paths", "aggregate_weight", "aggregation", "mi_weight", "mi"):
            config["model"].pop(name, None)
        config["trainer"].pop("default_root_dir")
    assert 3 * demo["trainer"].pop("max_steps") == single["trainer"].pop("max_steps")
    assert demo == single


REPRODUCE = (PROJECT_DIR / "docs" / "reproduce.md").read_text(encoding="utf-8")


def table_rows() -> dict[str, list[str]]:
    lines = [line for line in REPRODUCE.splitlines() if line.startswith("| `") and line.count("|") == 10]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0].strip("`"): row for row in cells}


def ready_file(row: str) -> str:
    return str(CONFIG_DIR / READY / f"{row}.yaml")


class PlannedCLI(PlanCLI):
    """Keeps the plan instead of printing it."""

    def _run_subcommand(self, subcommand: str) -> None:
        config = self.config[subcommand].as_dict()
        with TemporaryDirectory() as folder:
            config["model"]["backbone"] = save_published(config["model"]["backbone"], Path(folder))
            self.plan = Plan(config["model"], config["data"], config["trainer"])


def test_ready_files_are_what_make_configs_writes() -> None:
    there = {file.stem: file.read_text(encoding="utf-8") for file in (CONFIG_DIR / READY).glob("*.yaml")}
    assert there == {row: ready_config(row) for row in ROWS}


def test_every_row_of_the_docs_has_a_ready_file_and_every_layer_a_use() -> None:
    assert list(table_rows()) == list(ROWS)
    command = "parallel-decoupling fit --config lightning_configs/reproduce/"
    assert [row for row in ROWS if f"{command}{row}.yaml\n" not in REPRODUCE] == []
    pages = (PROJECT_DIR / "docs" / f"{name}.md" for name in ("layouts", "backbones", "training"))
    docs = REPRODUCE + "".join(page.read_text(encoding="utf-8") for page in pages)
    layers = [str(file.relative_to(CONFIG_DIR).with_suffix("")) for file in CONFIG_DIR.glob("*/*.yaml")]
    unused = [name for name in layers if not name.startswith(READY) and f"{name}.yaml" not in docs]
    assert set(unused) <= {layer for row in ROWS.values() for layer in row}


def test_a_ready_file_equals_its_layers_on_the_command_line() -> None:
    name = "pdf_qwen2_vl_2b"
    layers = [f"--config={CONFIG_DIR / layer}.yaml" for layer in ROWS[name]]
    options = {"joined": [f"--config={ready_file(name)}"]}
    options["layers"] = [*layers, f"--trainer.default_root_dir=runs/{name}"]
    parsed = {key: PlannedCLI(["fit", *each]).config["fit"].as_dict() for key, each in options.items()}
    for config in parsed.values():
        del config["config"]
    assert parsed["joined"] == parsed["layers"]


@pytest.mark.parametrize("name", ROWS)
def test_row_instantiates_with_a_small_backbone_and_plans_as_documented(
    name: str, on_this_machine: list[str]
) -> None:
    arguments = ["fit", "--config", ready_file(name)]
    built: Any = BuiltCLI([*arguments, *on_this_machine])
    assert built.built == "fit"
    assert built.model.encoder.num_paths == (1 if name.startswith("single") else 4)
    plan = PlannedCLI(arguments).plan
    hours, processes = plan.steps * step_seconds(plan) / 3600, plan.processes
    assert table_rows()[name][2:7] == [
        str(processes),
        f"{sum(plan.memory.values()) / 2**30:.0f}",
        f"{hours:.1f}",
        f"{hours * processes:.0f}",
        f"{plan.steps * plan.queries / 1e6:.1f} M",
    ]


@pytest.mark.parametrize("layout", ["single", "ddp", "fsdp2"])
def test_a_layout_changes_nothing_that_is_trained(layout: str) -> None:
    file = CONFIG_DIR / "layout" / f"{layout}.yaml"
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert content.keys() == {"trainer"}
    assert content["trainer"].keys() == {"accelerator", "devices", "num_nodes", "strategy", "precision"}
    arguments = ["fit", "--config", ready_file("pdf_qwen2_vl_2b"), "--config", str(file)]
    assert PlannedCLI(arguments).plan.strategy == layout


SIZES = {
    "Qwen/Qwen2-VL-2B-Instruct": (2.21, 0, 2304),
    "Qwen/Qwen2-VL-7B-Instruct": (8.29, 152064, 2304),
    "llava-hf/llava-v1.6-mistral-7b-hf": (7.57, 32064, 2928),
    "llava-hf/llava-v1.6-vicuna-7b-hf": (7.06, 32064, 2928),
    "Qwen/Qwen3-VL-2B-Instruct": (2.13, 0, 1764),
}
"""Billions of parameters as published, rows of an untied head, tokens of a square of 1344 pixels."""


def defaults(kind: type) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}


def make_plan(backbone: str, data: dict[str, Any] | None = None, **settings: Any) -> Plan:
    """A plan of settings that differ from the defaults; those of the Trainer are taken out by name."""
    trainer = {"accelerator": "auto", "devices": 1, "num_nodes": 1, "strategy": "auto"}
    trainer |= {"precision": "bf16-mixed", "max_steps": 10}
    trainer = {name: settings.pop(name, value) for name, value in trainer.items()}
    model = defaults(PDFEmbedder) | {"backbone": backbone, **settings}
    return Plan(model, defaults(MMEBDataModule) | (data or {}), trainer)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_their_parameters_and_image_tokens(name: str, tmp_path: Path) -> None:
    billions, head_rows, tokens = SIZES[name]
    plan = make_plan(save_published(name, tmp_path), {"image_size": "high"}, dtype="bfloat16")
    count = sum(plan.groups[part][0] for part in ("language model", "vision tower and projector"))
    assert round((count + head_rows * plan.backbone.hidden_size) / 1e9, 2) == billions
    assert plan.image.tokens == tokens


@pytest.mark.parametrize(
    "settings",
    [
        {"num_paths": 3, "prefix_length": 5, "prefix_layers": 1, "aggregation": "learned"},
        {"num_paths": 3, "prefix_length": 5, "prefix_type": "shallow"},
        {"adapter": {"kind": "dora", "scope": "both"}, "learn_temperature": True, "mi": {"kind": "hsic"}},
        {"adapter": {"kind": "full"}},
        {"num_paths": 1, "prefix_length": 0, "mi_weight": 0.0, "aggregate_weight": 0.0},
    ],
)
def test_parameters_and_their_states_are_the_embedders(
    settings: dict[str, Any], tiny_backbone_dir: str
) -> None:
    settings = {"prefix_init": "random", **settings}
    plan, module = make_plan(tiny_backbone_dir, **settings), PDFEmbedder(tiny_backbone_dir, **settings)
    trained = sum(p.numel() * p.itemsize for p in module.parameters() if p.requires_grad)
    assert sum(count for count, _, _ in plan.groups.values()) == sum(p.numel() for p in module.parameters())
    assert plan.memory["weights"] == sum(p.numel() * p.itemsize for p in module.parameters())
    assert plan.memory["gradients"] == trained
    assert plan.memory["optimizer states"] == 2 * trained
    prefixes = sum(p.numel() for p in module.encoder.parameter_groups()["prefixes"])
    assert plan.groups.get("prefixes", (0,))[0] == prefixes


@pytest.mark.parametrize("kind", ["frozen", "lora", "full"])
def test_activations_are_within_a_third_of_what_autograd_keeps(tmp_path: Path, kind: Any) -> None:
    found = []
    for layers in (1, 2):
        folder = save_tiny_backbone(tmp_path / str(layers), num_layers=layers)
        backbone = load_backbone(folder, adapter=AdapterConfig(kind=kind, rank=2), dtype="float32")
        encoder = ParallelEncoder(backbone, num_paths=2, prefix_length=3)
        text = "<|image_pad|>\n" + "describe the shapes the colors the positions " * 20
        inputs = tiny_inputs(backbone.processor, [(text, [noise_image(64, 64)])] * 6)
        known = {p.untyped_storage()._cdata for p in encoder.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, torch.Tensor] = kept) -> torch.Tensor:
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
            return tensor

        with (
            MixedPrecision("bf16-mixed", "cpu").forward_context(),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            encoder(inputs)
        found.append(sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in known))
    tokens = 2 * inputs.tokens["input_ids"].numel()
    layer = saved_bytes(backbone.layers, 2) / 2
    assert layer * tokens == pytest.approx(found[1] - found[0], rel=1 / 3)


@pytest.mark.parametrize(
    ("adapter", "checkpointing"),
    [
        (AdapterConfig(rank=1), False),
        (AdapterConfig(rank=1), True),
        (AdapterConfig(rank=8, per_path=True), False),
        (AdapterConfig(kind="full"), False),
    ],
)
def test_operations_are_those_that_torch_counts(
    tmp_path: Path, adapter: AdapterConfig, checkpointing: bool
) -> None:
    folder = save_tiny_backbone(tmp_path, num_layers=4)
    settings: dict[str, Any] = {"gradient_checkpointing": checkpointing, "adapter": adapter}
    plan = make_plan(folder, {"batch_size": 100}, num_paths=2, prefix_length=2, **settings)
    backbone = load_backbone(folder, attention="eager", **settings)
    encoder = ParallelEncoder(backbone, num_paths=2, prefix_length=2)
    text = "the " * 64  # a token each, and as many as the plan assumes
    measured = 0
    for count, row in ((78, (text, [])), (122, ("<|image_pad|>" + text, [noise_image(64, 48)]))):
        with FlopCounterMode(display=False) as counter:
            encoder(tiny_inputs(backbone.processor, [row])).sum().backward()
        measured += count * counter.get_total_flops()
    assert step_flops(plan) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("devices", "nodes", "strategy", "expected"),
    [
        (1, 1, "auto", (1, "single")),
        ("8", 2, "auto", (16, "ddp")),
        ("0,1,2", 1, "fsdp2", (3, "fsdp2")),
        (2, 1, {"class_path": "parallel_decoupling.FSDP2Strategy"}, (2, "fsdp2")),
    ],
)
def test_layout_is_read_from_the_trainers_settings(
    devices: Any, nodes: int, strategy: Any, expected: tuple[int, str]
) -> None:
    trainer = {"accelerator": "auto", "devices": devices, "num_nodes": nodes, "strategy": strategy}
    assert read_layout(trainer) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [("devices", "x"), ("devices", 0), ("devices", "[]"), ("accelerator", "tpu"), ("strategy", "deepspeed")],
)
def test_a_layout_that_cannot_run_is_refused_by_name(name: str, value: Any) -> None:
    trainer = {"accelerator": "gpu", "devices": 1, "num_nodes": 1, "strategy": "auto", name: value}
    with pytest.raises(ValueError, match=f"trainer.{name}=.* cannot be planned"):
        read_layout(trainer)


def test_a_run_without_steps_has_no_plan(tiny_backbone_dir: str) -> None:
    with pytest.raises(ValueError, match="max_steps=0 trains nothing"):
        make_plan(tiny_backbone_dir, max_steps=0)


def test_the_command_prints_a_plan_without_loading_a_weight(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_published("Qwen/Qwen2-VL-2B-Instruct", tmp_path)  # holds none
    assert next(load_backbone(folder, meta=True).parameters()).is_meta
    options = ["--model.backbone", folder, "--trainer.devices", "8", "--data.batch_size", "512"]
    run(["plan", *options, "--gpu_memory_gib", "24"])
    text = capsys.readouterr().out
    assert "1,543,714,304" in text
    assert "GPU of 24 GiB" in text
    assert "512 pairs, 64 per process" in text
