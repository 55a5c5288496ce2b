"""Held-out quality: how far a student's next-token distributions are from its teacher's."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...teachers import output_head
from ..data.packed import PackedDataset
from ..data.sources import DataError
from ..run.records import Quality
from ..run.seconds import part
from ..tokenizers import decoded

CHUNK = 512  # tokens whose logits are held at a time
BATCH = 8192  # tokens that go through a model at a time, padding counted, where one document does not have more
ALIKE = 0.9  # of the longest document of a batch: the others have at least as many of its tokens
NONE = -100  # the label of a token that predicts nothing that is here


class HeldOut:
    """Held-out sequences, and the teacher's predictions on them, kept so that every student is measured on the same."""

    @part("measuring")
    def __init__(
        self,
        dataset: PackedDataset,
        sequences: int,
        tokenizer: PreTrainedTokenizerBase,
        teacher: PreTrainedModel | None = None,
    ):
        # Documents in rows of their own: a model from elsewhere may not tell packed ones apart in all its layers.
        documents = [ids for sequence in dataset.spread(sequences) for ids in _documents(sequence)]
        self.longest = max(len(ids) for ids in documents)
        if self.longest < 2:
            raise DataError("the held-out sequences hold no token that could be predicted: give longer ones, or more")
        self.bytes = sum(len(decoded(tokenizer, ids[1:]).encode()) for ids in documents)
        self.batches = [_Batch(batch) for batch in _alike(documents)]
        # Hidden states are small; the teacher's logits come again from them, a chunk at a time.
        self.targets = [None if teacher is None else batch.hidden(teacher) for batch in self.batches]
        self.teacher = teacher
        self.head = output_head(teacher) if teacher is not None else None

    @part("measuring")
    @torch.no_grad()
    def measure(self, model: PreTrainedModel, late: int | None = None) -> Quality:
        """The model's quality on these sequences. late: how many first tokens of each document `late_kl` leaves out."""
        training, head = model.training, output_head(model)
        model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=model.device)  # of nll, KL, late KL, same top
        predicted = tokens = late_tokens = 0
        for batch, wanted in zip(self.batches, self.targets, strict=True):
            hidden = wanted if wanted is not None and model is self.teacher else batch.hidden(model)
            for first in range(0, len(hidden), CHUNK):
                part = slice(first, first + CHUNK)
                logprobs = head.logits(hidden[part]).log_softmax(-1)
                labels = batch.labels[part]
                sums[0] += F.nll_loss(logprobs, labels.to(logprobs.device), ignore_index=NONE, reduction="sum")
                predicted += int((labels != NONE).sum())
                if wanted is not None and self.head is not None:
                    reference = self.head.logits(wanted[part]).log_softmax(-1)
                    p, q = _of_the_same(reference, logprobs.to(reference.device))
                    by_token = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
                    is_late = batch.positions[part] >= (math.inf if late is None else late)
                    late_of = torch.where(is_late.to(by_token.device), by_token, 0.0)
                    same = p.argmax(-1) == q.argmax(-1)
                    sums[1:] += torch.stack([by_token.sum(), late_of.sum(), same.sum()]).to(sums)
                    tokens += len(p)
                    late_tokens += int(is_late.sum())
        model.train(training)
        nll, kl, late_kl, same_top = sums.tolist()
        return Quality(
            tokens=predicted,
            perplexity=float(torch.tensor(nll / predicted).exp()),
            bits_per_byte=nll / self.bytes / 0.6931471805599453,
            kl=kl / tokens if tokens else None,
            same_top=same_top / tokens if tokens else None,
            late=late,
            late_kl=late_kl / late_tokens if late_tokens else None,
        )


class _Batch:
    """Documents in rows (B, longest), padded at their end, which what comes before does not see; and of all their
    tokens, one document after the other, positions and labels (tokens)."""

    def __init__(self, documents: list[Tensor]):
        self.lengths = [len(ids) for ids in documents]
        self.ids = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
        self.positions = torch.cat([torch.arange(length) for length in self.lengths])
        self.labels = torch.cat([F.pad(ids[1:], (0, 1), value=NONE) for ids in documents])

    @torch.no_grad()
    def hidden(self, model: PreTrainedModel) -> Tensor:
        """The decoder's last hidden states (tokens, hidden)."""
        ids = self.ids.to(model.device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        found = model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        return torch.cat([row[:length] for row, length in zip(found, self.lengths, strict=True)])


def _alike(documents: list[Tensor]) -> Iterator[list[Tensor]]:
    """Documents (L,) in batches of about as long ones."""
    batch: list[Tensor] = []
    for ids in sorted(documents, key=len, reverse=True):
        if batch and (len(ids) < ALIKE * len(batch[0]) or (len(batch) + 1) * len(batch[0]) > BATCH):
            yield batch
            batch = []
        batch.append(ids)
    yield batch


def _of_the_same(reference: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (L, tokens) over those tokens that both have: vocabularies may be padded differently."""
    if reference.shape[-1] == logprobs.shape[-1]:
        return reference, logprobs
    width = min(logprobs.shape[-1], reference.shape[-1])
    return reference[:, :width].log_softmax(-1), logprobs[:, :width].log_softmax(-1)


def _documents(sequence: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The documents (L,) packed into a sequence."""
    starts = (sequence["position_ids"] == 0).nonzero().flatten()
    return sequence["input_ids"].tensor_split(starts[1:])
