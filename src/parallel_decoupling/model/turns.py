"""Whose turn it is at a shared encoder: calls of threads encode side by side, a training step runs alone."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Condition, get_ident
from typing import Any

from torch import nn


def set_training(modules: Iterable[nn.Module], training: bool) -> list[nn.Module]:
    """Set the mode of these modules, not of what is inside them; return those whose mode changed."""
    changed = [module for module in modules if module.training != training]
    for module in changed:
        module.training = training
    return changed


class Turns:
    """A lock with two kinds of turns. A waiting training step goes before new calls.

    Copies and unpickled ones are free, as nobody waits for them.
    """

    def __init__(self) -> None:
        self._condition = Condition()
        self._encoding, self._waiting = 0, 0
        self._alone: int | None = None  # the thread that runs alone
        self._in_training: list[nn.Module] = []

    def __reduce__(self) -> Any:
        return Turns, ()

    @contextmanager
    def encoding(self, encoder: nn.Module) -> Iterator[None]:
        """Encode in evaluation mode, beside other calls; the last one gives all modules their mode back.

        In a hook of the training step itself, it is at once the thread's turn; a hook that waits for another
        thread's call waits for ever.
        """
        if self._alone == get_ident():
            in_training = set_training(encoder.modules(), False)
            try:
                yield
            finally:
                set_training(in_training, True)
            return
        with self._condition:
            self._condition.wait_for(lambda: self._alone is None and not self._waiting)
            if not self._encoding:
                self._in_training = set_training(encoder.modules(), False)
            self._encoding += 1
        try:
            yield
        finally:
            with self._condition:
                self._encoding -= 1
                if not self._encoding:
                    set_training(self._in_training, True)
                    self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody encodes, and keep others waiting until the end of the block."""
        with self._condition:
            self._waiting += 1
            self._condition.wait_for(lambda: self._alone is None and not self._encoding)
            self._waiting -= 1
            self._alone = get_ident()
        try:
            yield
        finally:
            with self._condition:
                self._alone = None
                self._condition.notify_all()
