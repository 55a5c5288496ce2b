"""How well a teacher still does where stand-ins take the place of some layers' attention."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...kernels.kl import linear_kl
from ...teachers import attention_view, decoder_layers, output_head
from ..measure.recall import Item, answer_tokens, in_batches, stacked
from ..run.records import LayerScore
from .stand_ins import StandIn

POSITIONS = 64  # of a text, at which predictions are compared


@dataclass
class _Pass:
    """A batch (B,L), and what is measured on it: predictions at some of its positions, or answers."""

    ids: Tensor
    stand_ins: dict[int, StandIn]
    answers: list[list[tuple[int, int]]] | None = None


@dataclass
class _Sums:
    kl: float = 0.0
    tokens: int = 0
    logprob: float = 0.0
    answer_tokens: int = 0
    right: int = 0
    answers: int = 0

    def add(self, other: "_Sums") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Judge:
    """Scores of a teacher with stand-ins in some of its layers.

    Args:
        on_text: for each layer what stands in for its attention where the KL is taken,
        on_items: and where recall is; of the same layers.
        texts: tokens (n, L); each is taken as one text, whatever documents are in it.
        items: texts with answers in them, of `measure.recall`.
        errors: of the mixer of each layer, as `calibrate` finds it.
        on_measured: called whenever a set has been measured on a batch.
        batch_tokens: of items, in one pass.
        bf16: whether matrix products are rounded to bfloat16.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        on_text: dict[int, StandIn],
        on_items: dict[int, StandIn],
        texts: Tensor,
        items: Sequence[Item],
        errors: Mapping[int, float] | None = None,
        on_measured: Callable[[], None] = lambda: None,
        batch_tokens: int = 16384,
        bf16: bool = False,
    ):
        self.teacher, self.candidates, self.errors = teacher.eval(), list(on_text), errors or {}
        self.on_measured = on_measured
        self.autocast = partial(torch.autocast, teacher.device.type, torch.bfloat16, enabled=bf16)
        self.head = output_head(teacher)
        self.layers = list(decoder_layers(teacher))
        self.attention = {view.layer: view.module for view in attention_view(teacher, check=False)}
        device = teacher.device
        batches = texts.split(max(1, batch_tokens // texts.shape[1]))
        self.passes = [_Pass(ids.to(device), on_text) for ids in batches]
        for batch in in_batches(items, batch_tokens):
            self.passes.append(_Pass(stacked(batch).to(device), on_items, [item.answers for item in batch]))
        with self.autocast(), torch.no_grad():
            self.wanted = [self._decode(one) for one in self.passes]  # hidden states; logits come from them again
            self.own = _Sums()
            for one, hidden in zip(self.passes, self.wanted, strict=True):
                self.own.add(self._measure(one, hidden, hidden))

    @torch.no_grad()
    def score(self, replaced: Iterable[int]) -> LayerScore:
        """With these layers replaced."""
        replaced, total = frozenset(replaced), _Sums()
        for one, true in zip(self.passes, self.wanted, strict=True):
            with self.autocast(), self._replacing(replaced, one):
                hidden = self._decode(one)
            total.add(self._measure(one, hidden, true))
            self.on_measured()
        return self._score(total, replaced)

    @torch.no_grad()
    def toggled(self, replaced: Iterable[int], layers: Iterable[int]) -> dict[int, LayerScore]:
        """For each of `layers`: with `replaced` and that one replaced, or, if it is among them, without it. What lies
        below it is not computed again."""
        replaced, totals = frozenset(replaced), {layer: _Sums() for layer in layers}
        for one, true in zip(self.passes, self.wanted, strict=True):
            inputs: list[Any] = []
            with self.autocast(), self._replacing(replaced, one), self._keeping(inputs):
                self._decode(one)
            for layer, total in totals.items():
                with self.autocast(), self._replacing(replaced ^ {layer}, one), self._starting(layer, inputs):
                    hidden = self._decode(one)
                total.add(self._measure(one, hidden, true))
                self.on_measured()
        return {layer: self._score(total, replaced ^ {layer}) for layer, total in totals.items()}

    def _score(self, found: _Sums, replaced: frozenset[int]) -> LayerScore:
        answers = max(1, found.answers)
        lost = (self.own.logprob - found.logprob) / max(1, found.answer_tokens)
        error = sum(self.errors.get(layer, 0.0) for layer in replaced) if self.errors else None
        return LayerScore(found.kl / max(1, found.tokens), lost, found.right / answers, error)

    def _decode(self, one: _Pass) -> Tensor:
        return self.teacher.get_decoder()(input_ids=one.ids, use_cache=False).last_hidden_state

    def losses(self, gates: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """On pass `number`, with each layer's output gates[i] of attention's and the rest of the stand-in's: the KL of
        a token of text (0 in a pass of items) and what a token of an answer lost (0 in one of text). Differentiable."""
        one, true = self.passes[number], self.wanted[number]
        with self.autocast(), self._gated(gates, one):
            hidden = self._decode(one)
            if one.answers is None:
                return self._kl(hidden, true)[0], gates.new_zeros(())
            now, before = (answer_tokens(self.head, given, one.ids, one.answers)[0].mean() for given in (hidden, true))
            return gates.new_zeros(()), before.detach() - now

    def _measure(self, one: _Pass, hidden: Tensor, true: Tensor) -> _Sums:
        with self.autocast():
            if one.answers is None:
                kl, tokens = self._kl(hidden, true)
                return _Sums(kl=kl.item() * tokens, tokens=tokens)
            own, right = answer_tokens(self.head, hidden, one.ids, one.answers)
        spans = [b - a for spans in one.answers for a, b in spans]
        given = [all(part) for part in right.cpu().split(spans)]
        return _Sums(logprob=own.sum().item(), answer_tokens=len(own), right=sum(given), answers=len(spans))

    def _kl(self, hidden: Tensor, true: Tensor) -> tuple[Tensor, int]:
        """The mean KL over some tokens, and how many these are."""
        # Spread over all depths: what is compared is the same for all sets, so few are enough.
        at = torch.arange(0, hidden.shape[1], max(1, hidden.shape[1] // POSITIONS), device=hidden.device)
        found, weight = self.head.operands(hidden[:, at])
        wanted, _ = self.head.operands(true[:, at])
        return linear_kl(found, weight, wanted, weight, softcap=self.head.softcap), len(hidden) * len(at)

    @contextmanager
    def _replacing(self, replaced: Iterable[int], one: _Pass) -> Iterator[None]:
        """Meanwhile attention in these layers is what stands in for it."""

        def standing_in(stand_in: StandIn, *args, **kwargs):
            return stand_in(*_inputs(args, kwargs)), None

        modules = [self.attention[layer] for layer in replaced]
        for layer, module in zip(replaced, modules, strict=True):
            module.forward = partial(standing_in, one.stand_ins[layer])
        try:
            yield
        finally:
            for module in modules:
                del module.forward  # the class's own is left

    @contextmanager
    def _gated(self, gates: Tensor, one: _Pass) -> Iterator[None]:
        """Meanwhile each layer's output is a mixture of attention's and of what stands in for it."""

        def mixing(module, stand_in: StandIn, gate: Tensor, *args, **kwargs):
            own, *rest = type(module).forward(module, *args, **kwargs)
            return gate * own + (1 - gate) * stand_in(*_inputs(args, kwargs)), *rest

        modules = [self.attention[layer] for layer in self.candidates]
        for layer, module, gate in zip(self.candidates, modules, gates, strict=True):
            module.forward = partial(mixing, module, one.stand_ins[layer], gate)
        try:
            yield
        finally:
            for module in modules:
                del module.forward

    @contextmanager
    def _keeping(self, inputs: list) -> Iterator[None]:
        """Puts down what each layer gives; what the first one gets, first."""

        def keep(module, args, kwargs, output):
            if not inputs:
                inputs.append(None)
            inputs.append(output)

        handles = [layer.register_forward_hook(keep, with_kwargs=True) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _starting(self, first: int, inputs: list) -> Iterator[None]:
        """Meanwhile layers before `first` do nothing, and the last of them gives what it gave before."""
        before = self.layers[:first]
        for layer in before:
            layer.forward = lambda *args, **kwargs: inputs[first]
        try:
            yield
        finally:
            for layer in before:
                del layer.forward


def _inputs(args: tuple, kwargs: dict) -> tuple[Tensor, Any]:
    """Of a call of attention: hidden states and position embeddings, which families hand on in their own ways."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], kwargs.get("position_embeddings")
