"""What README and docs tell a user to type parses or runs, and the README's tree is the package's.

A command is run unless it asks for a model of the hub, for several devices or for data that a recipe
downloads, or names what such commands download or leave behind. All are parsed.
"""

import ast
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonargparse
import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from parallel_decoupling.cli import TRAINER_SUBCOMMANDS, main
from parallel_decoupling.world.benchmark import ensure_benchmark
from tests.support.mmeb import write_shop
from tests.support.tiny import noise_image

PROJECT_DIR = Path(__file__).parent.parent
SOURCE_DIR = PROJECT_DIR / "src" / "parallel_decoupling"
README = (PROJECT_DIR / "README.md").read_text(encoding="utf-8")
PAGES = {
    file.name: file.read_text(encoding="utf-8")
    for file in (
        PROJECT_DIR / "README.md",
        PROJECT_DIR / "CONTRIBUTING.md",
        *sorted((PROJECT_DIR / "docs").glob("*.md")),
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
PAGE_OF: dict[str, str] = {}
"""Where a command stands first."""
for each_page, each_text in PAGES.items():
    for each_words in command_lines(each_text):
        PAGE_OF.setdefault(shlex.join(each_words[1:]), each_page)
YAML = [block for text in PAGES.values() for block in blocks(text, "yaml")]
SHOWN_YAML = {name: each for each in YAML if (name := each.splitlines()[0][2:]).endswith(".yaml")}
"""YAML blocks that begin with the name of a file, by that name."""


def options(words: list[str]) -> dict[str, Any]:
    """What a command sets, by dotted name, in its files and on the line."""
    found: dict[str, Any] = {}
    for option, value in zip(words, [*words[1:], ""], strict=True):
        if option == "--config":
            file = PROJECT_DIR / value
            content = yaml.safe_load(SHOWN_YAML[value] if value in SHOWN_YAML else file.read_text("utf-8"))
            for group, each in content.items():
                found |= {f"{group}.{name}": v for name, v in each.items()} if isinstance(each, dict) else {}
        elif option.startswith("--"):
            found[option.removeprefix("--")] = value
    return found


def wants_more(words: list[str]) -> bool:
    """Whether a command asks for a model of the hub, for several devices or for what a recipe downloads."""
    found = options(words)
    devices = {str(found.get(f"trainer.{name}", 1)) for name in ("devices", "num_nodes")}
    downloaded = str(found.get("data.data_dir", "")).startswith("data/")
    return downloaded or found.get("model.backbone", "tiny") != "tiny" or devices != {"1"}


ELSEWHERE = {command: options(words) for command, words in COMMANDS.items() if wants_more(words)}
OF_ELSEWHERE = {
    found.get(name) for found in ELSEWHERE.values() for name in ("trainer.default_root_dir", "data.data_dir")
} - {None, "mini-mmeb"}
"""Runs and data of the commands that cannot be run here."""
HERE = {
    command: words
    for command, words in COMMANDS.items()
    if command not in ELSEWHERE
    and not any(word == place or word.startswith(f"{place}/") for word in words for place in OF_ELSEWHERE)
}
READY = re.compile(r"fit --config lightning_configs/reproduce/\w+\.yaml")
"""Commands that tests/test_configs.py builds."""
WHOLE = [
    (page, next(iter(blocks(PAGES[page], "python"))))
    for page in ("README.md", "training.md", "embedding_files.md", "search.md", "sharing.md")
]
"""Blocks that need nothing but what the README's commands leave behind."""
PYTHON = [(page, block) for page, text in PAGES.items() for block in blocks(text, "python")]


class ParsedError(Exception):
    """Raised in place of running a command."""


@pytest.fixture
def working_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the shipped configs and the named YAML files that the pages show."""
    monkeypatch.chdir(tmp_path)
    return with_configs(tmp_path)


def with_configs(folder: Path) -> Path:
    (folder / "lightning_configs").symlink_to(PROJECT_DIR / "lightning_configs")
    for name, block in SHOWN_YAML.items():
        (folder / name).write_text(block, encoding="utf-8")
    return folder


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


def short(words: list[str]) -> list[str]:
    """The command with few steps, on a small benchmark."""
    found, added = options(words), list[str]()
    if words[0] == "fit":
        added = ["--trainer.max_steps", "2"]
        added += [] if "--data.batch_size" in words else ["--data.batch_size", "16"]
    if words[0] in ("fit", "test") and found.get("data.data_dir", "mini-mmeb") == "mini-mmeb":
        added += ["--data.data_dir", "data"]
    return [*words, *added]


def output_of(words: list[str]) -> Path | None:
    """The folder that a command makes, and would refuse to overwrite."""
    if words[0] in ("export", "index"):
        return Path(words[2])
    name = {"predict": "output_dir", "fit": "trainer.default_root_dir"}.get(words[0], "")
    found = options(words).get(name)
    return None if found is None or "--ckpt_path" in words and words[0] == "fit" else Path(found)


@pytest.fixture(scope="module")
def lived_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which ``make demo`` has run, shortly, with files of the user."""
    folder = with_configs(tmp_path_factory.mktemp("project"))
    data_dir = ensure_benchmark(folder / "generated", train_rows=16, eval_rows=16)
    (folder / "data").symlink_to(data_dir)
    (folder / "photos").symlink_to(data_dir / "MMEB-eval" / "Scene_t2i")
    noise_image(32, 32).save(folder / "photo.png")
    write_shop(folder)
    rows = [{"text": f"item {n}", "background": "white", "objects": n % 4} for n in range(300)]
    rows[0] |= {"image": "photo.png"}
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("demo_single_path", "demo"):
            config = ["--config", f"lightning_configs/{name}.yaml"]
            main(short(["fit", *config]))
            main(short(["test", *config, "--ckpt_path", "last"]))
        main(["compress", "runs/demo", "runs/demo/checkpoints/compressed.ckpt"])
        model = ["--ckpt_path", "runs/demo/checkpoints/compressed.ckpt"]
        main(["predict", *model, "--data.predict_source", "rows.jsonl", "--output_dir", "prepared"])
        yield folder


def test_what_is_run_is_of_every_kind() -> None:
    """Else the rule at the top of this file would leave out what could be run."""
    subcommands = {words[0] for words in HERE.values()}
    assert subcommands >= {*TRAINER_SUBCOMMANDS, "verify", "compare", "search", "app", "export", "serve"} - {
        "plan",  # shown for models of the hub
        "validate",
    }


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({PAGE_OF[command] for command in HERE} | {page for page, _ in WHOLE}))
@pytest.mark.filterwarnings("ignore:Nothing was trained")  # two steps, resumed
def test_the_commands_and_examples_of_a_page_run(
    page: str, lived_in: Path, start: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of the page, with the folder of embeddings that ``predict`` makes of ``rows.jsonl``."""
    monkeypatch.chdir(lived_in)
    shutil.rmtree("embeddings", ignore_errors=True)
    shutil.copytree("prepared", "embeddings")
    for of_page, block in WHOLE:
        if of_page == page:
            exec(compile(block.replace("mini-mmeb", "data"), page, "exec"), {})  # of this project
    if page == "README.md":
        assert "torch.Size([3, 160])" in capsys.readouterr().out
    for words in (short(words) for command, words in HERE.items() if PAGE_OF[command] == page):
        if (made := output_of(words)) is not None:
            shutil.rmtree(made, ignore_errors=True)
        if words[0] in ("serve", "app"):
            start(*words, answers={"serve": "/health", "app": "/"}[words[0]])
        elif "--print_config" in words:
            with pytest.raises(SystemExit):
                main(words)
        else:
            main(words)
            assert made is None or made.is_dir()
            assert words[0] != "search" or "rank" in capsys.readouterr().out


NOTEBOOK_FILES = sorted((PROJECT_DIR / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("notebook_file", NOTEBOOK_FILES, ids=lambda file: file.stem)
def test_notebook_runs_without_a_demo_checkpoint(notebook_file: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(notebook_file, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream" and output["name"] == "stdout"
    ]
    assert any("paths: 3" in text for text in printed)
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert sum("image/png" in output["data"] for output in pictures) >= 3
