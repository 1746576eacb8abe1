"""Write an API reference from the docstrings into build/docs: ``python -m recipes.api_reference``."""

from __future__ import annotations

import pkgutil
from pathlib import Path

import pdoc

import parallel_decoupling

OUTPUT_DIR = Path("build") / "docs"


def main() -> None:
    """Document every module of the package."""
    for name in parallel_decoupling.__all__:  # imported on first use, which pdoc does not see
        setattr(parallel_decoupling, name, getattr(parallel_decoupling, name))
    pdoc.render.configure(docformat="google")
    found = pkgutil.iter_modules(parallel_decoupling.__path__, "parallel_decoupling.")
    modules = [module.name for module in found if not module.name.endswith("__main__")]
    pdoc.pdoc("parallel_decoupling", *modules, output_directory=OUTPUT_DIR)
    print(OUTPUT_DIR / "index.html")


if __name__ == "__main__":
    main()
