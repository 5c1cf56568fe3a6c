"""A network in parts."""

import pytest

from tests.helpers.processes import check_alike_in_parts

pytestmark = pytest.mark.timeout(900)  # processes start slowly on a machine that is busy otherwise


@pytest.mark.slow
@pytest.mark.parametrize("name", ["standard", "warm", "trades"])
def test_a_network_in_parts_trains_as_a_whole_one(alone, together, name):
    check_alike_in_parts(alone(name), together / f"{name}-fsdp")
