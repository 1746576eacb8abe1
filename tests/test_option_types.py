"""Options are what their types say: values drawn from every declared type pass, others end in one message."""

import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from lightning.pytorch.strategies import SingleDeviceStrategy

from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.evaluation.store import Keeper, Store
from parallel_decoupling.lance_index import LanceIndex, write_lance_index
from parallel_decoupling.model.backbone import AdapterConfig
from parallel_decoupling.option_types import (
    Names,
    NonNegativeFloat,
    PositiveInt,
    Rule,
    check_memory,
    check_values,
    checked,
)
from parallel_decoupling.search import ExactIndex
from parallel_decoupling.training.module import PDFEmbedder
from parallel_decoupling.training.optimization import MIConfig, OptimizerConfig
from parallel_decoupling.training.settings import check_fit
from tests.support.fit import small_embedder

OWNERS: dict[type, str] = {PDFEmbedder: "", MMEBDataModule: "data."}
OWNERS |= {AdapterConfig: "adapter.", MIConfig: "mi.", OptimizerConfig: "optimizer."}
ANYTHING = st.one_of(
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.booleans(),
    st.none(),
    st.just(object()),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.binary(max_size=2),
)


def belongs(value: Any, hint: Any) -> bool:
    """The slow version: whether a value is of a type, by hand."""
    kind, parts = get_origin(hint), get_args(hint)
    if any(isinstance(part, Rule) for part in parts):
        return belongs(value, parts[0]) and all(rule.holds(value) for rule in parts[1:])
    if kind is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if kind is dict:
        return isinstance(value, dict) and all(
            belongs(k, parts[0]) and belongs(v, parts[1]) for k, v in value.items()
        )
    if kind is not None and kind is not Sequence and parts:  # a union
        return any(belongs(value, part) for part in parts)
    if kind is Sequence:
        is_sequence = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return is_sequence and all(belongs(each, parts[0]) for each in value)
    if hint is float:
        return type(value) in (int, float)
    if hint is Any:
        return True
    return value is None if hint in (None, type(None)) else type(value) is hint


def hints_of(owner: type) -> dict[str, Any]:
    return get_type_hints(owner if is_dataclass(owner) else owner.__init__, include_extras=True)


def options() -> list[tuple[type, str]]:
    found = []
    for owner in OWNERS:
        hints = hints_of(owner)
        plain = [n for n in inspect.signature(owner).parameters if n in hints]
        found += [(owner, name) for name in plain if not any("Config" in str(p) or "Family" in str(p)
                  for p in (hints[name], *get_args(hints[name])))]  # fmt: skip
    return found


@pytest.mark.parametrize(("owner", "name"), options())
def test_a_value_passes_if_and_only_if_it_is_of_the_declared_type(owner: type, name: str) -> None:
    start, hint = OWNERS[owner], hints_of(owner)[name]
    function = owner if is_dataclass(owner) else owner.__init__
    defaults = {n: p.default for n, p in inspect.signature(owner).parameters.items()}

    @seed(0)
    @settings(max_examples=40, deadline=None, database=None)
    @given(ANYTHING)
    def check(value: Any) -> None:
        if belongs(value, hint):
            check_values(function, {**defaults, name: value}, start)
            return
        said = rf"^{re.escape(start)}{name} must be (?s:.*), got {re.escape(repr(value))}$"
        with pytest.raises(ValueError, match=said):
            owner(**{name: value})

    check()


@dataclass
class Inner:
    size: int = 1


@checked("outer.")
def outer(
    size: PositiveInt, rate: NonNegativeFloat = 0.5, *, names: Names = (), inner: Inner | None = None
) -> int:
    """Return the size."""
    return size


def test_a_checked_function_is_itself_for_good_values() -> None:
    assert outer(3, 1, names=["a", "b"], inner=Inner()) == 3
    assert outer.__doc__ == "Return the size."
    assert list(inspect.signature(outer).parameters) == ["size", "rate", "names", "inner"]


def test_what_is_returned_may_have_a_type_that_only_type_checkers_know() -> None:
    @checked()
    def same(value: PositiveInt) -> "Nowhere":  # type: ignore[name-defined]  # noqa: F821
        return value

    assert same(3) == 3


def test_one_message_names_all_that_is_wrong() -> None:
    said = (
        "outer.size must be 1 or more, in 64 bits, got 0; outer.rate must be 0 or more and finite, got nan; "
        "outer.names must be different names, got ['a', 'a']"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        outer(0, math.nan, names=["a", "a"])
    with pytest.raises(ValueError, match=r"outer\.names must be a list, not one text, got 'ab'"):
        outer(1, names="ab")


@pytest.mark.parametrize(
    "function",
    [
        Store,
        LanceIndex,
        ExactIndex,
        lambda path: Keeper(path, dict),
        lambda path: write_lance_index(path, "x"),
    ],
)
def test_paths_mean_the_same_in_python(
    function: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for path, message in (
        ("s3://bucket/a", "must be the path of a file or folder"),
        ("~no-such-user/a", "no such home"),
    ):
        with pytest.raises(ValueError, match=message):
            function(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Path(Keeper("~/a", dict).root) == tmp_path / "a"


HUGE: dict[str, Any] = {
    "num_paths": lambda: small_embedder("tiny", num_paths=10**8, prefix_init="random"),
    "prefix_length": lambda: small_embedder("tiny", prefix_length=10**9),
    "adapter.rank": lambda: small_embedder("tiny", adapter={"rank": 10**9}),
    "adapter.per_path": lambda: small_embedder(
        "tiny", num_paths=10**4, adapter={"rank": 10**3, "per_path": True}
    ),
    "mi.hidden_size": lambda: small_embedder("tiny", mi={"hidden_size": 10**9}),
    "min_pixels": lambda: MMEBDataModule(min_pixels=10**13),
    "data.num_workers": lambda: MMEBDataModule(num_workers=10**7),
    "data.hard_negatives": lambda: check_fit(
        dict(small_embedder("tiny").hparams),
        MMEBDataModule(hard_negatives=10**7).settings,
        small_embedder("tiny").encoder,
        SingleDeviceStrategy("cpu"),
    ),
}


@pytest.mark.parametrize("option", HUGE)
def test_what_cannot_fit_is_refused_before_it_is_allocated(option: str) -> None:
    """Every option of which a single value can ask for more memory than any machine has."""
    with pytest.raises(
        ValueError, match=rf"{option}.* would need [\d,]+ bytes of memory, of which [\d,]+ are"
    ):
        HUGE[option]()


def test_on_the_meta_device_nothing_is_allocated() -> None:
    with torch.device("meta"):
        check_memory("a", 1e30)
