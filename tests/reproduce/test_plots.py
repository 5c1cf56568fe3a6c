"""The curves that pictures show."""

import numpy as np
import pytest
from scipy.stats import gaussian_kde

from innermax.reproduce.plots import estimate_density


@pytest.mark.parametrize("size", [2, 5, 300])
def test_densities_are_scipys(size):
    values, places = np.random.default_rng(size).exponential(0.3, size), np.linspace(-1, 2, 50)
    assert estimate_density(values, places) == pytest.approx(gaussian_kde(values)(places), rel=1e-9, abs=1e-12)
