"""Hashes that say whether two things are the same: rows of a task by their texts and pictures."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from parallel_decoupling.batch import RawInput

SAMPLE_BYTES = 4096


def rows_hash(rows: Iterable[RawInput], *, files: bool = True) -> str:
    """Identify rows by their texts and pictures, in order.

    Args:
        rows: texts with PIL images or image files; a file counts by its last two path parts, so that a
            benchmark may move.
        files: also count a file's size and three samples of its bytes; a missing file counts by name only.

    Returns:
        A SHA-256 in hexadecimal.
    """
    digest = sha256()
    for row in rows:
        digest.update(f"{len(row.text)} {len(row.images)} {row.text}\0".encode())
        for image in row.images:
            if isinstance(image, str):
                digest.update("/".join(Path(image).parts[-2:]).encode() + b"\0")
                digest.update(_file_sample(Path(image)) if files else b"")
            else:
                digest.update(f"{image.mode} {image.size} ".encode() + image.tobytes())
    return digest.hexdigest()


def _file_sample(file: Path) -> bytes:
    if not file.is_file():
        return b""
    size = file.stat().st_size
    with file.open("rb") as stream:
        parts = [str(size).encode()]
        for start in (0, size // 2, max(0, size - SAMPLE_BYTES)):
            stream.seek(start)
            parts.append(stream.read(SAMPLE_BYTES))
    return b"".join(parts)
