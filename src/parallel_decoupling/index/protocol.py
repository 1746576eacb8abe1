"""What every index does: four methods, and the hits that they return.

Here: the interface. Elsewhere on purpose: the exact index (``torch_index``), the one on disk
(``lance_index``), what a scoring means (``scoring``), what a filter may say (``filters``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import pyarrow as pa
from torch import Tensor

from parallel_decoupling.index.filters import Filter
from parallel_decoupling.index.settings import IndexSettings

if TYPE_CHECKING:
    from typing_extensions import Self

Fields: TypeAlias = Mapping[str, Sequence[Any]] | pa.Table
"""Columns by name, one value per item."""


@dataclass(frozen=True)
class Hit:
    """One found item.

    Attributes:
        id: as given to ``add``.
        score: by the scoring of the search, float32, in [-1, 1]; higher is better.
        similarities: cosine of query and item on each path, by path name; only the searched path where
            the query has only that one.
        fields: the item's source fields.
    """

    id: str
    score: float
    similarities: Mapping[str, float]
    fields: Mapping[str, Any]


class Index(Protocol):
    """A searchable set of items with N embeddings each."""

    @property
    def settings(self) -> IndexSettings:
        """Names and number of the paths, precision, and the metadata."""

    def __len__(self) -> int:
        """Items in the index."""

    def add(self, ids: Sequence[Any], embeddings: Tensor, fields: Fields | None = None) -> None:
        """Add items.

        Args:
            ids: unique; kept as strings.
            embeddings: ``[B, N, D]`` of any float type; brought to unit norm in float32.
            fields: source fields for filters and display; every call has the same names.

        Raises:
            ValueError: sizes, an id, a field or an embedding is not usable; the index is unchanged.
        """

    def search(
        self,
        queries: Tensor,
        top_k: int = 10,
        scoring: str = "aggregate",
        filter: Filter | None = None,
    ) -> list[list[Hit]]:
        """Find the best items of every query.

        Args:
            queries: ``[Q, N, D]``; for the scoring by one path also ``[Q, 1, D]``, that path alone.
            top_k: hits per query, at least 1.
            scoring: ``aggregate`` (the model's), ``sum`` (of aligned paths), ``maxsim`` or a path's name
                (``path_0``).
            filter: conditions on fields, all of which hold; see ``filters``.

        Returns:
            For every query at most ``top_k`` hits, best first.

        Raises:
            ValueError: an argument is not usable.
        """

    def save(self, folder: str | Path) -> None:
        """Write everything to a folder, replacing an index that is there.

        Raises:
            ValueError: the index is empty.
        """

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Open a saved index.

        Raises:
            ValueError: the folder holds no index of this kind.
        """
