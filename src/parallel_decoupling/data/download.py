"""MMEB from the Hugging Face hub into a data folder, in the layout that ``readers`` reads.

Nothing is fetched for a subset or task that is there already. The hub's client resumes a broken download and
shows its progress; pictures are unpacked into a folder next to their place and moved there whole, so a
stopped run leaves no half-filled folder behind.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from tempfile import TemporaryDirectory

from tqdm import tqdm

from parallel_decoupling.data.tasks import (
    MMEB_TASKS,
    MMEB_TRAIN_SUBSETS,
    check_names,
    find_eval_tasks,
    find_train_subsets,
)

TRAIN_REPO = "TIGER-Lab/MMEB-train"
EVAL_REPO = "TIGER-Lab/MMEB-eval"
EVAL_ZIP = "images.zip"
GHOSTS = ("._", "__MACOSX", ".DS_Store")
"""Beginnings of names that macOS puts into archives; no pictures."""


def check_known(data_dir: Path, split: str, subsets: Sequence[str], tasks: Sequence[str]) -> None:
    """Check names before anything is fetched.

    Raises:
        ValueError: neither MMEB nor ``data_dir`` has such a subset or task; names the closest one.
    """
    check_names(subsets, [*MMEB_TRAIN_SUBSETS, *find_train_subsets(data_dir, split)], "training subset")
    check_names(tasks, [*MMEB_TASKS, *find_eval_tasks(data_dir)], "evaluation task")


def download_train(data_dir: Path, subsets: Sequence[str], split: str) -> None:
    """Fetch tables and pictures of the training subsets that are not in ``data_dir/MMEB-train``.

    Args:
        data_dir: created if missing.
        subsets: names of MMEB-train.
        split: ``original`` or ``diverse_instruction``.

    Raises:
        ValueError: the hub has no such file, or an archive that is broken or unsafe.
    """
    root = data_dir / "MMEB-train"
    tables = [name for name in subsets if not any((root / name).glob(f"{split}-*.parquet"))]
    pictures = [name for name in subsets if not _any_folder(root / "images" / name, root / name / "Train")]
    patterns = [f"{name}/{split}-*.parquet" for name in tables]
    patterns += [f"images_zip/{name}.zip" for name in pictures]
    _fetch(TRAIN_REPO, root, patterns)
    for name in pictures:
        archive_file = _fetched(root / "images_zip" / f"{name}.zip", TRAIN_REPO)
        unpack(archive_file, root / "images", [name], inside=name)


def download_eval(data_dir: Path, tasks: Sequence[str]) -> None:
    """Fetch tables and pictures of the evaluation tasks that are not in ``data_dir/MMEB-eval``.

    The pictures of all tasks are one archive; those asked for are unpacked.

    Args:
        data_dir: created if missing.
        tasks: names of MMEB-eval.

    Raises:
        ValueError: the hub has no such file, or an archive that is broken or unsafe.
    """
    root = data_dir / "MMEB-eval"
    tables = [name for name in tasks if not any((root / name).glob("test-*.parquet"))]
    pictures = [
        name
        for name in tasks
        if not _any_folder(root / "images" / name)
        and all(file.suffix == ".parquet" for file in (root / name).glob("*"))
    ]
    patterns = [f"{name}/test-*.parquet" for name in tables]
    if pictures and not (root / EVAL_ZIP).is_file():
        patterns.append(EVAL_ZIP)
    _fetch(EVAL_REPO, root, patterns)
    if pictures:
        unpack(_fetched(root / EVAL_ZIP, EVAL_REPO), root / "images", pictures)


def _any_folder(*folders: Path) -> bool:
    return any(folder.is_dir() for folder in folders)


def _fetch(repo: str, root: Path, patterns: list[str]) -> None:
    if not patterns:
        return
    from huggingface_hub import snapshot_download

    snapshot_download(repo, repo_type="dataset", local_dir=root, allow_patterns=patterns)


def _fetched(file: Path, repo: str) -> Path:
    if not file.is_file():
        raise ValueError(f"{repo} has no {file.name}. Check the names of subsets and tasks.")
    return file


def unpack(archive_file: Path, target_dir: Path, folders: Collection[str], inside: str | None = None) -> None:
    """Unpack top-level folders of a zip archive of pictures; each appears whole or not at all.

    Files that macOS adds are ignored, and so is a leading ``images/``. Several processes may do the same at
    once: each unpacks into a folder of its own, and the first to be done with a folder moves it there.

    Args:
        archive_file: the archive.
        target_dir: where the folders go; a folder that is there already stays as it is.
        folders: the ones to unpack.
        inside: the folder whose contents an archive without it holds.

    Raises:
        ValueError: the archive is broken, lacks a folder, or has a member that points outside of it.
    """
    target_dir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".unpacking-{archive_file.stem}-", dir=target_dir) as work_dir:
        there = _extract(archive_file, Path(work_dir), folders, inside)
        lacking = sorted(set(folders) - there)
        if lacking:
            raise ValueError(f"{archive_file} has no pictures of {', '.join(lacking)}.")
        for folder in folders:
            _move(Path(work_dir) / folder, target_dir / folder)


def _extract(archive_file: Path, work_dir: Path, folders: Collection[str], inside: str | None) -> set[str]:
    """Unpack into ``work_dir``; return those of the folders that the archive has."""
    try:
        with zipfile.ZipFile(archive_file) as archive:
            members = [
                (member, path)
                for member in archive.infolist()
                if not member.is_dir() and (path := _place(member.filename, archive_file, inside)) is not None
            ]
            wanted = [(member, path) for member, path in members if path.parts[0] in folders]
            for member, path in tqdm(wanted, desc=f"unpack {archive_file.name}", unit="file", leave=False):
                file = work_dir / path
                file.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, open(file, "wb") as target:
                    shutil.copyfileobj(source, target)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive_file}: {error}. Delete the file to have it fetched again.") from error
    return {path.parts[0] for _, path in wanted}


def _move(folder: Path, target: Path) -> None:
    """Move a folder to its place; one that is there, or comes there meanwhile, stays."""
    if target.exists():
        return
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _place(name: str, archive_file: Path, inside: str | None) -> PurePosixPath | None:
    """Where a member goes, relative to the target; None for ghosts."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if ".." in parts or name.startswith(("/", "\\")) or PureWindowsPath(name).drive:
        raise ValueError(f"{archive_file}: the member {name!r} points outside of the folder. Do not use it.")
    if any(part.startswith(GHOSTS) for part in parts):
        return None
    parts = parts[1:] if parts[0] == "images" else parts
    if inside is not None and parts[0] != inside:
        parts = (inside, *parts)
    return PurePosixPath(*parts) if len(parts) > 1 else None
