"""What README and docs tell a user to type parses or runs, and the README's tree is the package's."""

from __future__ import annotations

import ast
import re
import shlex
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonargparse
import pytest

from parallel_decoupling.cli import main
from parallel_decoupling.world.benchmark import ensure_benchmark

PROJECT_DIR = Path(__file__).parent.parent
SOURCE_DIR = PROJECT_DIR / "src" / "parallel_decoupling"
README = (PROJECT_DIR / "README.md").read_text(encoding="utf-8")
PAGES = {
    file.name: file.read_text(encoding="utf-8")
    for file in (
        PROJECT_DIR / "README.md",
        PROJECT_DIR / "CONTRIBUTING.md",
        *(PROJECT_DIR / "docs").glob("*.md"),
    )
    if file.name != "experiments.md"  # past commands of past versions
}
PROGRAMS = ("parallel-decoupling", "lightning")


def blocks(text: str, *languages: str) -> list[str]:
    pattern = rf"^ *```(?:{'|'.join(languages)})\n(.*?)^ *```$"
    return re.findall(pattern, text, flags=re.MULTILINE | re.DOTALL)


def command_lines(text: str) -> list[list[str]]:
    """Words of the lines in shell blocks, without ``srun``."""
    lines = "\n".join(blocks(text, "console", "bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [each[1:] if each[0] == "srun" else each for each in words if each]


COMMANDS = {
    shlex.join(words[1:]): words[1:]
    for text in PAGES.values()
    for words in command_lines(text)
    if words[0] in PROGRAMS
}
READY = re.compile(r"fit --config lightning_configs/reproduce/\w+\.yaml")
"""Commands that tests/test_configs.py builds."""
WHOLE = [
    (page, next(iter(blocks(PAGES[page], "python"))))
    for page in ("training.md", "embedding_files.md", "search.md", "sharing.md")
]
"""Blocks that need nothing but what the README's commands leave behind."""
PYTHON = [(page, block) for page, text in PAGES.items() for block in blocks(text, "python")]


class ParsedError(Exception):
    """Raised in place of running a command."""


@pytest.fixture
def working_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the shipped configs and the named YAML files that the pages show."""
    (tmp_path / "lightning_configs").symlink_to(PROJECT_DIR / "lightning_configs")
    for text in PAGES.values():
        for block in blocks(text, "yaml"):
            if (first := block.splitlines()[0]).endswith(".yaml"):
                (tmp_path / first.removeprefix("# ")).write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_first_line_says_which_pdf_is_meant_and_two_screens_are_enough() -> None:
    lines = README.splitlines()
    assert lines[0] == "# Parallel Decoupling Framework (not the document format)"
    assert len(lines) <= 120


def test_the_tree_names_every_file_and_folder_on_top_of_the_package() -> None:
    tree = README.split("## Files")[1].split("```")[1]
    named = re.findall(r"^  ([a-z_]+(?:\.py|/)) ", tree, flags=re.MULTILINE)
    there = [file.name for file in SOURCE_DIR.glob("*.py") if not file.name.startswith("__")]
    there += [f"{entry.name}/" for entry in SOURCE_DIR.glob("[a-z]*") if entry.is_dir()]
    assert sorted(named) == sorted(there)
    heads = re.findall(r"^(\S.*?)  ", tree, flags=re.MULTILINE)
    top = [name for head in heads for name in head.split(", ")]
    assert {"lightning_configs/", "tests/", "Makefile"} < set(top)
    assert [name for name in top if not (PROJECT_DIR / name).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page: str) -> None:
    folder = PROJECT_DIR if (PROJECT_DIR / page).exists() else PROJECT_DIR / "docs"
    targets = re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", PAGES[page])
    assert [target for target in targets if not (folder / target).exists()] == []


def test_every_make_target_and_module_that_is_named_exists() -> None:
    makefile = (PROJECT_DIR / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*##", makefile, flags=re.MULTILINE))
    text = "\n".join(PAGES.values())
    mentioned = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE))
    assert {"install", "demo"} <= mentioned <= targets
    modules = set(re.findall(r"python -m ([\w.]+)", text))
    assert [name for name in modules if find_spec(name) is None] == []


@pytest.mark.parametrize("command", [each for each in COMMANDS if not READY.fullmatch(each)])
def test_command_parses(command: str, working_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del working_dir
    parse = jsonargparse.ArgumentParser.parse_args

    def parse_and_stop(self: Any, *args: Any, **options: Any) -> None:
        parse(self, *args, **options)
        raise ParsedError

    monkeypatch.setattr(jsonargparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises((ParsedError, SystemExit)) as stopped:
        main(COMMANDS[command])
    assert not isinstance(stopped.value, SystemExit) or stopped.value.code == 0  # --print_config


@pytest.mark.parametrize(("page", "block"), PYTHON, ids=[f"{page}-{n}" for n, (page, _) in enumerate(PYTHON)])
def test_names_that_a_python_block_imports_exist(page: str, block: str) -> None:
    del page
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("parallel_decoupling"):
            module = import_module(str(node.module))
            assert [each.name for each in node.names if not hasattr(module, each.name)] == []


@pytest.mark.slow
def test_the_readme_works_from_a_short_demo_to_a_search(
    working_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_dir = ensure_benchmark(working_dir / "data", train_rows=16, eval_rows=16)
    short = ["--trainer.max_steps", "2", "--data.batch_size", "16", "--data.data_dir", str(data_dir)]
    main(["fit", "--config", "lightning_configs/demo.yaml", *short])
    assert (working_dir / "runs/demo/checkpoints/last.ckpt").is_file()
    capsys.readouterr()
    (block,) = blocks(README, "python")
    exec(compile(block, "README.md", "exec"), {})  # the example is part of this project
    assert "torch.Size([3, 160])" in capsys.readouterr().out
    (working_dir / "photos").symlink_to(data_dir / "MMEB-eval" / "Scene_t2i")
    for words in command_lines(README):
        if words[1:2] in (["predict"], ["search"], ["export"]):
            main(words[1:])
    assert "rank" in capsys.readouterr().out
    assert (working_dir / "my-model" / "config.json").is_file()
    for page, block in WHOLE:
        exec(compile(block.replace("mini-mmeb", str(data_dir)), page, "exec"), {})
