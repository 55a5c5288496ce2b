"""Which layers should keep attention, for any number of them."""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

from ..run.records import LayerScore, Selection
from .judge import Judge

T = TypeVar("T")
Loss = Callable[[LayerScore], float]


def most_sets(layers: int, beam: int | None) -> int:
    """How many sets of layers are measured at most: one by one (beam None), or jointly."""
    return layers + 1 if beam is None else layers + 2 + beam * layers * (layers + 1) // 2


def by_rank(losses: dict[int, float]) -> dict[str, list[int]]:
    """For each number of layers, those whose replacement costs most, each on its own."""
    ranked = sorted(losses, key=lambda layer: -losses[layer])
    return {str(k): sorted(ranked[:k]) for k in range(len(ranked) + 1)}


def one_by_one(judge: Judge, loss: Loss) -> Selection:
    """Each layer replaced alone: as many passes as there are layers. That layers do for one another is not seen."""
    alone = judge.toggled((), judge.candidates)
    return Selection(judge.score(()), _by_name(alone), by_rank({layer: loss(score) for layer, score in alone.items()}))


def by_gates(judge: Judge, loss: Loss, gates: dict[int, float]) -> Selection:
    """Those first whose gate closes last; `alone` beside it, as in `one_by_one`."""
    return dataclasses.replace(one_by_one(judge, loss), kept=by_rank(gates), gates=_by_name(gates))


def jointly(judge: Judge, loss: Loss, beam: int, adding: bool) -> Selection:
    """Beam search, a layer at a time: from all replaced, the best ones get their attention back (`adding`); or from
    none, those whose replacement costs least are replaced. n^2 / 2 passes for each set in the beam."""
    layers = frozenset(judge.candidates)
    first = layers if adding else frozenset()
    sets, alone = {first: judge.score(first)}, judge.toggled((), judge.candidates)
    kept, scores = {}, {}
    for step in range(len(layers) + 1):
        best = sorted(sets, key=lambda replaced: (loss(sets[replaced]), sorted(replaced)))[:beam]
        left = len(layers) - len(best[0])
        kept[str(left)], scores[str(left)] = sorted(layers - best[0]), sets[best[0]]
        if step == 0 and not adding:  # known already
            sets = {frozenset((layer,)): score for layer, score in alone.items()}
            continue
        sets = {}
        for replaced in best:
            free = sorted(replaced if adding else layers - replaced)
            new = [layer for layer in free if replaced ^ {layer} not in sets]
            sets |= {replaced ^ {layer}: score for layer, score in judge.toggled(replaced, new).items()}
    return Selection(judge.score(()), _by_name(alone), kept, scores)


def _by_name(values: dict[int, T]) -> dict[str, T]:
    return {str(layer): value for layer, value in values.items()}
