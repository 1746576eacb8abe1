"""Measurements behind the numbers of docs/experiments.md; each file is one command, ``python -m benchmarks.<file>``."""
