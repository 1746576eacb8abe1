"""From what a user types to hits: a model and an index that belong together.

Here: which of the model's paths are the index's, by their weights. Elsewhere: what a search compares
(``scoring``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor

from parallel_decoupling.index.filters import Filter
from parallel_decoupling.index.protocol import Hit, Index
from parallel_decoupling.index.settings import AGGREGATE
from parallel_decoupling.model.identity import path_hashes

PATH_HASHES = "path_sha256"
"""Key of an index's metadata: ``path_hashes`` of the model that embedded the items."""
_HOW_TO_CHECK = (
    "run lightning predict and lightning index again, or in Python make the index with "
    f"metadata={{'{PATH_HASHES}': path_hashes(model.encoder)}}"
)


class QueryEncoder(Protocol):
    """What embeds queries; ``Embedder`` does."""

    @property
    def encoder(self) -> Any:
        """The model; its ``num_paths`` and parameters are read."""

    def encode_query(self, inputs: Iterable[Any], **options: Any) -> Tensor:
        """Embed queries with ``paths`` and perhaps ``instruction``."""


class Searcher:
    """Searches an index with texts, images or both.

    An index whose metadata has ``path_sha256``, as that of ``lightning index``, is only searched with the
    weights that its items were embedded with; an exported model may have some of the paths, in any order.
    Without, path n of the model is taken for ``path_n``.

    Args:
        embedder: of the model that the items were embedded with.
        index: of the items.

    Raises:
        ValueError: the model has other weights than the one of the items, or other paths.
    """

    def __init__(self, embedder: QueryEncoder, index: Index) -> None:
        self.embedder, self.index = embedder, index
        metadata = index.settings.metadata
        self._hashes = path_hashes(embedder.encoder) if PATH_HASHES in metadata else None
        if self._hashes is None and metadata.get("model"):
            warnings.warn(
                f"the index does not say which weights its items were embedded with; {metadata['model']} may "
                f"have been trained on since. To have that checked, {_HOW_TO_CHECK}.",
                stacklevel=2,
            )
        if index.settings.path_names:
            self._numbers()

    @property
    def scorings(self) -> tuple[str, ...]:
        """What may be searched by: all scorings of the index if the model has all of its paths."""
        found, settings = self._numbers(), self.index.settings
        return settings.scorings if len(found) == settings.num_paths else tuple(found)

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
            scoring: see ``Index.search``; with a model that has only some of the index's paths one of those.
            filter: see ``Index.search``.
            instruction: put before every text; by default the model's own for queries.

        Returns:
            As ``Index.search``.

        Raises:
            ValueError: an argument is not usable, or the model does not fit the index.
        """
        found, settings = self._numbers(), self.index.settings
        if len(found) < settings.num_paths and scoring in settings.scorings and scoring not in found:
            raise ValueError(
                f"of the index's {', '.join(settings.path_names)} the model has {', '.join(found)}: use the "
                f"scoring {' or '.join(found)}, or a model with all of them"
            )
        paths: Any = list(found.values()) if len(found) == settings.num_paths else [found.get(scoring, 0)]
        if settings.path_names == (AGGREGATE,):
            paths = AGGREGATE
        options = {} if instruction is None else {"instruction": instruction}
        embeddings = self.embedder.encode_query(inputs, paths=paths, **options)
        queries_QND = embeddings.unsqueeze(1) if embeddings.ndim == 2 else embeddings
        return self.index.search(queries_QND, top_k, scoring, filter)

    def _numbers(self) -> dict[str, int]:
        """The model's number of each path of the index, as far as it has them."""
        settings, num_paths = self.index.settings, self.embedder.encoder.num_paths
        if self._hashes is None:
            return _numbers_by_name(settings.path_names, num_paths)
        items = settings.metadata[PATH_HASHES]
        if settings.path_names == (AGGREGATE,):
            found = {AGGREGATE: 0} if self._hashes == items else {}
        else:
            hashes = {name: items[int(name.removeprefix("path_"))] for name in settings.path_names}
            found = {name: self._hashes.index(each) for name, each in hashes.items() if each in self._hashes}
        if settings.path_names and not found:
            raise ValueError(
                "the model has other weights than the one that embedded the index's items "
                f"({settings.metadata.get('model') or 'no checkpoint'}): it was trained on since, is another "
                "model, was exported with merged adapters, or lacks paths that the index needs. Search with "
                "the model of then (--model), or embed the items with this one (lightning predict, lightning "
                "index)"
            )
        return found


def _numbers_by_name(names: Sequence[str], num_paths: int) -> dict[str, int]:
    """Path numbers where no hashes tell them."""
    if len(names) == num_paths == 1 or tuple(names) == (AGGREGATE,):
        return dict.fromkeys(names, 0)
    numbers = {name: int(name.removeprefix("path_")) for name in names}
    if max(numbers.values(), default=0) >= num_paths:
        raise ValueError(
            f"the index has {', '.join(names)}, the model has {num_paths} paths, and nothing says which of "
            f"them these are: search with the whole model, or {_HOW_TO_CHECK}"
        )
    return numbers
