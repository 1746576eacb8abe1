"""``predict`` on a Ray cluster: shards as the rows of a Ray dataset, written into the package's one store."""

from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import Subset

from parallel_decoupling.data.row_sources import RowSource
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.encode import encode_rows
from parallel_decoupling.evaluation.store import (
    AGGREGATE,
    ROWS_PER_SHARD,
    Keeper,
    Store,
    chosen_columns,
    path_vectors,
)
from parallel_decoupling.files import locked
from parallel_decoupling.model.identity import about_encoder
from parallel_decoupling.option_types import PositiveInt, checked


class ShardEmbedder:
    """What every Ray worker holds: the model, the rows, and where their embeddings go."""

    def __init__(self, model: str, source: str, output_dir: str, rows_per_shard: int) -> None:
        self.embedder = Embedder.from_pretrained(model)
        self.rows = RowSource(source, self.embedder.candidate_instruction)
        about = about_encoder(self.embedder.encoder, **vars(self.embedder.limit)) | {"model": model}
        columns = chosen_columns(None, self.embedder.num_paths)
        self.keeper = Keeper(output_dir, lambda: about)
        self.about = {**self.rows.about, "columns": list(columns), "rows_per_shard": rows_per_shard}
        self.about |= {"num_rows": len(self.rows), "images": self.embedder.images.settings}
        self.writer = self.keeper.open(self.rows, self.about)
        self.embedder.to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, batch: Any) -> Any:
        """Embed and write the shards of these numbers; each file is there whole or not at all."""
        encoder, collator = self.embedder.encoder, self.embedder.collator
        for shard in map(int, batch["shard"]):
            rows = cast(Any, Subset)(self.rows, self.writer.rows_of(shard))
            encoded = encode_rows(encoder, collator, rows, paths="all", keep_going=True)
            good = [place for place in range(len(rows)) if place not in encoded.bad_rows]
            paths_BND = encoded.embeddings[good]
            with torch.inference_mode():
                aggregate_BD = encoder.aggregate(paths_BND.to(self.embedder.device)).float().cpu()
            vectors = {AGGREGATE: aggregate_BD, **path_vectors(paths_BND)}
            bad = {rows.indices[place]: reason for place, reason in encoded.bad_rows.items()}
            self.writer.write(shard, [rows.indices[place] for place in good], vectors, bad)
        return batch


@checked()
def embed_with_ray(
    model: str,
    source: str,
    output_dir: str | Path,
    workers: PositiveInt,
    rows_per_shard: PositiveInt = ROWS_PER_SHARD,
) -> Store:
    """Embed a folder of Parquet files, or what else ``predict`` takes, with workers of a Ray cluster.

    What a lost worker had in hand goes to another, and a shard is written whole, so that no row is missing or
    there twice; a second call embeds what is missing. All workers must see the three places by these names;
    each has a GPU where the cluster has some.
    """
    import ray.data

    arguments: Any = (*(str(Path(place).absolute()) for place in (model, source, output_dir)), rows_per_shard)
    with locked(output_dir):
        here = ShardEmbedder(*arguments)
        finished = here.keeper.finished(here.rows, here.about)
        if todo := [{"shard": shard} for shard in range(here.writer.num_shards) if shard not in finished]:
            options: dict[str, Any] = {"fn_constructor_args": arguments, "batch_size": 1}
            options["num_gpus"] = 1 if cast(Any, ray).cluster_resources().get("GPU") else None
            options["compute"] = ray.data.ActorPoolStrategy(size=min(workers, len(todo)))
            shards = ray.data.from_items(todo, override_num_blocks=len(todo))
            shards.map_batches(ShardEmbedder, **options).materialize()
    return Store(output_dir)
