"""Names from outside: which of them may become files, file names as ids, and texts that are safe to print."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, unquote_to_bytes

MAX_NAME_BYTES = 200
ENCODED = "bytes:"  # start of an id that stands for a file name by its bytes, as in a URL

_FILE_NAME = re.compile(r"(?!\.)[\w.-]+")
_UNPRINTABLE = re.compile(r"[\0-\t\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys, what turns the direction of writing, and what stands for bytes in a file name."""


def check_file_name(name: str, what: str) -> None:
    """Raise ``ValueError`` for a name that must not become the name of a file or folder."""
    if not _FILE_NAME.fullmatch(name) or len(name.encode()) > MAX_NAME_BYTES:
        rule = f"letters, digits and ._- only, no dot at the start, at most {MAX_NAME_BYTES} bytes"
        shown = name if len(name) <= MAX_NAME_BYTES else f"{name[:MAX_NAME_BYTES]}…"
        raise ValueError(f"The {what} {shown!r} becomes a file, so its name must have {rule}. Rename it.")


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; a ``ValueError`` if a name is there twice, of which only one would count."""
    if len(named := dict(pairs)) < len(pairs):
        ((name, count),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r} is there {count} times in one object. Keep one.")
    return named


def id_of_file(name: str) -> str:
    """Write a file name as text that ``file_of_id`` reads back; only names that are not UTF-8 change."""
    content = os.fsencode(name)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return ENCODED + quote(content)
    return ENCODED + quote(content) if text.startswith(ENCODED) else text


def file_of_id(text: str) -> str:
    """Return the file name that ``id_of_file`` wrote."""
    is_encoded = text.startswith(ENCODED)
    return os.fsdecode(unquote_to_bytes(text.removeprefix(ENCODED)) if is_encoded else text.encode())


def printable(text: str) -> str:
    """Escape control characters and lone surrogates, such as those of names that are not UTF-8."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
