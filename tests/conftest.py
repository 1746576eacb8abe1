"""Fixtures and options that every test folder shares."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from parallel_decoupling import cli
from parallel_decoupling.evaluation.embedder import Embedder
from tests.support.embedders import tiny_embedder
from tests.support.families import save_tiny_backbone
from tests.support.mmeb import save_tiny_mmeb
from tests.support.tiny_clip import save_tiny_clip


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Let CPU results be equal bit for bit."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Refuse the network here and, by the path, in every Python process that a test starts."""
    import tests.support.offline.sitecustomize as offline

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(offline.__file__).parent), prepend=os.pathsep)
        yield


@pytest.fixture
def image_file(tmp_path: Path) -> str:
    """A small picture whose suffix has capitals."""
    file = tmp_path / "picture.PNG"
    Image.new("RGB", (30, 20), "red").save(file)
    return str(file)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Leave the user's cache alone, and undo what ``seed_everything`` leaves behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARALLEL_DECOUPLING_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "0")
        yield


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Start each test from the same random state and default dtype."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def tiny_backbone_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random-weight two-layer Qwen2-VL, tokenizer and processor."""
    return save_tiny_backbone(tmp_path_factory.mktemp("tiny_backbone"))


@pytest.fixture(scope="session")
def three_layers_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A backbone as in ``tiny_backbone_dir`` with a third layer."""
    return save_tiny_backbone(tmp_path_factory.mktemp("three_layers"), num_layers=3)


@pytest.fixture(scope="session")
def embedder(tiny_backbone_dir: str) -> Embedder:
    """Three paths on the tiny backbone."""
    return tiny_embedder(tiny_backbone_dir)


@pytest.fixture(scope="session")
def tiny_clip_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random-weight OpenCLIP model."""
    return save_tiny_clip(tmp_path_factory.mktemp("tiny_clip"))


@pytest.fixture(scope="session")
def tiny_mmeb_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a benchmark of two tasks in MMEB's layout."""
    return save_tiny_mmeb(tmp_path_factory.mktemp("mmeb") / "data")


@pytest.fixture(scope="session")
def checkpoint(tiny_backbone_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of an untrained model with two paths."""
    from tests.support.fit import make_trainer, small_embedder

    folder = tmp_path_factory.mktemp("checkpoint")
    trainer = make_trainer(folder)
    trainer.strategy.connect(small_embedder(tiny_backbone_dir))
    trainer.save_checkpoint(folder / "tiny.ckpt", weights_only=True)
    return folder / "tiny.ckpt"


@pytest.fixture(scope="session")
def trained_run(tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps, to be read only."""
    from tests.support.fit import make_trainer, small_data, small_embedder

    folder = tmp_path_factory.mktemp("trained_run")
    trainer = make_trainer(folder, max_steps=2)
    options = {"query_instruction": "find", "aggregation": "learned", "learn_temperature": True}
    trainer.fit(small_embedder(tiny_backbone_dir, **options), small_data(tiny_mmeb_dir, image_size="low"))
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture
def mistake(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """``mistake(arguments)``: standard error of a command that must end with exit code 2, in one message."""

    def run(arguments: list[str]) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert "Traceback" not in error
        return error

    return run


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """``start("serve", ...)`` runs a subcommand on a free port; see ``servers``."""
    from tests.support.servers import servers

    with servers(tmp_path) as run:
        yield run
