"""Subcommands that need no Trainer: each module has ``add_arguments(parser)`` and ``run(options)``."""
