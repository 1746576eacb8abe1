"""Studies: grids of runs times seeds, from one YAML file to a results file, tables and pictures.

``python -m studies --list`` names them; docs/studies.md explains them. A study is either

- ``studies/<name>.yaml``: base config, cells and seeds (``studies.study``), run by ``studies.runner``; or
- a Python module named in ``MODULES`` with ``run(output_dir: Path)``, which writes ``table.md`` and PNGs into
  ``output_dir`` (``docs/studies/<name>/``, there already). The README of the folder is made from these, from
  the module's docstring (first line: title) and from a hand-written ``conclusion.md``.
"""

from __future__ import annotations

MODULES = {
    "estimators": "studies.estimators",
    "path_differences": "studies.path_differences",
    "prefix_gradients": "studies.prefix_gradients",
}
"""Studies that are Python modules instead of grids of runs, by name."""
