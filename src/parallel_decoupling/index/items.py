"""What ``add`` was given, checked: ids, unit vectors, and fields as one table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa
from torch import Tensor

from parallel_decoupling.index.scoring import aggregate, unit
from parallel_decoupling.index.settings import AGGREGATE, MAXSIM, SUM, IndexSettings

ID = "id"


def prepare_items(
    ids: Sequence[Any],
    embeddings: Tensor,
    fields: Mapping[str, Sequence[Any]] | pa.Table | None,
    settings: IndexSettings,
) -> tuple[IndexSettings, Tensor, pa.Table]:
    """Check new items.

    Args:
        ids: one per item.
        embeddings: ``[B, N, D]``.
        fields: one value per item and field.
        settings: of the index.

    Returns:
        The settings with what the first items decide, unit vectors ``[B, N, D]``, and a table of the
        ids (strings) and fields.

    Raises:
        ValueError: sizes that do not fit, a repeated id, a reserved field name or an unusable embedding.
    """
    if embeddings.ndim != 3 or not embeddings.is_floating_point():
        raise ValueError(
            f"embeddings are {embeddings.dtype} of shape {list(embeddings.shape)}; pass floats [B, N, D]"
        )
    names = [str(name) for name in ids]
    if len(names) != len(embeddings):
        raise ValueError(f"{len(names)} ids for {len(embeddings)} embeddings")
    settings = settings.fitted(embeddings.shape[1], embeddings.shape[2])
    table = _table(names, fields, settings)
    return settings, unit(embeddings, "item", names), table


def check_new_ids(ids: Sequence[str], known: Collection[str]) -> None:
    """Refuse an id that is there already or that comes twice.

    Raises:
        ValueError: names it.
    """
    seen: set[str] = set()
    for row, name in enumerate(ids):
        if name in known or name in seen:
            raise ValueError(f"item {row}: the id {name!r} is in the index already; ids must be unique")
        seen.add(name)


def vectors_of(embeddings_BND: Tensor, settings: IndexSettings) -> dict[str, Tensor]:
    """The vectors of ``settings.columns``: every path's, and the aggregates."""
    vectors = {name: embeddings_BND[:, path] for path, name in enumerate(settings.path_names)}
    if AGGREGATE in settings.columns and AGGREGATE not in vectors:
        vectors[AGGREGATE] = aggregate(embeddings_BND, settings.path_weights)
    return vectors


def join_fields(old: pa.Table | None, new: pa.Table) -> pa.Table:
    """Put new rows below old ones.

    Raises:
        ValueError: the fields differ in name or type.
    """
    if old is None:
        return new
    if set(old.column_names) != set(new.column_names):
        raise ValueError(
            f"the new items have the fields {new.column_names}, those of the index are {old.column_names}"
        )
    try:
        return pa.concat_tables([old, new], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(
            f"the new items have fields of other types than those of the index: {error}"
        ) from error


def _table(
    ids: list[str], fields: Mapping[str, Sequence[Any]] | pa.Table | None, settings: IndexSettings
) -> pa.Table:
    columns: dict[str, Any] = {ID: pa.array(ids, pa.string())}
    source = {} if fields is None else fields
    names = source.column_names if isinstance(source, pa.Table) else list(source)
    for name in names:
        if name in (ID, AGGREGATE, SUM, MAXSIM, *settings.path_names) or name.startswith("_"):
            raise ValueError(f"a field may not be called {name!r}: the index uses that name")
        if "`" in name or "." in name:
            raise ValueError(
                f"the field name {name!r} has a character that filters cannot express; rename it"
            )
        column = source[name]
        try:
            columns[name] = column if isinstance(source, pa.Table) else pa.array(column)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(f"field {name!r} holds values of different types: {error}") from error
        if len(columns[name]) != len(ids):
            raise ValueError(f"field {name!r} has {len(columns[name])} values for {len(ids)} items")
    return pa.table(columns)
