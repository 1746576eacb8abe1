"""A Parquet folder embedded by two local Ray workers, one of which is killed twice, against ``encode``."""

import os
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from parallel_decoupling.evaluation import ray_data
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.ray_data import ShardEmbedder, embed_with_ray

pytestmark = pytest.mark.slow


class Killed(ShardEmbedder):
    """Its process is killed before it writes shard 1 and after it wrote shard 2, each once."""

    def __call__(self, batch: Any) -> Any:
        (shard,) = map(int, batch["shard"])
        mark = Path(self.keeper.root).parent / f"killed_{shard}"
        if shard in (1, 2) and not mark.exists():
            mark.touch()
            if shard == 2:
                super().__call__(batch)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


def test_a_killed_worker_loses_and_doubles_no_row(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    texts = [f"a red circle and {number} stars" for number in range(23)]
    (tmp_path / "rows").mkdir()
    for part, rows in enumerate((texts[:9], texts[9:])):
        pq.write_table(pa.table({"text": rows}), tmp_path / "rows" / f"part-{part}.parquet")
    monkeypatch.setattr(ray_data, "ShardEmbedder", Killed)
    monkeypatch.setenv("RAY_worker_niceness", "0")  # its default, 15, stands still beside other work
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        options = {"workers": 2, "rows_per_shard": 4}
        store = embed_with_ray(str(checkpoint), str(tmp_path / "rows"), tmp_path / "store", **options)
    finally:
        ray.shutdown()
    assert {file.name for file in tmp_path.glob("killed_*")} == {"killed_1", "killed_2"}
    assert [row["text"] for row in store.rows(range(len(store)))] == texts
    wanted = Embedder.from_pretrained(checkpoint).encode_document(texts, paths="all")
    torch.testing.assert_close(store.column("path_1"), wanted[:, 1])
