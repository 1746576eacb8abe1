"""The check of a GPU without one: every section on the CPU, and the published geometry on the meta device."""

import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import FAILED, SECTIONS, check
from benchmarks.gpu_machine import SIZES, Machine, published_peak, random_backbone
from parallel_decoupling.model.adapters import adapted_layers
from tests.support.published_sizes import save_published

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_check_runs_to_its_end_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--size", "small"]
    done = subprocess.run([*command, "--output_dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert list(report) == list(SECTIONS)
    assert {name: result["state"] for name, result in report.items()} == dict.fromkeys(SECTIONS, "ok")
    assert all(result["rows"] for result in report.values())


def test_a_section_that_fails_says_why_and_harms_no_other(tmp_path: Path) -> None:
    machine = Machine("cpu", SIZES["small"], str(tmp_path / "missing"), time.monotonic() + 60, peak=1e12)
    assert pickle.loads(pickle.dumps(machine)) == machine  # a GPU's sections start without a fork
    failed = check("encode", machine, tmp_path)
    assert failed["state"] == FAILED
    assert "missing" in failed["reason"]
    assert check("products", machine, tmp_path)["state"] == "ok"


def test_the_published_geometry_is_built_from_its_config_alone(tmp_path: Path) -> None:
    backbone = random_backbone(save_published("Qwen/Qwen2-VL-2B-Instruct", tmp_path), "meta")
    frozen = sum(p.numel() for p in backbone.base.parameters() if not p.requires_grad)
    assert round(frozen / 1e9, 2) == 2.21
    assert len(adapted_layers(backbone.base)) == 28 * 7


def test_a_card_has_its_own_published_peak() -> None:
    assert published_peak("NVIDIA H100 PCIe") == 756e12
    assert published_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert published_peak("NVIDIA L40S") == 362e12
    assert published_peak("Quadro") is None
