"""The logit lens (nostalgebraist 2020): what a model would predict if a layer were its last one."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...teachers import output_head
from .reading import hidden_of

TOKENS = 256  # whose predictions are held at a time


@torch.no_grad()
def lens(model: PreTrainedModel, ids: Tensor, teacher: PreTrainedModel | None = None) -> dict[str, list[dict]]:
    """How the predictions of a model's layers come to its last one's, and how far they are from its teacher's.

    Args:
        ids: tokens (B,L), each row a text.

    Returns:
        for `student`, and where there is a teacher for `teacher`, by layer `kl`, of its predictions from the model's
        own, in nats a token, and `same_top`, how often both have the same most likely token. And for `beside`, where
        both have as many layers, the same of the student's layer from the teacher's.
    """
    models = {"student": model} | ({} if teacher is None else {"teacher": teacher})
    sums: dict[str, list[list[float]]] = {}
    for row in ids.split(1):
        parts = [_predictions(one, row) for one in models.values()]
        for chunk in zip(*parts, strict=True):  # of each model by layer
            pairs = {
                name: [(layers[-1], layer) for layer in layers] for name, layers in zip(models, chunk, strict=True)
            }
            if len(chunk) == 2 and len(chunk[0]) == len(chunk[1]):
                pairs["beside"] = list(zip(chunk[1], chunk[0], strict=True))
            for name, compared in pairs.items():
                totals = sums.setdefault(name, [[0.0, 0.0] for _ in compared])
                for total, (expected, found) in zip(totals, compared, strict=True):
                    width = min(expected.shape[-1], found.shape[-1])  # vocabularies may be padded differently
                    p, q = (t[:, :width].log_softmax(-1) for t in (expected, found.to(expected.device)))
                    total[0] += (p.exp() * (p - q)).sum().item()
                    total[1] += (p.argmax(-1) == q.argmax(-1)).sum().item()
    count = ids.numel()
    return {
        name: [{"kl": max(kl, 0.0) / count, "same_top": same / count} for kl, same in totals]
        for name, totals in sums.items()
    }


def _predictions(model: PreTrainedModel, ids: Tensor) -> Iterator[list[Tensor]]:
    """For some tokens at a time logits (n, V) by layer, of a text (1,L)."""
    head, norm = output_head(model, check=False), last_norm(model)
    *hidden, last = (t[0] for t in hidden_of(model, ids.to(model.device)))
    for first in range(0, len(last), TOKENS):
        part = slice(first, first + TOKENS)
        yield [*(head.logits(norm(t[part])) for t in hidden), head.logits(last[part])]


@torch.no_grad()
def last_norm(model: PreTrainedModel) -> nn.Module:
    """What a decoder puts between its last layer and the output matrix, whatever it is called."""
    decoder, found = model.get_decoder(), []
    parts = [part for part in decoder.children() if part is not decoder.layers]
    handles = [part.register_forward_hook(lambda part, args, output: found.append((part, output))) for part in parts]
    try:
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        last = decoder(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    return next((part for part, output in found if output is last), nn.Identity())
