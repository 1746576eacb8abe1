"""Studies: questions about the method, each a module with ``run``; results in ``docs/studies``."""
