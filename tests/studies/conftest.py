from __future__ import annotations

import pytest

from tests.support.mmeb import save_tiny_mmeb


@pytest.fixture(scope="session")
def tiny_mmeb_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A benchmark of two subsets with pictures."""
    return save_tiny_mmeb(tmp_path_factory.mktemp("tiny_mmeb") / "data")
