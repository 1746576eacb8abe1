"""Whose turn it is at a shared encoder: calls of threads encode side by side, a training step runs alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition
from typing import Any

from torch import nn

Modes = list[tuple[nn.Module, bool]]


def enter_evaluation(module: nn.Module) -> Modes:
    """Set evaluation mode, and return what ``restore_modes`` takes back: the modules that were training."""
    modes = [(each, True) for each in module.modules() if each.training]
    for each, _ in modes:
        each.training = False
    return modes


def restore_modes(modes: Modes) -> None:
    """Give every submodule the mode that it had."""
    for module, training in modes:
        module.training = training


class Turns:
    """A lock with two kinds of turns. A waiting training step goes before new calls.

    Copies and unpickled ones are free, as nobody waits for them.
    """

    def __init__(self) -> None:
        self._condition = Condition()
        self._encoding, self._waiting, self._alone = 0, 0, False
        self._modes: Modes = []

    def __reduce__(self) -> Any:
        return Turns, ()

    @contextmanager
    def encoding(self, encoder: nn.Module) -> Iterator[None]:
        """Encode in evaluation mode, beside other calls; the last one gives all modules their mode back."""
        with self._condition:
            self._condition.wait_for(lambda: not self._alone and not self._waiting)
            if not self._encoding:
                self._modes = enter_evaluation(encoder)
            self._encoding += 1
        try:
            yield
        finally:
            with self._condition:
                self._encoding -= 1
                if not self._encoding:
                    restore_modes(self._modes)
                    self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody encodes, and keep others waiting until the end of the block."""
        with self._condition:
            self._waiting += 1
            self._condition.wait_for(lambda: not self._alone and not self._encoding)
            self._waiting -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._condition:
                self._alone = False
                self._condition.notify_all()
