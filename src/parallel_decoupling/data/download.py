"""MMEB from the Hugging Face hub into a data folder, unless a subset or task is there already."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from parallel_decoupling.files import workplace

TRAIN_REPO, EVAL_REPO = "TIGER-Lab/MMEB-train", "TIGER-Lab/MMEB-eval"
GHOSTS = ("._", "__MACOSX", ".DS_Store")
"""Beginnings of the names that macOS adds to archives."""
MAX_ENTRIES = 10_000_000
MAX_GROWTH = 100
"""Bytes that an archive may hold per byte of its own; pictures hardly shrink."""


def download_train(data_dir: Path, subsets: Sequence[str], split: str) -> None:
    """Fetch tables and pictures of the training subsets that ``data_dir/MMEB-train`` lacks."""
    root = data_dir / "MMEB-train"
    tables = [name for name in subsets if not any((root / name).glob(f"{split}-*.parquet"))]
    places = {name: (root / "images" / name, root / name / "Train") for name in subsets}
    archives = {name: f"images_zip/{name}.zip" for name in subsets if not any(map(Path.is_dir, places[name]))}
    _fetch(TRAIN_REPO, root, [*(f"{name}/{split}-*.parquet" for name in tables), *archives.values()])
    for name, archive in archives.items():
        unpack(root / archive, root / "images", [name], inside=name)


def download_eval(data_dir: Path, tasks: Sequence[str]) -> None:
    """Fetch tables and pictures (one archive) of the evaluation tasks that ``data_dir/MMEB-eval`` lacks."""
    root = data_dir / "MMEB-eval"
    tables = [name for name in tasks if not any((root / name).glob("test-*.parquet"))]
    loose = {name for name in tasks if any(file.suffix != ".parquet" for file in (root / name).glob("*"))}
    pictures = [name for name in tasks if name not in loose and not (root / "images" / name).is_dir()]
    archive = root / "images.zip"
    archives = [archive.name] if pictures and not archive.is_file() else []
    _fetch(EVAL_REPO, root, [*(f"{name}/test-*.parquet" for name in tables), *archives])
    if pictures:
        unpack(archive, root / "images", pictures)


def _fetch(repo: str, root: Path, patterns: list[str]) -> None:
    from huggingface_hub import snapshot_download

    if patterns:
        snapshot_download(repo, repo_type="dataset", local_dir=root, allow_patterns=patterns)
    for pattern in patterns:
        if not any(root.glob(pattern)):
            raise ValueError(f"{repo} has no {pattern}. Check the names of subsets and tasks.")


def unpack(archive_file: Path, target_dir: Path, folders: Collection[str], inside: str | None = None) -> None:
    """Unpack top-level folders of a zip archive; each appears whole in ``target_dir`` or not at all.

    A leading ``images/`` is ignored, an archive without the folder ``inside`` holds its contents, and
    ``zipfile`` writes nothing outside. Of several processes the first to finish moves its folder. An archive
    that would grow beyond all measure is refused.
    """
    member: zipfile.ZipInfo | None = None
    with workplace(target_dir) as work_dir:
        try:
            with zipfile.ZipFile(archive_file) as archive:
                _check_size(archive_file, archive.infolist())
                for member in tqdm(archive.infolist(), desc=f"unpack {archive_file.name}", leave=False):
                    parts = PurePosixPath(member.filename.removeprefix("images/")).parts
                    if inside is not None and parts[:1] != (inside,):
                        parts = (inside, *parts)
                    ghost = member.is_dir() or any(part.startswith(GHOSTS) for part in parts)
                    if not ghost and len(parts) > 1 and parts[0] in folders:
                        member.filename = "/".join(parts)
                        archive.extract(member, work_dir)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{archive_file}: {error}. Delete the file to fetch it again.") from error
        except OSError as error:
            name = "" if member is None else f" {member.filename!r}"
            raise ValueError(f"{archive_file}: cannot unpack{name}: {error}.") from error
        for name in folders:
            place, target = work_dir / name, target_dir / name
            if not place.is_dir():
                raise ValueError(f"{archive_file} has no pictures of {name}.")
            try:
                place.rename(target)
            except OSError:
                if not target.is_dir():
                    raise


def _check_size(archive_file: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    """Refuse an archive by what its directory says; ``zipfile`` writes no more than that."""
    size, packed = sum(member.file_size for member in members), archive_file.stat().st_size
    if len(members) > MAX_ENTRIES or size > MAX_GROWTH * packed:
        found = f"{len(members):,} entries of {size:,} bytes in an archive of {packed:,}"
        most = f"at most {MAX_ENTRIES:,} entries and {MAX_GROWTH} times its size are unpacked"
        raise ValueError(f"{archive_file}: {found}; {most}. Check where it is from.")
