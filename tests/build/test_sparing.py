"""The fewest parts that have to stay as they are, where a sample does not show what each does at worst."""

from __future__ import annotations

import pytest

from mlflow_tdeploy.build.recipes import NothingWithinBudgetError
from mlflow_tdeploy.build.sparing import spare_fewest

PARTS = tuple("abcdefgh")


class Trials:
    """Graphs that pass where what is needed is spared; each part but one shows in a sample."""

    def __init__(self, needed, hidden=(), late=False):
        self.needed, self.hidden, self.tried, self.is_late = set(needed), set(hidden), [], late

    def passes(self, spared):
        self.tried.append(spared)
        return self.needed <= set(spared)

    def distance(self, spared, alone=()):
        assert set(alone) == set(PARTS) - set(spared)
        quantized = set(PARTS) - set(spared)
        return float(sum((PARTS.index(one) + 1) ** 2 for one in quantized - self.hidden)) ** 0.5

    def nothing_within(self, recipe, what="none of them"):
        return NothingWithinBudgetError(f"{what}: leave '{recipe}' out")

    def order_known(self):
        return self.late()

    def late(self):
        return self.is_late and len(self.tried) > 2  # once the order is known


def spared(trials):
    return spare_fewest(trials, PARTS, lambda names: tuple(one for one in PARTS if one in set(names)), "a-recipe")


def test_nothing_is_spared_where_nothing_has_to_be():
    trials = Trials(())
    assert spared(trials) == ()
    assert len(trials.tried) == 1


def test_what_does_most_is_spared():
    assert spared(Trials("h")) == ("h",)
    assert spared(Trials("gh")) == ("g", "h")


@pytest.mark.parametrize("needed", ["a", "c", "ah", "ch"])
def test_what_a_sample_does_not_show_is_found_by_the_difference_it_makes(needed):
    assert spared(Trials(needed, hidden="ac")) == tuple(needed)


def test_what_is_late_takes_the_first_it_has_found():
    quick, patient = Trials("a", hidden="ab", late=True), Trials("a", hidden="ab")
    assert (len(spared(quick)), spared(patient)) == (7, ("a",))


def test_a_graph_that_is_over_the_budget_itself_is_not_searched():
    trials = Trials([*PARTS, "what no part makes up for"])
    with pytest.raises(NothingWithinBudgetError, match="starts from is over the budget itself"):
        spared(trials)
    assert trials.tried == [(), PARTS]


def test_all_of_them_is_nothing():
    with pytest.raises(NothingWithinBudgetError, match="a-recipe"):
        spared(Trials(PARTS))
