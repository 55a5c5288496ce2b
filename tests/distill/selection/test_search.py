"""The search against all sets there are."""

import itertools
import random

import pytest

from transpoint.distill.run.records import LayerScore
from transpoint.distill.selection.search import jointly, most_sets, one_by_one

LAYERS = range(6)


class Known:
    """A judge whose scores are known: what each layer costs, and what is lost besides where all of a group are gone."""

    def __init__(self, costs, groups):
        self.candidates, self.costs, self.groups, self.asked = list(LAYERS), costs, groups, 0

    def score(self, replaced):
        self.asked += 1
        together = sum(cost for group, cost in self.groups if group <= set(replaced))
        return LayerScore(sum(self.costs[layer] for layer in replaced), together, 0.0)

    def toggled(self, replaced, layers):
        return {layer: self.score(frozenset(replaced) ^ {layer}) for layer in layers}


def loss(score):
    return score.kl + score.recall


def best(judge, count):
    sets = (frozenset(LAYERS) - set(kept) for kept in itertools.combinations(LAYERS, count))
    return min(loss(judge.score(replaced)) for replaced in sets)


@pytest.fixture
def judge():
    """Layers 2 and 4 do for one another: either alone is not missed."""
    return Known([0.05, 0.4, 0.01, 0.3, 0.02, 0.2], [({2, 4}, 9.0)])


def test_one_by_one_ranks_by_what_each_costs_alone(judge):
    found = one_by_one(judge, loss)
    assert found.kept == {"0": [], "1": [1], "2": [1, 3], "3": [1, 3, 5], "4": [0, 1, 3, 5], "5": [0, 1, 3, 4, 5],
                          "6": [0, 1, 2, 3, 4, 5]}  # fmt: skip
    assert found.alone["3"] == LayerScore(0.3, 0, 0.0) and found.teacher == LayerScore(0, 0, 0.0)


@pytest.mark.parametrize("adding", [True, False])
def test_layers_that_do_for_one_another_are_seen_jointly(judge, adding):
    found = jointly(judge, loss, 1, adding)
    assert {2, 4} & set(found.kept["2"])
    for count in LAYERS:
        assert loss(found.scores[str(count)]) == pytest.approx(best(judge, count))
    assert found.alone == one_by_one(judge, loss).alone


@pytest.mark.parametrize("adding", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_a_beam_that_holds_every_set_finds_the_best(adding, seed):
    draw = random.Random(seed)
    groups = [(set(draw.sample(list(LAYERS), 3)), draw.uniform(-1, 3)) for _ in range(5)]
    judge = Known([draw.uniform(0, 1) for _ in LAYERS], groups)
    found = jointly(judge, loss, 20, adding)
    assert list(map(len, found.kept.values())) == [int(count) for count in found.kept]
    for count in range(len(LAYERS) + 1):
        replaced = frozenset(LAYERS) - set(found.kept[str(count)])
        assert found.scores[str(count)] == judge.score(replaced)
        assert loss(judge.score(replaced)) == pytest.approx(best(judge, count))


def test_so_many_sets_are_measured(judge):
    one_by_one(judge, loss)
    assert judge.asked == most_sets(6, None)
    for beam in (1, 3):
        judge.asked = 0
        jointly(judge, loss, beam, adding=True)
        assert 0.5 * most_sets(6, beam) < judge.asked <= most_sets(6, beam) + 6
