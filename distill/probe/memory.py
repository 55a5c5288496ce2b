"""What states hold: how large they are, how fast they decay, and how much of a token is left of it, by distance."""

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...students import HybridForCausalLM, Mixer
from ...students.modeling.cache_layers import StateLayer
from ...students.modeling.modeling_hybrid import cache_name
from .linear import Fit, Ridge, sketched
from .reading import hidden_of, states_of

FEATURES = 512  # numbers that a state is reduced to where tokens are read off it
PENALTY = 1e-2


@torch.no_grad()
def heads(model: PreTrainedModel, ids: Tensor) -> dict[int, dict[str, list[float] | None]]:
    """For each layer with a state, by head: its `norm`, a mean over the tokens (B,L), and its `half_life` in tokens,
    after which half is left of it (of the mean rate of its numbers); None where a mixer has no such factor."""
    if not isinstance(model, HybridForCausalLM):
        return {}
    mixers, ids = model.mixer_layers(), ids.to(model.device)
    norms: dict[int, Tensor] = {}
    for held in states_of(model, ids):
        for layer, state in held.items():
            by_head = state.reshape(len(state), _heads(mixers[layer]), -1).norm(dim=-1).mean(0)
            norms[layer] = norms.get(layer, 0) + by_head / ids.shape[1]
    cache, decoder = model.new_cache(mergeable=True), model.get_decoder()
    decoder(input_ids=ids, use_cache=True, **{cache_name(type(decoder)): cache})
    found: dict[int, dict[str, list[float] | None]] = {}
    for layer, norm in norms.items():
        memory, half_life = cache.layers[layer], None
        if isinstance(memory, StateLayer) and (left := memory.log_left) is not None:
            rate = -left.reshape(len(ids), _heads(mixers[layer]), -1).mean((0, 2)) / ids.shape[1]
            half_life = (math.log(2) / rate).tolist()
        found[layer] = {"norm": norm.tolist(), "half_life": half_life}
    return found


@torch.no_grad()
def changed(model: PreTrainedModel, ids: Tensor) -> dict:
    """How much states and hidden states change with one token, by the distance from it.

    The token at a quarter of each row (B,L) is replaced by that of the row after it. Exact, and the same for all
    layers: what a state, or an attending layer, holds of a token is what is otherwise without it.

    Returns:
        `distances`, powers of two; and for `hidden` and `state` by layer the relative change at each of them,
        ||new - old|| / ||old||, a mean over rows whose token did change.
    """
    ids, place = ids.to(model.device), ids.shape[1] // 4
    other = ids.clone()
    other[:, place] = ids[:, place].roll(1, 0)
    rows = ids[:, place] != other[:, place]
    if not rows.any():
        raise ValueError("all rows have the same token there: give other text, or more sequences")
    ids, other = ids[rows], other[rows]
    distances = [2**power for power in range(int(math.log2(ids.shape[1] - 1 - place)) + 1)]
    places = [place + distance for distance in distances]
    pairs = zip(hidden_of(model, ids), hidden_of(model, other), strict=True)
    found: dict = {"distances": distances, "state": {}}
    found["hidden"] = {i: [_change(a[:, p], b[:, p]) for p in places] for i, (a, b) in enumerate(pairs)}
    for t, (own, others) in enumerate(zip(states_of(model, ids), states_of(model, other), strict=True)):
        for layer in own if t in places else ():
            found["state"].setdefault(layer, []).append(_change(own[layer], others[layer]))
    return found


@torch.no_grad()
def recalled(model: PreTrainedModel, ids: Tensor) -> dict:
    """How well the embedding of an earlier token is read off by a linear probe, by the distance from it.

    Probes are fitted on the first half of the rows (B,L) and measured on the second.

    Returns:
        `distances`; and for `hidden` and `state` by layer R^2 at each of them: 0 is what the mean embedding has, 1 all
        of the token. Below 0 there are too few tokens for so many features.
    """
    ids, length = ids.to(model.device), ids.shape[1]
    distances = [0, *(2**power for power in range(int(math.log2(max(length // 4, 1))) + 1))]
    embeddings = model.get_input_embeddings()
    half = len(ids) // 2
    if half < 1:
        raise ValueError("probes are fitted to some sequences and measured on others: give two or more")
    probes: dict[tuple, Ridge] = {}
    fits: dict[tuple, Fit] = {}
    for begin, rows in enumerate((ids[:half], ids[half:])):
        embedded = embeddings(rows).float()  # type: ignore[misc]  # a module
        features = {("hidden", i): h for i, h in enumerate(hidden_of(model, rows))}
        features |= {("state", i): s for i, s in _sketches(model, rows).items()}
        for name, given in features.items():
            for distance in distances:
                of, target = given[:, distance:].flatten(0, 1), embedded[:, : length - distance].flatten(0, 1)
                probe = probes.setdefault((*name, distance), Ridge(PENALTY))
                if begin == 0:
                    probe.add(of, target)
                else:
                    fits.setdefault((*name, distance), Fit()).add(probe(of), target)
    found: dict = {"distances": distances, "hidden": {}, "state": {}}
    for kind, layer, distance in fits:
        found[kind].setdefault(layer, []).append(fits[kind, layer, distance].r2)
    return found


def _sketches(model: PreTrainedModel, ids: Tensor) -> dict[int, Tensor]:
    """By layer its states after each token (B,L,features)."""
    found: dict[int, list[Tensor]] = {}
    for states in states_of(model, ids):
        for layer, state in states.items():
            found.setdefault(layer, []).append(sketched(state, FEATURES).clone())
    # TransMamba layers have a state from their TransPoint on: those that have one from the first token are read.
    return {layer: torch.stack(held, 1) for layer, held in found.items() if len(held) == ids.shape[1]}


def _change(own: Tensor, other: Tensor) -> float:
    a, b = own.flatten(1).float(), other.flatten(1).float()
    return ((b - a).norm(dim=-1) / a.norm(dim=-1).clamp(min=1e-12)).mean().item()


def _heads(mixer: Mixer | None) -> int:
    assert mixer is not None  # it has a state
    return mixer.num_heads
