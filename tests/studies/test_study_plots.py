"""What the pictures show, read from their axes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from studies import study_plots
from studies.paired_statistics import interval
from tests.support.study import made_up_result, toy_study


def points(axes: Axes, label: str) -> list[list[tuple[float, float]]]:
    """Of every line with the label."""
    lines = [line for line in axes.get_lines() if line.get_label() == label]
    return [[(float(x), float(y)) for x, y in np.column_stack(line.get_data())] for line in lines]


def test_means_have_an_interval_and_differences_the_sign_of_the_first_side(tmp_path: Path) -> None:
    differences = [{"name": "A over plain", "of": "a", "over": "plain"}]
    study = toy_study(tmp_path, seeds=[0, 1, 2], cells={"a": None, "plain": None}, differences=differences)
    results = []
    for seed, score in enumerate((62.0, 63.0, 67.0)):
        results.append(made_up_result(study.cells["a"], seed, 100, score))
        results.append(made_up_result(study.cells["plain"], seed, 100, 64.0 - 2 * seed))
    cells, compared = (
        study_plots.study_figures(study, results)[name].axes[0] for name in ("cells", "differences")
    )
    half_width = interval([62.0, 63.0, 67.0]).half_width
    assert points(cells, "mean over seeds")[0] == [pytest.approx((64.0, 0))]
    (low, high) = points(cells, "95 % interval")[0]
    assert (low[0], high[0]) == pytest.approx((64 - half_width, 64 + half_width))
    assert [x for x, _ in points(cells, "seed")[0]] == pytest.approx([62.0, 63.0, 67.0])
    assert points(compared, "mean over seeds") == [[pytest.approx((2.0, 0))]]
    assert [x for x, _ in points(compared, "seed")[0]] == pytest.approx([-2.0, 1.0, 7.0])
