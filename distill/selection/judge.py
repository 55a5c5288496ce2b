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
from ..measure.recall import Item, stacked
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
        size = max(1, batch_tokens // max((len(item.tokens) for item in items), default=1))
        for first in range(0, len(items), size):
            batch = items[first : first + size]
            self.passes.append(_Pass(stacked(batch).to(device), on_items, [item.answers for item in batch]))
        with self.autocast(), torch.no_grad():
            self.wanted = [self._decode(one) for one in self.passes]  # hidden states; logits come from them again
            self.own = _Sums()
            for one, hidden in zip(self.passes, self.wanted, strict=True):
                self.own.add(self._measure(one, hidden, hidden))

    def score(self, replaced: Iterable[int]) -> LayerScore:
        """With these layers replaced."""
        (found,) = self.scores([(frozenset(replaced), None)])
        return found

    def toggled(self, replaced: Iterable[int], layers: Iterable[int]) -> dict[int, LayerScore]:
        """For each of `layers`: with `replaced` and that one replaced, or, if it is among them, without it."""
        layers, replaced = list(layers), frozenset(replaced)
        return dict(zip(layers, self.scores([(replaced, layer) for layer in layers]), strict=True))

    @torch.no_grad()
    def scores(self, wanted: list[tuple[frozenset[int], int | None]]) -> list[LayerScore]:
        """Of sets of layers, each with one toggled. Sets that are the same share the layers below those toggled."""
        sums = [_Sums() for _ in wanted]
        for one, true in zip(self.passes, self.wanted, strict=True):
            for replaced in dict.fromkeys(base for base, _ in wanted):
                asked = [i for i, (base, _) in enumerate(wanted) if base == replaced]
                inputs: list[Any] = []
                with self.autocast(), self._replacing(replaced, one), self._keeping(inputs):
                    whole = self._decode(one)
                for i in asked:
                    layer = wanted[i][1]
                    hidden = whole
                    if layer is not None:
                        own = replaced ^ {layer}
                        with self.autocast(), self._replacing(own, one), self._starting(layer, inputs):
                            hidden = self._decode(one)
                    sums[i].add(self._measure(one, hidden, true))
                    self.on_measured()
        sets = [base if layer is None else base ^ {layer} for base, layer in wanted]
        return [self._score(found, replaced) for found, replaced in zip(sums, sets, strict=True)]

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
            now, before = (self._answers(one, given)[0].mean() for given in (hidden, true))
            return gates.new_zeros(()), before.detach() - now

    def _measure(self, one: _Pass, hidden: Tensor, true: Tensor) -> _Sums:
        with self.autocast():
            if one.answers is None:
                kl, tokens = self._kl(hidden, true)
                return _Sums(kl=kl.item() * tokens, tokens=tokens)
            own, right = self._answers(one, hidden)
        spans = [b - a for spans in one.answers for a, b in spans]
        given = [all(part) for part in right.split(spans)]
        return _Sums(logprob=own.sum().item(), answer_tokens=len(own), right=sum(given), answers=len(spans))

    def _kl(self, hidden: Tensor, true: Tensor) -> tuple[Tensor, int]:
        """The mean KL over some tokens, and how many these are."""
        # Spread over all depths: what is compared is the same for all sets, so few are enough.
        at = torch.arange(0, hidden.shape[1], max(1, hidden.shape[1] // POSITIONS), device=hidden.device)
        found, weight = self.head.operands(hidden[:, at])
        wanted, _ = self.head.operands(true[:, at])
        return linear_kl(found, weight, wanted, weight, softcap=self.head.softcap), len(hidden) * len(at)

    def _answers(self, one: _Pass, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of each token of each answer: its log-probability, and whether it is the most likely one."""
        answers = enumerate(one.answers or [])
        rows, places = zip(
            *((row, place) for row, spans in answers for a, b in spans for place in range(a, b)), strict=True
        )
        row, place = torch.tensor(rows), torch.tensor(places)
        ids = one.ids[row, place]
        logprobs = self.head.logits(hidden[row, place - 1]).float().log_softmax(-1)
        return logprobs.gather(1, ids[:, None])[:, 0], (logprobs.argmax(-1) == ids).cpu()

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
