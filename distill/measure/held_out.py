"""Held-out quality: how far a student's next-token distributions are from its teacher's."""

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
        # One document at a time: a model from elsewhere may not tell packed documents apart in all its layers.
        self.items = [part for sequence in dataset.spread(sequences) for part in _documents(sequence)]
        if not any(item["input_ids"].shape[1] > 1 for item in self.items):
            raise DataError("the held-out sequences hold no token that could be predicted: give longer ones, or more")
        self.longest = max(item["input_ids"].shape[1] for item in self.items)
        predicted = (item["input_ids"][0, 1:] for item in self.items)
        self.bytes = sum(len(decoded(tokenizer, ids).encode()) for ids in predicted)
        # Hidden states are small; the teacher's logits come again from them, a chunk at a time.
        self.targets = [_hidden(teacher, item) for item in self.items] if teacher is not None else None
        self.teacher = teacher
        self.head = output_head(teacher) if teacher is not None else None

    @part("measuring")
    @torch.no_grad()
    def measure(self, model: PreTrainedModel, late: int | None = None) -> Quality:
        """The model's quality on these sequences. late: how many first tokens of each document `late_kl` leaves out."""
        training, head = model.training, output_head(model)
        model.eval()
        nll = kl = late_kl = same = 0.0
        predicted = tokens = late_tokens = 0
        for i, item in enumerate(self.items):
            hidden = self.targets[i] if self.targets is not None and model is self.teacher else _hidden(model, item)
            labels = item["input_ids"][0, 1:]
            for first in range(0, hidden.shape[0], CHUNK):
                part = slice(first, first + CHUNK)
                logprobs = head.logits(hidden[part]).log_softmax(-1)
                target = labels[part].to(logprobs.device)  # the last token predicts nothing that is here
                nll += F.nll_loss(logprobs[: len(target)], target, reduction="sum").item()
                predicted += len(target)
                if self.targets is not None and self.head is not None:
                    reference = self.head.logits(self.targets[i][part]).log_softmax(-1)
                    p, q = _of_the_same(reference, logprobs.to(reference.device))
                    by_token = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
                    kl += by_token.sum().item()
                    same += (p.argmax(-1) == q.argmax(-1)).sum().item()
                    tokens += len(p)
                    if late is not None and first + len(p) > late:
                        by_token = by_token[max(0, late - first) :]
                        late_kl += by_token.sum().item()
                        late_tokens += len(by_token)
        model.train(training)
        return Quality(
            tokens=predicted,
            perplexity=float(torch.tensor(nll / predicted).exp()),
            bits_per_byte=nll / self.bytes / 0.6931471805599453,
            kl=kl / tokens if tokens else None,
            same_top=same / tokens if tokens else None,
            late=late,
            late_kl=late_kl / late_tokens if late_tokens else None,
        )


def _of_the_same(reference: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (L, tokens) over those tokens that both have: vocabularies may be padded differently."""
    if reference.shape[-1] == logprobs.shape[-1]:
        return reference, logprobs
    width = min(logprobs.shape[-1], reference.shape[-1])
    return reference[:, :width].log_softmax(-1), logprobs[:, :width].log_softmax(-1)


@torch.no_grad()
def _hidden(model: PreTrainedModel, item: dict[str, Tensor]) -> Tensor:
    """The decoder's last hidden states (L, hidden) of one sequence."""
    item = {key: value.to(model.device) for key, value in item.items()}
    return model.get_decoder()(**item, use_cache=False).last_hidden_state[0]


def _documents(sequence: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The documents packed into a sequence, each a batch of one."""
    starts = (sequence["position_ids"] == 0).nonzero().flatten().tolist() + [len(sequence["position_ids"])]
    spans = zip(starts, starts[1:], strict=False)
    return [{key: value[None, a:b] for key, value in sequence.items()} for a, b in spans]
