"""Two nodes of one process each, as ``torchrun`` starts them, over loopback: equal to one process."""

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from parallel_decoupling.evaluation.store import Store
from tests.support.fit import small_config

pytestmark = pytest.mark.slow


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
