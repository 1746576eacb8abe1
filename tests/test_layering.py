"""What importing the package loads, seen in fresh interpreters, and what is defined once."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import parallel_decoupling

ROOT = Path(next(iter(parallel_decoupling.__path__)))
REFUSE = """
import importlib, json, socket, sys
sys.path[:0] = [{folder!r}]
calls = []
def refuse(*arguments, **_):
    calls.append(repr(arguments[-1]))
    raise OSError("this test allows no network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
"""
LAYERS = """
loaded = {{}}
for layer, modules in json.loads({layers!r}).items():
    for module in modules:
        importlib.import_module(module)
    loaded[layer] = [name for name in {watched!r} if name in sys.modules]
print(json.dumps({{"loaded": loaded, "calls": calls}}))
"""
WATCHED = ("torch", "lightning", "pytorch_lightning", "transformers", "peft", "matplotlib.pyplot", "lancedb")
WITH_LIGHTNING = ("__init__", "datamodule", "run", "embedding_writer")
REPORTS = [f"parallel_decoupling.{name}" for name in ("evaluation.report", "evaluation.compare")]
REPORTS += [f"parallel_decoupling.{name}" for name in ("evaluation.plots", "search", "serve")]


def run(script: str) -> Any:
    """Run a script in a fresh interpreter; the last line that it prints is JSON."""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def modules(layer: str) -> list[str]:
    """All modules of a layer without those that are made for Lightning."""
    files = sorted(file for file in (ROOT / layer).rglob("*.py") if file.stem not in WITH_LIGHTNING)
    return [
        ".".join(("parallel_decoupling", *file.relative_to(ROOT).with_suffix("").parts)) for file in files
    ]


@pytest.fixture(scope="module")
def imported() -> Any:
    layers = {"package": ["parallel_decoupling"]}
    layers |= {layer: modules(layer) for layer in ("objective", "data", "model", "evaluation")}
    layers["search"] = ["parallel_decoupling.search", "parallel_decoupling.lance_index"]
    assert all(layers.values()), "a layer without modules would check nothing"
    script = (REFUSE + LAYERS).format(folder=str(ROOT.parent), layers=json.dumps(layers), watched=WATCHED)
    return run(script)


def test_importing_makes_no_network_call(imported: Any) -> None:
    assert imported["calls"] == []


def test_what_each_layer_loads(imported: Any) -> None:
    """In the order of the layers; each list holds what the ones before it loaded, too."""
    assert imported["loaded"] == {
        "package": [],
        "objective": ["torch"],
        "data": ["torch"],
        "model": ["torch", "transformers"],
        "evaluation": ["torch", "transformers"],
        "search": ["torch", "transformers"],
    }


def test_the_algorithm_loads_little_of_this_package_and_no_report() -> None:
    """Nothing that shows a number is an ancestor of what makes it."""
    script = REFUSE.format(folder=str(ROOT.parent)) + (
        "import lightning.pytorch\n"  # torchmetrics imports pyplot
        "sys.modules.pop('matplotlib.pyplot', None)\n"
        "from parallel_decoupling import PDFEmbedder\n"
        "print(json.dumps({name: getattr(module, '__file__', None) for name, module in sys.modules.items()\n"
        "    if name.startswith('parallel_decoupling') or name == 'matplotlib.pyplot'}))"
    )
    files = run(script)
    assert not {*REPORTS, "matplotlib.pyplot"} & files.keys()
    assert sum(len(Path(file).read_text(encoding="utf-8").splitlines()) for file in files.values()) < 5000


@pytest.mark.parametrize(
    ("pattern", "home"),
    [
        (r"def similarities\(", "evaluation/score.py"),
        (r"METADATA_KEY(: \w+)? = ", "evaluation/store.py"),
        *(
            (rf"def {name}\(", "model/identity.py")
            for name in ("weights_hash", "path_hashes", "backbone_fingerprint", "processor_hash")
        ),
        (r"def (rows_hash|encoder_identity)\(", "model/identity.py"),
    ],
)
def test_what_must_agree_is_defined_once(pattern: str, home: str) -> None:
    found = [file for file in ROOT.rglob("*.py") if re.search(pattern, file.read_text(encoding="utf-8"))]
    assert [str(file.relative_to(ROOT)) for file in found] == [home]


def test_only_identity_hashes_weights_and_rows() -> None:
    """Elsewhere ``hashlib`` makes seeds, ids of targets and of rows, and the key of the generator's cache."""
    files = {file.stem for file in ROOT.rglob("*.py") if "hashlib" in file.read_text(encoding="utf-8")}
    assert files <= {"identity", "grad_cache", "collate", "tables", "benchmark"}


CALLS = {"getaddrinfo": ("example.org", 80), "create_connection": (("192.0.2.1", 80), 1)}


@pytest.mark.parametrize("name", CALLS)
def test_no_test_and_no_process_of_one_reaches_the_network(name: str) -> None:
    with pytest.raises(AssertionError, match="tests use no network"):
        getattr(socket, name)(*CALLS[name])
    command = [sys.executable, "-c", f"import socket; socket.{name}{CALLS[name]}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "tests use no network" in result.stderr
