"""Two gloo processes or nodes with different rows against one process with all of them, in every layout."""

import csv
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor

from parallel_decoupling.distributed import rank, whole
from parallel_decoupling.evaluation.store import Store
from parallel_decoupling.training.module import PDFEmbedder
from tests.support.families import save_tiny_family
from tests.support.fit import (
    ONE_PATH,
    Recorder,
    SaveAll,
    make_trainer,
    small_config,
    small_data,
    small_embedder,
)
from tests.support.mmeb import add_text_subset, save_tiny_mmeb
from tests.support.processes import run_ranks

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {
    "num_paths": 2,
    "prefix_length": 3,
    "aggregation": "learned",
    "learn_temperature": True,
    "temperature": 0.2,
    "mi": {"hidden_size": 8, "warmup_steps": 0, "ramp_steps": 0},
    "optimizer": {"learning_rate": 1e-3, "prefix_learning_rate": 1e-2, "clip_norm": 0.5},
}
LORA = {"kind": "lora", "scope": "both"}
ADAPTERS = {"lora": LORA, "own": {**LORA, "per_path": True}, "full": {"kind": "full"}}
STEPS = 4


class Recording(PDFEmbedder):
    """Keeps the gradients that each main step uses, and which chunks of this process held an image."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        named = [(name, p) for name, p in self.named_parameters() if p.grad is not None]
        self.sharded = {name for name, p in self.named_parameters() if isinstance(p, DTensor)}
        self.gradients.append({name: whole(p.grad).clone() for name, p in named})

    def _encode(self, inputs: Any) -> Any:
        self.with_image.append([bool(row) for row in inputs.vision])
        return super()._encode(inputs)


def train(
    folder: Path,
    backbone: str,
    data_dir: str,
    adapter: dict[str, Any],
    strategy: str = "auto",
    chunk_size: int | None = None,
    resume: Path | None = None,
    checkpointing: bool = False,
    changes: dict[str, Any] | None = None,
    subsets: list[str] | None = None,
) -> None:
    """Four batches; what happened on each rank is in ``<rank>.pt``, a checkpoint in ``3.ckpt``."""
    settings = {**SETTINGS, "chunk_size": chunk_size}
    settings |= {"gradient_checkpointing": checkpointing, **(changes or {})}
    module = Recording(backbone=backbone, adapter=adapter, **settings)  # type: ignore[arg-type]
    module.gradients, module.with_image, module.sharded = [], [], set()
    recorder = Recorder()
    options = {"devices": 1 if strategy == "auto" else 2, "strategy": strategy}
    trainer = make_trainer(folder, recorder, SaveAll(folder), max_steps=STEPS, **options)
    data = small_data(data_dir, policy="sub_batch", sub_batch_size=4, train_subsets=subsets)
    trainer.fit(module, data, ckpt_path=resume)
    torch.save(
        {
            "values": recorder.values,
            "gradients": module.gradients,
            "with_image": module.with_image,
            "sharded": module.sharded,
            "parameters": {name: whole(p.detach()) for name, p in module.named_parameters()},
        },
        folder / f"{rank()}.pt",
    )


def results(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(file, weights_only=True) for file in sorted(folder.glob("[01].pt"))]


def one(folder: Path, *args: Any, **options: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    train(folder, *args, **options)
    (result,) = results(folder)
    return result


def two(folder: Path, *args: Any, **options: Any) -> list[dict[str, Any]]:
    folder.mkdir()
    run_ranks(lambda: train(folder, *args, **options))
    return results(folder)


def assert_close(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """The same losses, gradients and parameters up to rounding; the tail of a run against its end."""
    for name in ("values", "gradients"):
        for ours, theirs in zip(found[name], wanted[name][-len(found[name]) :], strict=True):
            assert ours.keys() == theirs.keys()
            for key, value in ours.items():
                torch.testing.assert_close(
                    value, theirs[key], rtol=5e-3, atol=5e-5, msg=lambda text, key=key: f"{key}: {text}"
                )
    assert found["parameters"].keys() == wanted["parameters"].keys()


@pytest.fixture(scope="module", params=["lora", "own", "full"])
def one_process(
    request: pytest.FixtureRequest,
    tiny_backbone_dir: str,
    tiny_mmeb_dir: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, tuple[Any, ...], dict[str, Any]]:
    """Folder with checkpoint, arguments and results of one process with the whole batches."""
    folder = tmp_path_factory.mktemp(request.param)
    args = (tiny_backbone_dir, tiny_mmeb_dir, ADAPTERS[request.param])
    return folder, args, one(folder, *args)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_like_one_and_resume_each_others_checkpoints(
    one_process: Any, tmp_path: Path, strategy: str, chunk_size: int | None
) -> None:
    folder, args, wanted = one_process
    first, second = two(tmp_path / "two", *args, strategy=strategy, chunk_size=chunk_size)
    assert any(a != b for a, b in zip(first["with_image"], second["with_image"], strict=True))
    trained = wanted["gradients"][0].keys()
    assert {"log_temperature", "encoder.path_logits", "encoder.prefixes.key_values"} <= trained
    assert any("visual" in name for name in trained)
    for rank_result in (first, second):
        assert_close(rank_result, wanted)
        assert len(rank_result["values"]) == STEPS
        assert bool(rank_result["sharded"]) == (strategy == "fsdp2")
        assert not any("visual" in name or "lora" in name for name in rank_result["sharded"])
    for name, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][name])
    resumed = [one(tmp_path / "in_one", *args, resume=tmp_path / "two" / "3.ckpt")]
    other = {"ddp": "fsdp2", "fsdp2": "ddp"}[strategy]
    for resume in (folder / "3.ckpt", tmp_path / "two" / "3.ckpt"):
        resumed += two(tmp_path / f"from_{resume.parent.name}", *args, strategy=other, resume=resume)
    for result in resumed:
        assert_close(result, wanted)
        assert len(result["values"]) == 1


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_process_whose_rows_are_texts_adds_nothing_to_vision_adapters(
    tiny_backbone_dir: str, tmp_path: Path, strategy: str, chunk_size: int | None
) -> None:
    add_text_subset(save_tiny_mmeb(tmp_path / "data"))
    args = (tiny_backbone_dir, str(tmp_path / "data"), {"kind": "lora", "scope": "vision"})
    changes = {**ONE_PATH, "aggregation": "mean", "learn_temperature": False}
    options: dict[str, Any] = {"changes": changes, "subsets": ["colours_i2t", "texts"]}
    wanted = one(tmp_path / "one", *args, **options)
    first, second = two(tmp_path / "two", *args, strategy=strategy, chunk_size=chunk_size, **options)
    assert any(a != b for a, b in zip(first["with_image"], second["with_image"], strict=True))
    for result in (first, second):
        assert_close(result, wanted)


@pytest.mark.parametrize("adapter", ["own", "full"])
def test_a_model_of_texts_alone_is_sharded_too(tmp_path: Path, adapter: str) -> None:
    add_text_subset(save_tiny_mmeb(tmp_path / "data"))
    backbone = save_tiny_family("gemma3_text", tmp_path / "backbone")
    args = (backbone, str(tmp_path / "data"), {**ADAPTERS[adapter], "scope": "language"})
    wanted = one(tmp_path / "one", *args, subsets=["texts"])
    for result in two(tmp_path / "two", *args, strategy="fsdp2", subsets=["texts"]):
        assert_close(result, wanted)
        assert result["sharded"]


class KillLastRank(Callback):
    """The last process disappears, as when a node fails."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == 1 and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_losing_a_process_ends_the_others_with_an_error(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path, strategy: str
) -> None:
    def fit() -> None:
        module = small_embedder(tiny_backbone_dir)
        options: dict[str, Any] = {"devices": 2, "strategy": strategy, "max_steps": 20}
        make_trainer(tmp_path, KillLastRank(), **options).fit(module, small_data(tiny_mmeb_dir))

    with pytest.raises(RuntimeError, match=r"exit codes \[1, -9\]"):
        run_ranks(fit, timeout=120)


def run(nodes: int, *arguments: str) -> None:
    """Run a subcommand by so many nodes and wait for all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--nnodes", str(nodes)]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", place, "--rdzv_id", "test", "--local_addr"]
    command += ["127.0.0.1", "-m", "parallel_decoupling", *arguments, "--trainer.num_nodes", str(nodes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(nodes)]
    errors = [process.communicate(timeout=900)[1].decode() for process in started]
    assert [process.returncode for process in started] == [0] * nodes, errors


def test_two_nodes_fit_and_predict_like_one(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    config: dict[str, Any] = small_config(tiny_backbone_dir, tiny_mmeb_dir, max_steps=3, log_every_n_steps=1)
    config["trainer"]["logger"] = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path)}}
    losses, found = [], []
    for nodes in (1, 2):
        folder = tmp_path / str(nodes)
        config["trainer"]["logger"]["init_args"]["name"] = f"log_{nodes}"
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        root = ["--config", str(tmp_path / "config.yaml"), "--trainer.default_root_dir", str(folder)]
        run(nodes, "fit", *root)
        with next(tmp_path.glob(f"log_{nodes}/*/metrics.csv")).open() as file:
            losses.append([float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]])
        last = ["--ckpt_path", str(tmp_path / "1" / "checkpoints" / "last.ckpt")]
        source = [
            "--data.predict_source",
            str(Path(tiny_mmeb_dir) / "MMEB-eval"),
            "--trainer.logger",
            "false",
        ]
        run(nodes, "predict", *root, *source, *last, "--data.predict_rows_per_shard", "4")
        found.append(Store(folder / "embeddings"))
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert found[0].rows(range(len(found[0]))) == found[1].rows(range(len(found[1])))
    torch.testing.assert_close(found[1].column("aggregate"), found[0].column("aggregate"))
