"""Files and folders that appear whole or not at all, locks, and what ``~`` means."""

from __future__ import annotations

import errno
import os
import signal
import stat
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from parallel_decoupling import files
from parallel_decoupling.files import UNFINISHED, atomic_write, expand_paths, locked, write_text
from tests.support.processes import run_ranks


@pytest.fixture(params=[0o022, 0o027, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_and_folders_have_the_mode_that_umask_gives(umask: int, tmp_path: Path) -> None:
    with atomic_write(tmp_path / "new" / "a.safetensors") as file:  # which the library writes with 0600
        save_file({"x": torch.ones(2)}, file)
    with atomic_write(tmp_path / "folder") as folder:
        folder.mkdir(0o700)
        (folder / "private").touch(0o600)
    assert mode(tmp_path / "new" / "a.safetensors") == mode(tmp_path / "folder" / "private") == 0o666 & ~umask
    assert mode(tmp_path / "folder") == 0o777 & ~umask


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with suppress(KeyError), atomic_write(file) as unfinished:
        unfinished.write_text("half")
        assert file.read_text() == "old"
        assert unfinished.stat().st_dev == file.stat().st_dev
        raise KeyError
    assert file.read_text() == "old"
    write_text(file, "new")
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_with_content_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write_text(tmp_path / "folder" / "a", "old")
    with pytest.raises(OSError, match="not empty"), atomic_write(tmp_path / "folder") as unfinished:
        unfinished.mkdir()
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["a"]


def killed(file: Path) -> None:
    with atomic_write(file) as unfinished:
        unfinished.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_leaves_is_removed_by_the_next_writer_only(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(RuntimeError, match="-9"):
        run_ranks(killed, tmp_path / "a", processes=1)
    assert len(list(tmp_path.glob(f"{UNFINISHED}*"))) == 1
    assert (tmp_path / "a").read_text() == "old"
    with atomic_write(tmp_path / "b") as mine:
        mine.write_text("b")
        write_text(tmp_path / "c", "another writer of the folder")
        assert [place.name for place in tmp_path.glob(f"{UNFINISHED}*")] == [mine.parent.name]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "c"]


class NoSpaceError(Exception):
    """As of a library that writes by itself, in Rust or C++."""


def fill(file: Path, error: Exception) -> None:
    with atomic_write(file) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError("unexpected pos 704") from error


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), NoSpaceError("I/O error: No space left on device (os error 28)")]
)
def test_a_full_disk_names_file_and_space_and_keeps_the_old_one(error: Exception, tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(OSError, match=r"/a does not fit on its disk, which has [\d,.]+ MB free") as raised:
        fill(tmp_path / "a", error)
    assert raised.value.errno == errno.ENOSPC
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a", "old")]


def test_another_error_keeps_its_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="^other$"), atomic_write(tmp_path / "a"):
        raise RuntimeError("other")


def try_lock(folder: Path, held: bool) -> None:
    if held:
        with pytest.raises(ValueError, match="is in use by process"), locked(folder):
            pass
    else:
        with locked(folder):
            pass


def hold_and_die(folder: Path) -> None:
    with locked(folder):
        if os.fork() == 0:  # a loader's worker, which lives on for a while
            os.execvp("sleep", ["sleep", "5"])
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_lock_is_one_process_s_and_ends_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with locked(folder):
        run_ranks(try_lock, folder, True, processes=1)
        with pytest.raises(ValueError, match=f"process {os.getpid()} on"), locked(folder):
            pass
    assert not folder.exists(), "it was made for the lock"
    run_ranks(try_lock, folder, False, processes=1)
    with pytest.raises(RuntimeError, match="-9"):
        run_ranks(hold_and_die, folder, processes=1)
    with locked(folder):
        pass


def test_a_file_system_without_locks_is_written_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with locked(tmp_path), atomic_write(tmp_path / "a") as unfinished:
        unfinished.write_text("a")
        write_text(tmp_path / "b", "does not take the other for a leftover")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]


def test_a_tilde_is_home_in_paths_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    callback = Namespace(class_path="X", init_args=Namespace(dirpath="~/c", name="~/n"))
    options = Namespace(
        trainer=Namespace(default_root_dir="~/run", callbacks=[callback], logger=None),
        data={"data_dir": "~", "predict_source": "./~/x"},
        run_dirs=["~/a", "b/~"],
        text="~/words",
        ckpt_path="last",
    )
    found = expand_paths(options)
    assert found.trainer.default_root_dir == "/home/me/run"
    assert vars(found.trainer.callbacks[0].init_args) == {"dirpath": "/home/me/c", "name": "~/n"}
    assert found.data == {"data_dir": "/home/me", "predict_source": "./~/x"}
    assert (found.run_dirs, found.text, found.ckpt_path) == (["/home/me/a", "b/~"], "~/words", "last")
    with pytest.raises(ValueError, match="output_dir '~nobody-here/x': no such home folder"):
        expand_paths({"output_dir": "~nobody-here/x"})
