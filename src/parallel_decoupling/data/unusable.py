"""Rows that cannot be embedded: the one exception that says so, and the one function that raises it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from parallel_decoupling.files import MACHINE_ERRORS

T = TypeVar("T")
_MEMORY_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")


class RowError(ValueError):
    """A row that cannot be embedded; the message says why."""


@contextmanager
def one_row(place: str = "") -> Iterator[None]:
    """Turn whatever a decoder, a tokenizer or a processor throws at one row into a ``RowError``.

    ``place`` begins the message. Exhausted memory is not the row's fault, and passes; nor is a disk that
    fails, which may read it the next time.
    """
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            raise OSError(error.errno, f"{place}{error.strerror}") from error
        plain = isinstance(error, ValueError | OSError)
        what = str(error) if plain else ": ".join(filter(None, (type(error).__name__, str(error))))
        raise RowError(f"{place}{what}") from error


def attempt(function: Callable[[int], T], rows: Iterable[int]) -> tuple[dict[int, T], dict[int, RowError]]:
    """Call a function with the number of each row: what it returned by row, and why it failed by row."""
    results, problems = dict[int, T](), dict[int, RowError]()
    for row in rows:
        try:
            with one_row():
                results[row] = function(row)
        except RowError as error:
            problems[row] = error
    return results, problems


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that the memory of the machine or of the GPU is exhausted."""
    words = str(error).lower()
    named = isinstance(error, RuntimeError) and any(each in words for each in _MEMORY_WORDS)
    return named or isinstance(error, MemoryError)


def doubled(count: int, new: int) -> bool:
    """Tell whether a count passes a power of two with the new ones: when a growing count is worth a line."""
    return (count + new).bit_length() > count.bit_length()
