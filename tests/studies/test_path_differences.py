from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from studies import path_differences
from studies.path_differences import CELLS


def test_every_run_is_analysed_into_a_folder_of_its_own_and_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[str] = []

    def stand_in(run: str, output_dir: str) -> None:
        content: dict[str, Any] = {
            "similarity": {
                **{name: [[1.0, 0.2], [0.2, 1.0]] for name in ("cosine", "cka")},
                "pairs": [[0, 1]],
                "angles": [[10.0, 20.0]],
                "rank": [3.0, 4.0],
                "joined_rank": 5.0,
            },
            "errors": {
                "kappa": [[1.0, 0.4], [0.4, 1.0]],
                "scores": {"best_path": 0.5, "aggregate": 0.6, "oracle": 0.7},
            },
        }
        assert Path(run).name == Path(output_dir).name
        Path(output_dir).mkdir()
        (Path(output_dir) / "paths.json").write_text(json.dumps(content), encoding="utf-8")

    monkeypatch.setattr(path_differences, "ensure_scored", lambda run: scored.append(run.name))
    monkeypatch.setattr(path_differences, "analyse_paths", stand_in)
    path_differences.run(tmp_path)
    assert scored == [f"{cell}_seed4" for cell in CELLS]
    cells = "| 0.200 | 0.200 | 15 | 3.5 | 5.0 | 0.400 | 50.0 | 60.0 | 70.0 |"
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[-3:] == [f"| {name} {cells}" for name in scored]
