"""Short trainings."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.fit import Recorder, make_trainer, small_data, small_embedder


@pytest.fixture
def fit(tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path) -> Any:
    """``fit(steps, **settings)`` trains a small embedder; returns it and what every step logged."""

    def run(steps: int = 1, data: dict[str, Any] | None = None, **settings: Any) -> Any:
        module, recorder = small_embedder(tiny_backbone_dir, **settings), Recorder()
        trainer = make_trainer(tmp_path, recorder, max_steps=steps)
        trainer.fit(module, small_data(tiny_mmeb_dir, **(data or {})))
        return module, recorder.values

    return run
