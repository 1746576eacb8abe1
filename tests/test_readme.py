"""What the README tells a user to type exists and works; docs/files.md lists every file."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from parallel_decoupling.cli import main
from parallel_decoupling.world.benchmark import ensure_benchmark

PROJECT_DIR = Path(__file__).parent.parent
WHOLE_FOLDERS = {"data/world", "commands"}
"""Folders with one row in docs/files.md, not one per file."""
README = (PROJECT_DIR / "README.md").read_text(encoding="utf-8")
SOURCE_DIR = PROJECT_DIR / "src" / "parallel_decoupling"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    lines = "\n".join(blocks("console")).splitlines()
    return [shlex.split(line)[1:] for line in lines if line.split()[:1] == [program]]


@pytest.fixture
def readme_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the shipped configs and the files that the README shows."""
    (tmp_path / "lightning_configs").symlink_to(PROJECT_DIR / "lightning_configs")
    for block in blocks("yaml"):
        (tmp_path / block.splitlines()[0].removeprefix("# ")).write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_first_line_says_which_pdf_is_meant() -> None:
    assert README.splitlines()[0] == "# Parallel Decoupling Framework (not the document format)"


def test_every_make_target_in_the_docs_exists() -> None:
    makefile = (PROJECT_DIR / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*##", makefile, flags=re.MULTILINE))
    text = README + (PROJECT_DIR / "CONTRIBUTING.md").read_text(encoding="utf-8")
    mentioned = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE))
    assert {"install", "demo"} <= mentioned <= targets


def test_tree_lists_every_source_file_and_no_other() -> None:
    tree = (PROJECT_DIR / "docs" / "files.md").read_text(encoding="utf-8")
    rows = re.findall(r"^  ([a-z_]+/?[a-z_]*(?:\.py|/)) ", tree, flags=re.MULTILINE)
    listed = {row.rstrip("/") for row in rows}
    present = {
        str(file.relative_to(SOURCE_DIR))
        for file in SOURCE_DIR.rglob("*.py")
        if not file.name.startswith("__") and str(file.parent.relative_to(SOURCE_DIR)) not in WHOLE_FOLDERS
    }
    assert listed == present | WHOLE_FOLDERS | {"model/tiny"}


@pytest.mark.parametrize("arguments", commands("lightning"), ids=" ".join)
def test_lightning_command_parses(
    arguments: list[str],
    readme_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    del readme_dir
    if "--print_config" not in arguments:
        arguments = [*arguments, "--print_config"]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert "num_paths:" in capsys.readouterr().out


@pytest.mark.slow
def test_python_block_runs_on_the_checkpoint_of_a_short_demo(
    readme_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_dir = ensure_benchmark(readme_dir / "data", train_rows=16, eval_rows=16)
    short = ["--trainer.max_steps", "2", "--data.batch_size", "16", "--data.data_dir", str(data_dir)]
    main(["fit", "--config", "lightning_configs/demo.yaml", *short])
    assert (readme_dir / "runs/demo/checkpoints/last.ckpt").is_file()
    capsys.readouterr()
    (block,) = blocks("python")
    exec(compile(block, "README.md", "exec"), {})  # the example is part of this project
    assert "cosine of paths 0 and 1:" in capsys.readouterr().out
