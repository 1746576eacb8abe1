"""From what a user types to hits: a model and an index that belong together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor

from parallel_decoupling.index.filters import Filter
from parallel_decoupling.index.protocol import Hit, Index
from parallel_decoupling.index.settings import AGGREGATE


class QueryEncoder(Protocol):
    """What embeds queries; ``Embedder`` does."""

    @property
    def encoder(self) -> Any:
        """The model; its ``num_paths`` is read."""

    def encode_query(self, inputs: Iterable[Any], **options: Any) -> Tensor:
        """Embed queries with ``paths`` and perhaps ``instruction``."""


class Searcher:
    """Searches an index with texts, images or both.

    Args:
        embedder: of the model that the items were embedded with.
        index: of the items.
    """

    def __init__(self, embedder: QueryEncoder, index: Index) -> None:
        self.embedder, self.index = embedder, index

    def search(
        self,
        inputs: Sequence[Any],
        top_k: int = 10,
        scoring: str = "aggregate",
        filter: Filter | None = None,
        instruction: str | None = None,
    ) -> list[list[Hit]]:
        """Find the best items of every query.

        Args:
            inputs: texts, PIL images, image files or dictionaries of both, as ``Embedder.encode`` takes them.
            top_k: hits per query.
            scoring: see ``Index.search``.
            filter: see ``Index.search``.
            instruction: put before every text; by default the model's own for queries.

        Returns:
            As ``Index.search``.

        Raises:
            ValueError: an argument is not usable, or the model does not fit the index.
        """
        options = {} if instruction is None else {"instruction": instruction}
        embeddings = self.embedder.encode_query(inputs, paths=self._paths(), **options)
        queries_QND = embeddings.unsqueeze(1) if embeddings.ndim == 2 else embeddings
        truncate_dim = self.index.settings.metadata.get("truncate_dim")
        if truncate_dim is not None:
            queries_QND = queries_QND[..., :truncate_dim]
        return self.index.search(queries_QND, top_k, scoring, filter)

    def _paths(self) -> Literal["all", "aggregate"] | list[int]:
        """The model's paths that the index holds; a model exported with one path has only that."""
        names = self.index.settings.path_names
        if names == (AGGREGATE,):
            return "aggregate"
        if self.embedder.encoder.num_paths == 1:
            return "all"
        return [int(name.removeprefix("path_")) for name in names]
