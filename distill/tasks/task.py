"""What a task is: items that follow from a seed, a step and a slot alone, and questions in them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from ...students import HybridForCausalLM
    from .objectives import Answering

TRAINING, VALIDATION, TEST = range(3)  # streams of items that have no draw in common
SPECIAL = 3  # tokens that models from scratch have for other uses: one of them, padding, is never learned


@dataclass(frozen=True)
class Task:
    """A task; its fields are what a config may set. An item is a dict of tensors:

        input_ids    (L,) int64, or inputs (L, D) float32 of a task whose inputs are no tokens
        position_ids (L,) int64
        asked        (A,) int64: where the model is to say something, in order
        answers      (A,) what, after having read up to and including the token there: int64, or float32

    Attributes:
        figure: what is measured, an "accuracy" or an "error".
        recalls: whether it asks for what stands in the sequence, so that the size of a state governs it.
    """

    figure: ClassVar[str] = "accuracy"
    recalls: ClassVar[bool] = False

    @property
    def tokens(self) -> int:
        """L, of each item."""
        raise NotImplementedError

    @property
    def symbols(self) -> int:
        """How many tokens there are in its items."""
        return 0

    @property
    def vocabulary(self) -> int:
        """How many tokens a model for it has."""
        return SPECIAL + self.symbols

    def why_not(self) -> str | None:
        """Why there are no items with these settings; None where there are."""
        return None

    def item(self, chance: np.random.Generator) -> dict[str, Tensor]:
        raise NotImplementedError

    def objective(self, student: "HybridForCausalLM") -> "Answering":
        """What is minimised, with all that is trained in it."""
        from .objectives import TokenAnswers

        return TokenAnswers(student)

    def scored(self, figures: Tensor) -> float:
        """The figure of some items, from those of their answers (n, A)."""
        return figures.mean().item()

    def parts(self) -> "Mapping[str, Task]":
        """Tasks that are measured besides, after training on this one, by name."""
        return {}

    def asking(self, tokens: np.ndarray, asked: np.ndarray, answers: np.ndarray) -> dict[str, Tensor]:
        """An item of tokens, which are numbered from 0 here."""
        return {
            "input_ids": torch.from_numpy(tokens + SPECIAL),
            "position_ids": torch.arange(len(tokens)),
            "asked": torch.from_numpy(asked),
            "answers": torch.from_numpy(answers + SPECIAL),
        }


@dataclass
class Generated:
    """The items of a task, without end, as training takes them: no position has to be kept."""

    task: Task
    stream: int = TRAINING

    def __post_init__(self) -> None:
        self.tokens_per_item = self.task.tokens

    def batch(self, step: int, batch_size: int, seed: int, slots: range) -> list[dict[str, Tensor]]:
        """The items of batch `step` (from 0) at some of its slots: the same whoever asks, in whichever order."""
        draws = (np.random.default_rng([seed, self.stream, step, slot]) for slot in slots)
        return [self.task.item(chance) for chance in draws]

    def spread(self, count: int) -> list[dict[str, Tensor]]:
        """Some items."""
        return self.batch(0, count, 0, range(count))
