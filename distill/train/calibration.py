"""Decay, step and scale of each head, measured against the teacher's attention on a few sequences.

Weights carry over from attention, but attention has no decay, and its softmax fixes a scale that linear attention
lacks. Both are found against what the teacher's heads read (before o_proj): for each head, the half-life out of a grid
whose output explains the teacher's best (`fit`), or the one whose mean look-back is the teacher's,
E[sum_s a(t,s) (t-s)] (`lookback`); and with it the scale, by least squares. docs/results/calibrate.md compares the two.
Where a mixer has more beside its state, the share of that is found together with the scale. A gate that has no bias is
opened first, by least squares on its inputs.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...students import HybridForCausalLM, Mixer
from ...students.modeling.documents import Documents, document_index
from ...teachers import AttentionView, attention_view
from ..objectives import attention_pairs
from ..run.seconds import part

RIDGE = 1e-4  # of the mean square of an input
HALF_LIVES = tuple(2.0**i for i in range(-1, 12))  # tokens
_Candidate = tuple[float, float | None]  # half-life and, where a mixer has some, strength


@dataclass(frozen=True)
class Fit:
    """What was found for a mixer of H heads, of P channels each."""

    half_life: Tensor  # (H,), tokens
    scale: Tensor  # (H, P) where it scales channels, else (H, 1)
    error: Tensor  # (), mean over heads of ||scaled output - attention's||^2 / ||attention's||^2
    lookback: Tensor  # (H,), tokens: the teacher's
    strength: Tensor | None = None  # (H,), where it has strengths
    share: Tensor | None = None  # (H,), where something stands beside its state
    gate: Tensor | None = None  # (hidden,), the row that opens a gate without a bias

    def set(self, mixer: Mixer) -> None:
        """Gives a mixer what was found for it, or for one that is the same before it is calibrated."""
        if self.gate is not None:
            mixer.open_gate(self.gate)
        mixer.set_decay(self.half_life, self.scale)
        if self.strength is not None:
            mixer.set_strength(self.strength)
        if self.share is not None:
            mixer.set_share(self.share)

    def record(self) -> dict:
        """The figures that a stage puts down."""
        return {
            "error": self.error.item(),
            "half_life": self.half_life.tolist(),
            "lookback": self.lookback.tolist(),
        }


@dataclass
class _Sums:
    """Sums over tokens, for each channel of a layer: of candidates u against the target o, and of what is beside, w."""

    uo: Tensor  # (candidates, H*P)
    uu: Tensor
    oo: Tensor  # (H*P,)
    uw: Tensor
    wo: Tensor
    ww: Tensor
    lookback: Tensor  # (H,)
    tokens: int = 0


@part("fitting")
@torch.no_grad()
def calibrate(
    teacher: PreTrainedModel,
    student: HybridForCausalLM,
    batches: list[dict[str, Tensor]],
    decay: str = "fit",
    half_lives: tuple[float, ...] = HALF_LIVES,
    layers: set[int] | None = None,
) -> dict[int, Fit]:
    """Sets the decay and scale of every mixer that has them; returns what was found, by layer.

    A gate that has no bias is opened first. Mixers with TransPoints are to be at 0: it is their state-space form that
    has these parameters.

    Args:
        batches: each {"input_ids", "position_ids"}, (B, L).
        decay: `fit` or `lookback`.
        half_lives: the grid, in tokens.
        layers: whose mixers; None: all.
    """
    mixers = {
        layer: mixer
        for layer, mixer in enumerate(student.mixer_layers())
        if mixer is not None and mixer.has_decay and (layers is None or layer in layers)
    }
    views = [view for view in attention_view(teacher, check=False) if view.layer in mixers]
    gates = _gates(teacher, [view for view in views if mixers[view.layer].gate_shut], batches)
    for layer, row in gates.items():
        mixers[layer].open_gate(row)
    candidates = {layer: _candidates(mixer, half_lives) for layer, mixer in mixers.items()}
    sums: dict[int, _Sums] = {}
    for batch in batches:
        pairs = attention_pairs(teacher, views, batch)
        seq_idx = document_index(batch["position_ids"])
        documents = Documents(seq_idx)  # once for all mixers and half-lives, as it waits for the device
        for view in views:
            where = (pairs[view.layer], seq_idx, documents)
            _accumulate(sums, view, mixers[view.layer], *where, candidates[view.layer])
    fits = {}
    for layer, mixer in mixers.items():
        fits[layer] = _best(mixer, sums[layer], decay, candidates[layer], gates.get(layer))
        fits[layer].set(mixer)
    return fits


def save_fits(fits: dict[int, Fit], path: Path) -> None:
    """Keeps them in a file, which `read_fits` reads."""
    named = {f"{layer}.{name}": value for layer, fit in fits.items() for name, value in vars(fit).items()}
    path.write_bytes(save({name: value.contiguous() for name, value in named.items() if value is not None}))


def read_fits(path: Path, device: torch.device) -> dict[int, Fit]:
    """By layer; none where there is no such file, or no whole one: what was found can be found again."""
    found: dict[int, dict[str, Tensor]] = defaultdict(dict)
    try:
        for name, value in load_file(path, device=str(device)).items():
            if not (value.is_floating_point() and value.isfinite().all()):
                return {}
            layer, _, name = name.partition(".")
            found[int(layer)][name] = value
        return {layer: Fit(**values) for layer, values in found.items()}
    except (OSError, SafetensorError, ValueError, TypeError):
        return {}


def _candidates(mixer: Mixer, half_lives: tuple[float, ...]) -> list[_Candidate]:
    """What is tried for each head. With strengths, every other half-life: each is tried with each."""
    if not mixer.strengths:
        return [(half_life, None) for half_life in half_lives]
    return list(itertools.product(half_lives[::2], mixer.strengths))


def _gates(teacher: PreTrainedModel, views: list[AttentionView], batches: list) -> dict[int, Tensor]:
    """For each layer the row of weights u (hidden) that leaves least of (u.h - 1)^2 over the layer's inputs h."""
    if not views:
        return {}
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    for batch in batches:
        for layer, (hidden, *_) in attention_pairs(teacher, views, batch).items():
            h = hidden.flatten(0, 1).double()
            products, total = sums.get(layer, (0, 0))
            sums[layer] = (products + h.T @ h, total + h.sum(0))
    for products, _ in sums.values():
        products.diagonal().add_(RIDGE * products.diagonal().mean())
    return {layer: torch.linalg.solve(products, total).float() for layer, (products, total) in sums.items()}


def _accumulate(
    sums: dict[int, _Sums],
    view: AttentionView,
    mixer: Mixer,
    pair: tuple,
    seq_idx: Tensor,
    documents: Documents,
    candidates: list[_Candidate],
) -> None:
    hidden, _, position_embeddings = pair
    target, lookback = _attention_heads(view, hidden, position_embeddings, seq_idx)
    channels, heads = target.shape[-1], mixer.num_heads
    if view.layer not in sums:
        zeros = target.new_zeros(len(candidates), channels)
        uo, uu, uw = (zeros.clone() for _ in range(3))
        oo, wo, ww = (zeros[0].clone() for _ in range(3))
        sums[view.layer] = _Sums(uo, uu, oo, uw, wo, ww, target.new_zeros(heads))
        mixer.set_share(target.new_ones(heads))
    total = sums[view.layer]
    beside = mixer.beside(hidden, position_embeddings, seq_idx, documents)
    ones = torch.ones(heads, 1, device=target.device)
    with _reading(mixer) as read:
        for i, (half_life, strength) in enumerate(candidates):
            mixer.set_decay(half_life * ones[:, 0], ones)
            if strength is not None:
                mixer.set_strength(strength * ones[:, 0])
            mixer(hidden, position_embeddings, seq_idx=seq_idx, documents=documents)
            output = read.pop().float()
            if beside is not None:
                output -= beside.float()
                total.uw[i] += (output * beside).sum((0, 1))
            total.uo[i] += (output * target).sum((0, 1))
            total.uu[i] += (output * output).sum((0, 1))
    total.oo += (target * target).sum((0, 1))
    if beside is not None:
        total.wo += (beside * target).sum((0, 1))
        total.ww += (beside * beside).sum((0, 1))
    total.lookback += lookback
    total.tokens += seq_idx.numel()


@contextmanager
def _reading(mixer: Mixer) -> Iterator[list[Tensor]]:
    """Puts what the output projection is given into a list, and projects nothing; other projections of the same inputs
    by the same weights are taken once, as far as neither is written in place. With all of a grid these are most of the
    operations."""
    read: list[Tensor] = []

    def remembered(module: nn.Linear) -> Callable[[Tensor], Tensor]:
        forward, last = module.forward, None

        def project(given: Tensor) -> Tensor:
            nonlocal last
            written = [parameter._version for parameter in module.parameters()]
            if last is None or last[0] is not given or last[1] != written or last[2]._version != last[3]:
                found = forward(given)
                last = given, written, found, found._version
            return last[2]

        return project

    def take(given: Tensor) -> Tensor:
        read.append(given)
        return given

    meanwhile = {module: remembered(module) for module in mixer.modules() if isinstance(module, nn.Linear)}
    meanwhile[mixer.out] = take
    for module, forward in meanwhile.items():
        module.__dict__["forward"] = forward
    try:
        yield read
    finally:
        for module in meanwhile:
            del module.forward  # the class's own is left


def _attention_heads(view: AttentionView, hidden, position_embeddings, seq_idx) -> tuple[Tensor, Tensor]:
    """What the teacher's heads read, (B,L,H*P) in float32, and their summed look-back (H,), within documents."""
    q, k, v = view.project(hidden.to(view.q_proj.weight.dtype), position_embeddings)
    elsewhere = (seq_idx[:, :, None] != seq_idx[:, None, :])[:, None]
    weights = view.weights(q, k).masked_fill(elsewhere, 0)
    weights = weights / weights.sum(-1, keepdim=True)
    t = torch.arange(hidden.shape[1], device=hidden.device)
    distance = (t[:, None] - t[None, :]).clamp(min=0)
    return view.attend(weights, v).flatten(2).float(), (weights * distance).sum((0, 2, 3))


def _best(mixer: Mixer, sums: _Sums, decay: str, candidates: list[_Candidate], gate: Tensor | None) -> Fit:
    """Chooses each head's half-life, strength, scale and share from the sums."""
    by_head = (len(candidates), mixer.num_heads, mixer.head_dim)
    uo, uu, uw = (of.view(by_head) for of in (sums.uo, sums.uu, sums.uw))
    oo, wo, ww = (of.view(by_head[1:]).sum(-1) for of in (sums.oo, sums.wo, sums.ww))  # one for a head
    if not mixer.scales_channels:  # one for a head
        uo, uu, uw = (of.sum(-1, keepdim=True) for of in (uo, uu, uw))
    uu = uu.clamp(min=1e-20)
    # The share of w at which u, with its best scale, leaves least of o.
    left = ww - (uw**2 / uu).sum(-1)
    share = torch.where(ww > 0, (wo - (uo * uw / uu).sum(-1)) / left.clamp(min=1e-6 * ww + 1e-20), 0).clamp(0, 2)
    scales = (uo - share[..., None] * uw) / uu
    if (ww > 0).any() and not mixer.scales_channels:  # a step, which is positive: w makes up for it
        scales = scales.clamp(min=0)
        share = ((wo - (scales * uw).sum(-1)) / ww).clamp(0, 2)
    rest = uo - share[..., None] * uw
    # What both take off the squared error.
    gain = (scales * (2 * rest - scales * uu)).sum(-1) + 2 * share * wo - share**2 * ww
    lookback = sums.lookback / sums.tokens
    grid = torch.tensor([half_life for half_life, _ in candidates], device=uo.device)
    among = gain
    if decay == "lookback":  # weights that fall by d a token look back d / (1 - d) tokens on average
        wanted = math.log(2) / (1 / lookback.clamp(min=1e-3)).log1p()
        away = (grid[:, None].log() - wanted.log()).abs()
        among = gain.masked_fill(away > away.min(0).values, -math.inf)
    best = among.argmax(0)
    heads = torch.arange(mixer.num_heads, device=uo.device)
    return Fit(
        half_life=grid[best],
        scale=scales[best, heads],
        error=(1 - gain[best, heads] / oo).mean(),
        lookback=lookback,
        strength=torch.tensor([strength for _, strength in candidates], device=uo.device)[best]
        if mixer.strengths
        else None,
        share=share[best, heads] if (ww > 0).any() else None,
        gate=gate,
    )
