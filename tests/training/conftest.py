"""A tiny benchmark on disk, and one thread, so that CPU results are equal bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.mmeb import save_tiny_mmeb


@pytest.fixture(scope="session")
def tiny_mmeb_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_mmeb(tmp_path_factory.mktemp("mmeb") / "data")


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
