"""What paths mean, files and folders that appear whole or not at all, and the lock of a folder.

What is unfinished lies in a folder of its own beside its target, so on the same file system, locked by the
process that writes it. Locks end with their process: that is how the next one knows what a killed one left.
"""

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

log = logging.getLogger(__name__)
PATHS = re.compile(
    r"(.*_)?(dirs?|file|path|source|adapter)|dirpath|backbone|model|embeddings|folder|image|run|root|store"
)
"""Names of the options that are, or may be, paths."""
UNFINISHED = ".unfinished-"
LOCK_FILE = ".lock"
MACHINE_ERRORS = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO)
"""Of reading what may well be read the next time."""
_locks: set[int] = set()  # file descriptors of the locks that this process holds


def expand_paths(options: Any, name: str = "") -> Any:
    """Return nested options with the home folder for ``~`` before paths; refuse an address, and no path."""
    if isinstance(options, list):
        return [expand_paths(each, name) for each in options]
    if isinstance(options, Namespace | dict):
        inside = options if isinstance(options, dict) else vars(options)
        inside.update({key: expand_paths(value, key) for key, value in inside.items()})
    if not isinstance(options, str | Path) or not PATHS.fullmatch(name):
        return options
    if not str(options) or "://" in str(options):
        raise ValueError(f"{name} must be the path of a file or folder, got {str(options)!r}.")
    if str(options)[:1] != "~":
        return options
    path = os.path.expanduser(options)
    if path.startswith("~"):
        raise ValueError(f"{name} {path!r}: no such home folder. A file of this name is './{path}'.")
    return type(options)(path)


@contextmanager
def reading(file: str | Path) -> Iterator[None]:
    """Name the file or folder whose reading fails halfway, as Python does for one that it cannot open."""
    try:
        yield
    except OSError as error:
        if error.errno not in MACHINE_ERRORS or error.filename:
            raise
        raise OSError(error.errno, error.strerror, str(file)) from error


class FullDiskError(OSError):
    """A full disk, with the file that does not fit and the space that is left."""


@contextmanager
def atomic_write(target: str | Path) -> Iterator[Path]:
    """Yield a name for a new file or folder, which takes the place of ``target`` when the block ends well.

    Otherwise the target stays what it was. The new one has the mode that umask gives. A folder that is there
    and not empty is an ``OSError``, and so is a full disk, with the file and the space that is left.
    """
    check_utf8(target)
    target = Path(target)
    with workplace(target.parent, target) as place:
        unfinished = place / target.name
        yield unfinished
        _settle(unfinished)
        os.replace(unfinished, target)
        with suppress(OSError):  # of a file system that cannot bring a folder to the disk
            _sync(target.parent)


def check_utf8(path: str | Path) -> None:
    """Raise ``ValueError`` for a place to write to whose name is not UTF-8: no text file could hold it."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{ascii(str(path))} is not a name in UTF-8: choose another") from error


def write_text(file: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_write(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(file: str | Path, content: Any, plain: Callable[[Any], Any] = str) -> None:
    """Write a JSON file in the same way; ``plain`` makes values of what JSON does not know."""
    write_text(file, json.dumps(content, indent=1, default=plain) + "\n")


@contextmanager
def workplace(folder: str | Path, target: str | Path | None = None) -> Iterator[Path]:
    """Yield a new folder inside ``folder`` that is gone at the end; remove what killed processes left there.

    ``target`` is what a full disk names, by default the folder.
    """
    folder = Path(folder)
    with ExitStack() as stack:
        stack.push(partial(_explain_full_disk, Path(target or folder)))
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        lock = None
        while lock is None:
            place = folder / f"{UNFINISHED}{uuid4().hex}"
            place.mkdir()
            with suppress(FileNotFoundError):  # another process took it for a leftover before it was locked
                lock = _lock(place / LOCK_FILE)
        stack.callback(_unlock, lock)
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        yield place


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes have left unfinished in a folder."""
    for place in folder.glob(UNFINISHED + 32 * "[0-9a-f]"):  # as ``workplace`` names them
        with suppress(OSError):  # no locks here, of another user, or removed by another process
            lock = _lock(place / LOCK_FILE, must_lock=True)
            if lock is not None:
                shutil.rmtree(place, ignore_errors=True)
                _unlock(lock)


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Let no other process write to a folder; refuse one that another process has locked.

    A disk that is full meanwhile is named, also where what is written does not pass through here.
    """
    check_utf8(folder)
    folder = Path(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK_FILE
    lock = _lock(file)
    if lock is None:
        owner = file.read_text(encoding="utf-8") if file.exists() else "that ends just now"
        raise ValueError(f"{folder} is in use by process {owner}. Wait for it, or name another folder.")
    try:
        with ExitStack() as stack:
            stack.push(partial(_explain_full_disk, folder))
            os.truncate(lock, 0)
            os.write(lock, f"{os.getpid()} on {socket.gethostname()}".encode())
            yield
    finally:
        file.unlink(missing_ok=True)
        _unlock(lock)
        if is_new:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _lock(file: Path, *, must_lock: bool = False) -> int | None:
    """Return a descriptor that locks a file, None if another process does.

    Where a file system has no locks, that is logged, or with ``must_lock`` an ``OSError``.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    _locks.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _unlock(descriptor)
        return None
    except OSError as error:
        if must_lock:
            _unlock(descriptor)
            raise
        log.debug("%s is written without a lock: %s", file.parent, error)
    if not file.exists() or not os.path.samestat(os.fstat(descriptor), file.stat()):  # just removed
        _unlock(descriptor)
        return None
    return descriptor


def _unlock(descriptor: int) -> None:
    _locks.discard(descriptor)
    os.close(descriptor)


def _forget_locks() -> None:
    """Let a forked process, such as a loader's worker, not hold the locks of the one that it came from."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_forget_locks)


def _settle(unfinished: Path) -> None:
    """Give files and folders the modes that umask gives, and bring them to the disk."""
    mode = unfinished.parent.stat().st_mode & 0o7777
    for path in (unfinished, *unfinished.rglob("*")):
        if not path.is_symlink():
            path.chmod(mode if path.is_dir() else mode & 0o666)
    if unfinished.is_dir():
        os.sync()  # one file at a time takes minutes for thousands
    else:
        _sync(unfinished)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain_full_disk(target: Path, kind: Any, error: BaseException | None, trace: Any) -> None:
    """Name file and free space if an error, or what led to it, is a full disk; packages do not."""
    cause = None if isinstance(error, FullDiskError) else error
    while cause is not None:
        full = getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(cause):
            there = next(folder for folder in target.absolute().parents if folder.exists())
            free = shutil.disk_usage(there).free / 1e6
            advice = "What was there before is unchanged. Free space, or choose a folder on another disk"
            message = f"{target} does not fit on its disk, which has {free:,.1f} MB free. {advice}"
            raise FullDiskError(errno.ENOSPC, message) from error
        cause = cause.__cause__ or cause.__context__
