"""Files and folders that are named in what may leave the machine: exports, embeddings and their indexes.

They are named from the folder that holds the name, if they are below or beside it, and so move with it.
Others are left out, as an absolute path means nothing elsewhere and gives away user names.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""The name of a model on the hub, which a relative path may look like."""
_OPEN_CLIP = r"(open_clip:[^/]+/)?"
_ABSOLUTE = re.compile(rf"{_OPEN_CLIP}((?:[/~]|[A-Za-z]:[\\/]).*)", re.DOTALL)
_RELATIVE = re.compile(rf"{_OPEN_CLIP}(\.\.?(?:/.*)?)", re.DOTALL)


def portable(values: Any, folder: str | Path) -> Any:
    """Return plain values with every absolute path as one that starts with ``.``, or None.

    Instructions are left alone. A path that is neither below ``folder`` nor below its parent becomes None.
    """
    holder = os.path.abspath(folder)

    def relative(path: str) -> str | None:
        path = os.path.abspath(os.path.expanduser(path))
        beside = os.path.dirname(holder)
        if beside == os.path.dirname(beside) or os.path.commonpath([beside, path]) != beside:
            return None
        found = Path(os.path.relpath(path, holder)).as_posix()
        return found if found.split("/")[0] in (".", "..") else f"./{found}"

    return _replaced(values, _ABSOLUTE, relative)


def located(values: Any, folder: str | Path) -> Any:
    """Return what ``portable`` made for ``folder`` with absolute paths again."""
    return _replaced(values, _RELATIVE, lambda path: os.path.abspath(os.path.join(folder, path)))


def _replaced(values: Any, pattern: re.Pattern[str], change: Callable[[str], str | None]) -> Any:
    if isinstance(values, Mapping):
        return {
            key: value if str(key).endswith("instruction") else _replaced(value, pattern, change)
            for key, value in values.items()
        }
    if isinstance(values, list | tuple):
        return [_replaced(value, pattern, change) for value in values]
    if not isinstance(values, str) or not (match := pattern.fullmatch(values)):
        return values
    changed = change(match[2])
    return changed and f"{match[1] or ''}{changed}"
