"""What importing the package does and does not do, seen in one fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import parallel_decoupling

ROOT = Path(next(iter(parallel_decoupling.__path__)))

# Sockets refuse first; then the layers are imported in this order, and after each one the third-party
# packages loaded so far are noted.
SCRIPT = """
import importlib, json, socket, sys
sys.path[:0] = [{folder!r}]
calls = []
def refuse(*arguments, **_):
    calls.append(repr(arguments[-1]))
    raise OSError("this test allows no network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
loaded = {{}}
for layer, modules in json.loads({layers!r}).items():
    for module in modules:
        importlib.import_module(module)
    loaded[layer] = [name for name in {watched!r} if name in sys.modules]
print(json.dumps({{"loaded": loaded, "calls": calls}}))
"""
WATCHED = ("torch", "lightning", "pytorch_lightning", "transformers", "peft", "matplotlib.pyplot", "lancedb")


def modules(layer: str) -> list[str]:
    """All modules of a layer, without the one that is a LightningDataModule."""
    files = sorted(
        file for file in (ROOT / layer).rglob("*.py") if file.stem not in ("__init__", "datamodule")
    )
    return [
        ".".join(("parallel_decoupling", *file.relative_to(ROOT).with_suffix("").parts)) for file in files
    ]


@pytest.fixture(scope="module")
def imported() -> dict[str, dict[str, list[str]]]:
    layers = {"package": ["parallel_decoupling"]}
    layers |= {layer: modules(layer) for layer in ("objective", "data", "retrieval", "index", "model")}
    assert all(layers.values()), "a layer without modules would check nothing"
    script = SCRIPT.format(folder=str(ROOT.parent), layers=json.dumps(layers), watched=WATCHED)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_package_itself_imports_neither_torch_nor_lightning(
    imported: dict[str, dict[str, list[str]]],
) -> None:
    assert imported["loaded"]["package"] == []


@pytest.mark.parametrize("layer", ["objective", "data", "retrieval", "index", "model"])
def test_layer_does_not_import_lightning(layer: str, imported: dict[str, dict[str, list[str]]]) -> None:
    assert not {"lightning", "pytorch_lightning"} & set(imported["loaded"][layer])


@pytest.mark.parametrize("layer", ["objective", "data", "retrieval", "index"])
def test_layer_does_not_import_transformers(layer: str, imported: dict[str, dict[str, list[str]]]) -> None:
    assert not {"transformers", "peft"} & set(imported["loaded"][layer])


def test_model_layer_does_import_transformers(imported: dict[str, dict[str, list[str]]]) -> None:
    assert "transformers" in imported["loaded"]["model"], "the checks above would see it"


def test_retrieval_does_not_import_pyplot(imported: dict[str, dict[str, list[str]]]) -> None:
    assert "matplotlib.pyplot" not in imported["loaded"]["retrieval"]


def test_index_does_not_import_its_extra(imported: dict[str, dict[str, list[str]]]) -> None:
    assert "lancedb" not in imported["loaded"]["index"]


def test_importing_makes_no_network_call(imported: dict[str, dict[str, list[str]]]) -> None:
    assert imported["calls"] == []
