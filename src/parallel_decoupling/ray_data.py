"""``predict`` on a Ray cluster: shards as the rows of a Ray dataset, written into the package's one store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from parallel_decoupling.data.row_sources import RowSource
from parallel_decoupling.data.unusable import attempt
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.encode import encode_rows
from parallel_decoupling.evaluation.store import AGGREGATE, Keeper, Store, chosen_columns, path_column
from parallel_decoupling.files import locked
from parallel_decoupling.model.identity import about_encoder, encoder_identity


class ShardEmbedder:
    """What every Ray worker holds: the model, the rows, and where their embeddings go."""

    def __init__(self, model: str, source: str, output_dir: str, rows_per_shard: int) -> None:
        self.embedder = Embedder.from_pretrained(model)
        self.rows = RowSource(source, self.embedder.candidate_instruction)
        limit, encoder = self.embedder.limit, self.embedder.encoder
        identity = encoder_identity(encoder, max_tokens=limit.max_tokens, long_text=limit.long_text)
        self.keeper = Keeper(output_dir, lambda: about_encoder(encoder, identity) | {"model": model})
        columns = list(chosen_columns(None, encoder.num_paths))
        self.about = {**self.rows.about, "columns": columns, "rows_per_shard": rows_per_shard}
        self.about |= {"num_rows": len(self.rows), "images": self.embedder.images.settings}
        self.writer = self.keeper.open(self.rows, self.about)
        self.embedder.to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, batch: Mapping[str, Sequence[int]]) -> Mapping[str, Sequence[int]]:
        """Embed and write the shards of these numbers; each file is there whole or not at all."""
        for shard in map(int, batch["shard"]):
            read, problems = attempt(self.rows.__getitem__, self.writer.rows_of(shard))
            options: dict[str, Any] = {"paths": "all", "keep_going": True}
            encoder, rows, numbers = self.embedder.encoder, list(read.values()), list(read)
            encoded = encode_rows(encoder, self.embedder.collator, rows, **options)
            bad = {row: str(problem) for row, problem in problems.items()}
            bad |= {numbers[place]: reason for place, reason in encoded.bad_rows.items()}
            good = [place for place, row in enumerate(numbers) if row not in bad]
            paths_BND = encoded.embeddings[good]
            vectors = {path_column(path): each for path, each in enumerate(paths_BND.unbind(1))}
            with torch.inference_mode():
                vectors[AGGREGATE] = encoder.aggregate(paths_BND.to(self.embedder.device)).float().cpu()
            self.keeper.write(self.rows, shard, [numbers[place] for place in good], vectors, bad)
        return batch


def embed_with_ray(
    model: str | Path,
    source: str | Path,
    output_dir: str | Path,
    *,
    num_workers: int,
    gpus_per_worker: float = 0.0,
    rows_per_shard: int = 4096,
) -> Store:
    """Embed a folder of Parquet files (or what else ``predict`` takes) with workers of a Ray cluster.

    What a lost worker had in hand goes to another, and a shard is written whole, so that no row is missing or
    there twice; a second call embeds what is missing. All workers must see the three places by these names.
    """
    import ray.data

    arguments = (*(str(Path(place).absolute()) for place in (model, source, output_dir)), rows_per_shard)
    with locked(output_dir):
        here = ShardEmbedder(*arguments)
        finished = here.keeper.finished(here.rows, here.about)
        if todo := [{"shard": shard} for shard in range(here.writer.num_shards) if shard not in finished]:
            shards = ray.data.from_items(todo, override_num_blocks=len(todo))
            pool = ray.data.ActorPoolStrategy(size=min(num_workers, len(todo)))
            options: dict[str, Any] = {"batch_size": 1, "compute": pool, "num_gpus": gpus_per_worker or None}
            shards.map_batches(ShardEmbedder, fn_constructor_args=arguments, **options).materialize()
    return Store(output_dir)
