import pytest

from hf_logits.costs import relative_cost
from oracles import COSTS


@pytest.mark.parametrize("case", COSTS, ids=str)
def test_the_published_savings(case):
    small, large, share = case
    saving, _ = COSTS[case]
    assert abs(1 - relative_cost(share, small=small, large=large) - saving) < 5e-5


def test_the_extremes_of_the_cost():
    assert relative_cost(1.0, small=3.0, large=11.0) == 1
    assert relative_cost(0.0, small=3.0, large=11.0) == 3 / 11
