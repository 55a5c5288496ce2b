"""A corpus cut into sequences of equal length, and which of them make up step k, so that resuming
needs no state."""

import hashlib
from functools import lru_cache

import numpy as np
import torch

from .corpus import Corpus
from .sources import DataError


class PackedDataset(torch.utils.data.Dataset):
    """A corpus cut into consecutive windows of `length` tokens that do not overlap; the last partial one is dropped.

    Item i is {"input_ids": (length,) int64, "position_ids": (length,) int64}, and where the corpus knows of answers
    "before_answer": (length,) bool, whether the next token is that of one that begins in the window, in the same
    document. Positions restart at 0 with each document and each window: that is how models and mixers know the
    documents in a window apart. A window that begins inside of a document begins as a document does, and leaves out as
    many tokens at its end: models that were trained with a beginning token lean on it, wherever a text is cut.
    """

    def __init__(self, corpus: Corpus, length: int):
        if length < 1:
            raise DataError(f"data.length is {length}: give a positive number of tokens")
        if len(corpus.tokens) < length:
            raise DataError(
                f"the text has {len(corpus.tokens):,} tokens, less than one sequence of {length:,}: "
                "set a shorter length or give more text"
            )
        self.corpus = corpus
        self.tokens_per_item = length

    def __len__(self) -> int:
        return len(self.corpus.tokens) // self.tokens_per_item

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        first = index * self.tokens_per_item
        tokens = self.corpus.tokens[first : first + self.tokens_per_item]
        # In NumPy: torch's searchsorted starts threads, which takes 100 times as long on a busy CPU.
        starts = self.corpus.starts.numpy()
        offsets = np.arange(first, first + self.tokens_per_item)
        document = np.searchsorted(starts, offsets, side="right") - 1
        positions = offsets - np.maximum(starts[document], first)
        answers = None
        if self.corpus.answers is not None:
            spans = self.corpus.answers.numpy()
            # One that began before has its question elsewhere.
            answers = _inside(spans[np.searchsorted(spans[:, 0], first) :], offsets)
        begin, tokens = self.corpus.begin, tokens.long()
        if begin and first != starts[document[0]] and len(begin) < self.tokens_per_item:
            tokens = torch.cat((torch.tensor(begin), tokens[: -len(begin)]))
            same = document == document[0]
            kept = positions[: -len(begin)] + len(begin) * same[: -len(begin)]
            positions = np.concatenate((np.arange(len(begin)), kept))
            if answers is not None:
                answers = np.concatenate((np.zeros(len(begin), bool), answers[: -len(begin)]))
        item = {"input_ids": tokens, "position_ids": torch.from_numpy(positions)}
        if answers is not None:
            item["before_answer"] = torch.from_numpy(np.append(answers[1:] & (positions[1:] != 0), False))
        return item

    def batch(self, step: int, batch_size: int, seed: int, slots: range) -> list[dict[str, torch.Tensor]]:
        """The items of batch `step` (from 0) at some of its `batch_size` slots: those of one process, say.

        With answers each has "per_answer" besides: the sequences of the whole batch by its tokens `before_answer`.
        """
        indices = batch_indices(len(self), batch_size, seed, step)
        if self.corpus.answers is None:
            return [self[indices[slot]] for slot in slots]
        items = [self[index] for index in indices]
        count = sum(int(item["before_answer"].sum()) for item in items)
        return [items[slot] | {"per_answer": torch.tensor(batch_size / max(count, 1))} for slot in slots]

    def spread(self, count: int) -> list[dict[str, torch.Tensor]]:
        """`count` items evenly over the whole, or all if there are fewer."""
        count = min(count, len(self))
        return [self[i * len(self) // count] for i in range(count)]


def batch_indices(n_items: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The items of batch `step` (from 0, counted through all epochs).

    Batches are cut from one endless stream: a seeded permutation of all items for each epoch, end to end. So every item
    comes once per epoch, nothing is dropped, a batch may span epochs, and the answer depends on the arguments alone.
    """
    if n_items < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"n_items={n_items} and batch_size={batch_size} must be positive, step={step} at least 0")
    stream = range(step * batch_size, (step + 1) * batch_size)
    return [int(_permutation(n_items, seed, i // n_items)[i % n_items]) for i in stream]


def _inside(spans: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Whether each offset is in one of the spans [first, end), which are in order and do not overlap."""
    begun, ended = (np.searchsorted(edges, offsets, side="right") for edges in spans.T)
    return begun > ended


def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack the tensors of items: (length,) each -> (B, length)."""
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


@lru_cache(maxsize=4)
def _permutation(n_items: int, seed: int, epoch: int) -> np.ndarray:
    mixed = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed[:7], "little"))
    return torch.randperm(n_items, generator=generator).numpy()
