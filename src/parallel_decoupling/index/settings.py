"""What an index knows about itself, and the file ``index.json`` that says so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

SETTINGS_FILE = "index.json"
Kind = Literal["torch", "lance"]
Precision = Literal["float32", "int8", "binary"]
AGGREGATE, SUM, MAXSIM = "aggregate", "sum", "maxsim"


@dataclass(frozen=True)
class IndexSettings:
    """Settings of an index; those that the first items decide are empty or 0 before.

    Attributes:
        kind: which class reads the folder.
        path_names: names of the N paths; scorings and hits use them. A single ``aggregate`` stands for
            embeddings of which only the aggregate was kept.
        path_weights: of the aggregate, N numbers with sum 1.
        dim: D, numbers per embedding.
        precision: of the vectors that a search compares first.
        oversample: the ``top_k * oversample`` best of that comparison are scored again in float32.
        approximate: whether a search may look at some of the items only.
        metadata: of the caller, any JSON; ``lightning index`` puts the model here.
        concatenated: whether the model's aggregate is the concatenated paths, so that the scoring
            ``aggregate`` is ``sum``.
    """

    kind: Kind
    path_names: tuple[str, ...] = ()
    path_weights: tuple[float, ...] = ()
    dim: int = 0
    precision: Precision = "float32"
    oversample: int = 4
    approximate: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)
    concatenated: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision is {self.precision!r}; choose from {', '.join(get_args(Precision))}")
        if self.oversample < 1:
            raise ValueError(f"oversample is {self.oversample}; it must be at least 1")
        if len(set(self.path_names)) != len(self.path_names):
            raise ValueError(f"path_names {list(self.path_names)} repeat a name")
        for name in self.path_names:
            if name in (SUM, MAXSIM) or (name == AGGREGATE and self.num_paths > 1):
                raise ValueError(f"path_names {list(self.path_names)}: {name!r} is the name of a scoring")
        if self.path_weights and self.path_names and len(self.path_weights) != self.num_paths:
            raise ValueError(f"{len(self.path_weights)} path_weights for {self.num_paths} paths")

    @property
    def num_paths(self) -> int:
        """Embeddings per item, N."""
        return len(self.path_names)

    @property
    def scorings(self) -> tuple[str, ...]:
        """What ``search`` may score by."""
        return tuple(dict.fromkeys((AGGREGATE, SUM, MAXSIM, *self.path_names)))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the stored vectors: every path, and the aggregate where it is another vector."""
        single = self.num_paths == 1 or self.concatenated
        return self.path_names if single else (*self.path_names, AGGREGATE)

    def compared(self, scoring: str) -> str:
        """What a scoring compares: ``sum`` for the aggregate of concatenated paths, else itself."""
        return SUM if self.concatenated and scoring == AGGREGATE else scoring

    def fitted(self, num_paths: int, dim: int) -> IndexSettings:
        """Fill in what the first items decide.

        Raises:
            ValueError: the items do not have the index's number of paths or dimensions.
        """
        names = self.path_names or tuple(
            f"path_{path}" for path in range(len(self.path_weights) or num_paths)
        )
        if len(names) != num_paths or self.dim not in (0, dim):
            raise ValueError(
                f"embeddings [B, {num_paths}, {dim}] do not fit an index of "
                f"{len(names)} paths ({', '.join(names)}) with {self.dim or 'any number of'} dimensions"
            )
        weights = self.path_weights or (1 / num_paths,) * num_paths
        return replace(self, path_names=names, path_weights=weights, dim=dim)

    def check_folder(self, folder: str | Path) -> None:
        """Refuse to write beside an index of another kind, whose files would stay.

        Raises:
            ValueError: the folder holds one.
        """
        if Path(folder, SETTINGS_FILE).is_file():
            other = IndexSettings.from_folder(folder).kind
            if other != self.kind:
                raise ValueError(
                    f"{folder} holds an index of kind {other!r}; delete it, or name another folder "
                    f"for the kind {self.kind!r}"
                )

    def to_folder(self, folder: Path) -> None:
        """Write ``index.json``."""
        text = json.dumps(asdict(self), indent=2)
        (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_folder(cls, folder: str | Path, kind: Kind | None = None) -> IndexSettings:
        """Read ``index.json``.

        Args:
            folder: of an index.
            kind: that it must have; None allows all.

        Raises:
            ValueError: there is no index, or one of another kind or of a newer version.
        """
        file = Path(folder) / SETTINGS_FILE
        if not file.is_file():
            raise ValueError(f"{folder} holds no index (no {SETTINGS_FILE}); write one with lightning index")
        try:
            values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            for key in ("path_names", "path_weights"):
                values[key] = tuple(values[key])
            settings = cls(**values)
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(f"{file} is not the settings of an index: {error}") from error
        if kind is not None and settings.kind != kind:
            raise ValueError(f"{folder} holds an index of kind {settings.kind!r}, not {kind!r}")
        return settings
