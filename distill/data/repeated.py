"""Training sequences in which passages come again: text that has to be remembered to be predicted.

Plain text seldom asks for what stood hundreds of tokens before, so a student's state learns little of it. Where a
passage is repeated, a teacher that finds it again is almost certain of its tokens, and a student that does not is far
from it. No other text is needed.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from ..train.protocols import TrainingData

PASSAGE = (8, 64)  # tokens, at least and at most
PASSAGES = 8  # at most, in a sequence


class Repeated:
    """Training data as it is, but in some sequences passages of the longest document stand again in its second half.

    Which sequences, and what in them, follows from seed, step and slot: resuming needs no state for it.

    Args:
        data: what the sequences come from.
        share: of the sequences in which passages come again, 0 to 1.
    """

    def __init__(self, data: "TrainingData", share: float):
        self.data, self.share = data, share
        self.tokens_per_item = data.tokens_per_item

    def __getattr__(self, name: str):  # `state_dict` and `load_state_dict`, where there are any
        if name == "data":  # of an object without attributes yet, as `copy` makes one
            raise AttributeError(name)
        return getattr(self.data, name)

    def batch(self, step: int, batch_size: int, seed: int, slots: range) -> list[dict[str, torch.Tensor]]:
        items = self.data.batch(step, batch_size, seed, slots)
        return [self._some(item, seed, step, slot) for item, slot in zip(items, slots, strict=True)]

    def _some(self, item: dict[str, torch.Tensor], seed: int, step: int, slot: int) -> dict[str, torch.Tensor]:
        mixed = hashlib.sha256(f"repeated {seed} {step} {slot}".encode()).digest()
        random = np.random.default_rng(int.from_bytes(mixed[:8], "little"))
        if random.random() >= self.share:
            return item
        return item | {"input_ids": with_passages_again(item["input_ids"], item["position_ids"], random)}


def with_passages_again(ids: torch.Tensor, positions: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """The tokens (L,) with passages of the first half of the longest document in its second half, in another order.

    Between 1 and 8 passages of one length, 8 to 64 tokens, do not overlap, and stand one after the other. A document
    with less than 32 tokens stays as it is.
    """
    starts = np.append(np.flatnonzero(positions.numpy() == 0), len(ids))
    lengths = np.diff(starts)
    first, length = starts[lengths.argmax()], lengths.max()
    half = length // 2
    if half < 2 * PASSAGE[0]:
        return ids
    size = int(random.integers(PASSAGE[0], min(PASSAGE[1], half // 2) + 1))
    count = int(random.integers(1, min(PASSAGES, half // size) + 1))
    # Places that do not overlap: of `half` tokens, those that no passage needs are cut at random between them.
    gaps = np.sort(random.integers(0, half - count * size + 1, count))
    begins = first + gaps + size * np.arange(count)
    random.shuffle(begins)
    passages = torch.cat([ids[begin : begin + size] for begin in begins])
    place = first + half + int(random.integers(0, length - half - len(passages) + 1))
    ids = ids.clone()
    ids[place : place + len(passages)] = passages
    return ids
