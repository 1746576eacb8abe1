"""``python -m parallel_decoupling``: the same as the ``lightning`` command."""

from parallel_decoupling.cli import main

main()
