"""Studies: questions answered by runs, each with its tables and pictures under docs/studies/<name>/."""
