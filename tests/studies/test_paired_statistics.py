"""Intervals and differences over seeds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from scipy.stats import ttest_1samp

from studies.paired_statistics import holm, interval, p_value, paired_difference
from studies.study import Difference
from tests.support.study import made_up_result, toy_study


def test_the_interval_is_the_textbook_one() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3.0
    assert found.half_width == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5), rel=1e-3)
    assert found.excludes_zero
    assert not interval([-1.0, 2.0, 0.5]).excludes_zero


def test_differences_pair_seeds_and_ignore_those_of_one_side(tmp_path: Path) -> None:
    study = toy_study(tmp_path, cells={"a": None, "b": {"curve": ["0.5x", "1x"]}})
    a, b = study.cells.values()
    results = [made_up_result(a, seed, 100, 50.0 + 10 * seed) for seed in (0, 1, 2)]
    results += [made_up_result(b, seed, 100, 48.0 + 10 * seed) for seed in (2, 1)]
    results += [made_up_result(b, 1, 50, 30.0)]
    found = paired_difference(study, results, Difference("d", "a", "b"))
    assert found is not None
    assert found.values == pytest.approx((2.0, 2.0))
    swapped = paired_difference(study, results, Difference("d", "b", "a"))
    assert swapped is not None
    assert (swapped.mean, swapped.half_width) == pytest.approx((-found.mean, found.half_width))
    early = paired_difference(study, results, Difference("d", "a", "b", over_step=50))
    assert early is not None
    assert early.values == pytest.approx((30.0,))
    assert paired_difference(study, results, Difference("d", "a", "b"), "vqa") is None


@pytest.mark.parametrize("values", [(1.0, 2.0, 4.0), (-0.5, 0.1, 0.3, -2.0)])
def test_the_p_value_is_that_of_the_t_test(values: tuple[float, ...]) -> None:
    assert p_value(interval(values)) == pytest.approx(ttest_1samp(values, 0).pvalue)


def test_holm_multiplies_the_smallest_most_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.4]) == pytest.approx([0.8, 0.8])
    assert holm([0.9, 0.8, 0.9]) == [1.0, 1.0, 1.0]
    assert holm([]) == []
