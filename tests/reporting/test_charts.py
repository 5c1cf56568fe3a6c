"""The report's figures."""

import numpy as np
import pytest

from innermax.reporting import charts


def test_the_heat_maps_columns_are_shares_of_examples():
    percentiles = np.linspace(0, 1, 101).tolist()  # uniform
    edges = np.linspace(0, 2, 9)
    assert charts._bin_percentiles([percentiles, None], edges) == pytest.approx([0.25] * 4 + [0] * 4)
    halves = charts._bin_percentiles([[0.5] * 101], edges)
    assert halves[1] + halves[2] == pytest.approx(1)
