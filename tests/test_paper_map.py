"""The paper map names code and tests that exist."""

import ast
import re
from pathlib import Path

REPO_DIR = Path(__file__).parents[1]
PLACES = {False: REPO_DIR / "src/parallel_decoupling", True: REPO_DIR / "tests"}


def names(file: Path) -> set[str]:
    """Top-level names of a module, and ``Class.member`` for the members of its classes."""
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{member.name}" for member in node.body if isinstance(member, ast.FunctionDef)
            }
    return found


def test_every_name_in_the_paper_map_exists() -> None:
    file = Path("none")
    references = re.findall(r"`([\w/]*(?:\.py)?)::([\w.]+)`", (REPO_DIR / "docs/paper_map.md").read_text())
    assert len(references) > 40
    for path, name in references:
        if path:  # "`::name`" is another name in the file before it
            file = PLACES[Path(path).name.startswith("test_")] / path
        assert name in names(file), f"docs/paper_map.md: {file}::{name} does not exist"
