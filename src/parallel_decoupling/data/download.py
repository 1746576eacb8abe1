"""MMEB and MMEB-V2 from the Hugging Face hub into a data folder, as far as it is not there already."""

import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, Any

from huggingface_hub import snapshot_download
from tqdm import tqdm

from parallel_decoupling.data.layouts import rows_of
from parallel_decoupling.data.tasks import MMEB_TASKS, V2_TASKS, read_tasks
from parallel_decoupling.files import workplace

TRAIN_REPO, EVAL_REPO, V2_REPO = "TIGER-Lab/MMEB-train", "TIGER-Lab/MMEB-eval", "TIGER-Lab/MMEB-V2"
CONVERTED = "refs/convert/parquet"
"""The branch on which the hub keeps every table in one layout, whatever a repository itself has."""
FRAMES = {kind: [""] for kind in ("video_cls", "video_ret", "video_mret")}
FRAMES["video_qa"] = [f"-0{part}" for part in range(5)]
"""Archives of frames, with the ends of their parts."""
GHOSTS = ("._", "__MACOSX", ".DS_Store")  # beginnings of the names that macOS adds to archives
MAX_ENTRIES = 10_000_000
MAX_GROWTH = 100  # bytes that an archive may hold per byte of its own; pictures hardly shrink
BLOCK = 1 << 20
DAMAGED = zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError, RuntimeError
"""What the readers of archives raise for one that they cannot read."""


def download_train(data_dir: Path, subsets: Sequence[str], split: str) -> None:
    """Fetch tables and pictures of the training subsets that ``data_dir/MMEB-train`` lacks."""
    root = data_dir / "MMEB-train"
    places = {name: (root / "images" / name, root / name / "Train") for name in subsets}
    archives = {name: f"images_zip/{name}.zip" for name in subsets if not any(map(Path.is_dir, places[name]))}
    _fetch(TRAIN_REPO, root, [*(f"{name}/{split}-*.parquet" for name in subsets), *archives.values()])
    for name, archive in archives.items():
        unpack(root / archive, root / "images", [name], inside=name)


def download_eval(data_dir: Path, names: Sequence[str]) -> None:
    """Fetch tables, pictures and frames of the tasks of MMEB and MMEB-V2 that ``data_dir`` lacks."""
    root, tasks = data_dir / "MMEB-eval", [name for name in names if name in MMEB_TASKS]
    loose = {name for name in tasks if any(file.suffix != ".parquet" for file in (root / name).glob("*"))}
    pictures = [name for name in tasks if name not in loose and not (root / "images" / name).is_dir()]
    archive = [] if not pictures else ["images.zip"]
    _fetch(EVAL_REPO, root, [*(f"{name}/test-*.parquet" for name in tasks), *archive])
    if pictures:
        unpack(root / "images.zip", root / "images", pictures)
    known, frames = read_tasks(data_dir), dict[str, list[str]]()
    for source in filter(None, (known[name].source for name in names if name in V2_TASKS)):
        entry = source.published or {}
        if source.eval_dir and entry:
            _fetch(entry["set"], source.eval_dir, [f"{p}/*.parquet" for p in ("corpus", "queries", "qrels")])
        elif source.eval_file and entry:
            places = rows_of(entry)
            if not any(any(source.eval_file.glob(place)) for place in places):
                _fetch(entry["set"], source.eval_file, [places[0]], revision=CONVERTED)
            if not source.image_dir.is_dir():
                frames.setdefault(source.image_dir.parent.name, []).append(source.image_dir.name)
    for kind, folders in frames.items():
        file = f"video-tasks/frames/{kind}.tar.gz"
        _fetch(V2_REPO, data_dir, [f"{file}{part}" for part in FRAMES[kind]])
        unpack(data_dir / file, (data_dir / file).with_name(kind), folders, above=kind)


def _fetch(repo: str, root: Path, patterns: Iterable[str], **options: Any) -> None:
    """Fetch the files of some patterns, unless all that their numbers (``-of-00002``) speak of are there."""
    if lacking := [pattern for pattern in patterns if not _is_whole(root, pattern)]:
        snapshot_download(repo, repo_type="dataset", local_dir=root, allow_patterns=lacking, **options)
    for pattern in lacking:
        if not any(root.glob(pattern)):
            raise ValueError(f"{repo} has no {pattern}. Check the names of subsets and tasks.")


def _is_whole(root: Path, pattern: str) -> bool:
    names = [file.name for file in root.glob(pattern)]
    counts = (re.search(r"-of-(\d+)", name) for name in names)
    return len(names) >= max([1, *(int(count[1]) for count in counts if count)])


def unpack(
    archive_file: Path, target_dir: Path, folders: Collection[str], inside: str = "", above: str = "images"
) -> None:
    """Unpack top-level folders of a zip or tar archive; each appears whole in ``target_dir`` or not at all.

    An archive that is not there may be there in parts (``x.tar.gz-00``). A folder ``above`` all is ignored,
    an archive without the folder ``inside`` holds its contents, and nothing is written outside. Of several
    processes the first to finish moves its folder. An archive that grows beyond all measure is refused.
    """
    numbered = sorted(archive_file.parent.glob(f"{archive_file.name}-*"))
    files = [archive_file] if archive_file.is_file() else numbered
    packed, entries, size, name = sum(file.stat().st_size for file in files), 0, 0, ""
    with workplace(target_dir) as work_dir:
        try:
            members = (_zipped if archive_file.suffix == ".zip" else _taped)(files)
            for name, length, content in tqdm(members, desc=f"unpack {archive_file.name}", leave=False):
                entries, size = entries + 1, size + length
                if entries > MAX_ENTRIES or size > MAX_GROWTH * packed:
                    found = f"{entries:,} entries of {size:,} bytes in an archive of {packed:,}"
                    most = f"at most {MAX_ENTRIES:,} entries and {MAX_GROWTH} times its size are unpacked"
                    raise ValueError(f"{archive_file}: {found}; {most}. Check where it is from.")
                parts = [part for part in PurePosixPath(name).parts if part not in ("/", "..")]
                parts = parts[parts[:1] == [above] :]
                if inside and parts[:1] != [inside]:
                    parts = [inside, *parts]
                is_ghost = any(part.startswith(GHOSTS) for part in parts)
                if len(parts) > 1 and parts[0] in folders and not is_ghost:
                    file = work_dir.joinpath(*parts)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with file.open("wb") as stream:
                        shutil.copyfileobj(content, stream, BLOCK)
        except DAMAGED as error:
            raise ValueError(f"{archive_file}: {error}. Delete the file to fetch it again.") from error
        except OSError as error:
            raise ValueError(f"{archive_file}: cannot unpack {name!r}: {error}.") from error
        for folder in folders:
            place, target = work_dir / folder, target_dir / folder
            if not place.is_dir():
                raise ValueError(f"{archive_file} has no pictures of {folder}.")
            try:
                place.rename(target)
            except OSError:
                if not target.is_dir():
                    raise


def _zipped(files: Sequence[Path]) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Yield name, size and contents of the files in an archive; no more is read than the size says."""
    with zipfile.ZipFile(files[0]) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                with archive.open(member) as content:
                    yield member.filename, member.file_size, content


def _taped(files: Sequence[Path]) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Yield the same of an archive in parts, which is read once from its start to its end."""
    blocks = (block for file in files for block in _blocks(file))
    stream: Any = SimpleNamespace(read=lambda _: next(blocks, b""))
    with closing(tarfile.open(fileobj=stream, mode="r|*")) as opened:
        archive: Any = opened
        while (member := archive.next()) is not None:
            if member.isfile() and (content := archive.extractfile(member)) is not None:
                yield member.name, member.size, content
            archive.members.clear()  # they would fill the memory


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            yield block
