"""Fixtures and options that every test folder shares."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.tiny import save_tiny_backbone


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register ``--runslow``."""
    parser.addoption("--runslow", action="store_true", help="run the tests marked slow, too")


def pytest_configure(config: pytest.Config) -> None:
    """Register the ``slow`` marker."""
    config.addinivalue_line("markers", "slow: takes minutes; deselected unless --runslow is given")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect slow tests unless asked for."""
    if config.getoption("--runslow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


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
