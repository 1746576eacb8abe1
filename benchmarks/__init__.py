"""The measurements behind docs/experiments.md; each file is one command, ``python -m benchmarks.<name>``."""
