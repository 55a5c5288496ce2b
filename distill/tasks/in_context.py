"""Functions that are learned in context, from inputs x and values y by turns (Park et al. 2024, arXiv 2402.04248; Garg
et al. 2022, arXiv 2208.01066): sparse parity, linear regression, and regression with many outliers.

Whether the model reads x or y, it is a vector of as many numbers, y with zeros after it; at each x its y is asked for.
All of these are trained on; the figure is that of the last quarter, where there has been something to learn from.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..settings import setting
from .task import Task

if TYPE_CHECKING:
    from ...students import HybridForCausalLM
    from .objectives import Answering


@dataclass(frozen=True)
class InContext(Task):
    """What these tasks share: pairs of x and y."""

    points: int = setting(32, "pairs of x and y that are asked for", minimum=4)
    dimensions: int = setting(6, "numbers of x", minimum=1)

    @property
    def tokens(self) -> int:
        return 2 * self.points

    def scored(self, figures: Tensor) -> float:
        return figures[:, -math.ceil(self.points / 4) :].mean().item()

    def asking_values(self, x: np.ndarray, y: np.ndarray, asked: np.ndarray) -> dict[str, Tensor]:
        """An item of points x (n, D) and y (n,), some of which are asked for."""
        inputs = np.zeros((2 * len(x), x.shape[1]), dtype=np.float32)
        inputs[::2], inputs[1::2, 0] = x, y
        return {
            "inputs": torch.from_numpy(inputs),
            "position_ids": torch.arange(len(inputs)),
            "asked": torch.from_numpy(2 * asked),
            "answers": torch.from_numpy(y[asked].astype(np.float32)),
        }


@dataclass(frozen=True)
class SparseParity(InContext):
    """y is the product of some numbers of x, each -1 or 1: which of them, each sequence has for itself. The figure is
    how often the sign is right, and the loss the cross-entropy of the two signs."""

    factors: int = setting(2, "numbers that the product is of", minimum=1)

    def why_not(self) -> str | None:
        if self.factors <= self.dimensions:
            return None
        return f"factors is {self.factors}; expected at most dimensions, {self.dimensions}"

    def item(self, chance: np.random.Generator) -> dict[str, Tensor]:
        x = 2.0 * chance.integers(2, size=(self.points, self.dimensions)) - 1
        hidden = chance.choice(self.dimensions, size=self.factors, replace=False)
        return self.asking_values(x, x[:, hidden].prod(1), np.arange(self.points))

    def objective(self, student: "HybridForCausalLM") -> "Answering":
        from .objectives import SignAnswers

        return SignAnswers(student, self.dimensions)


@dataclass(frozen=True)
class LinearRegression(InContext):
    """y is the product of x with a vector of the sequence's own, both normal. The figure is the squared error divided
    by the number of dimensions, which is 1 for who always says 0."""

    figure: ClassVar[str] = "error"

    def item(self, chance: np.random.Generator) -> dict[str, Tensor]:
        x, weight = chance.normal(size=(self.points, self.dimensions)), chance.normal(size=self.dimensions)
        return self.asking_values(x, x @ weight, np.arange(self.points))

    def objective(self, student: "HybridForCausalLM") -> "Answering":
        from .objectives import ValueAnswers

        return ValueAnswers(student, self.dimensions)


@dataclass(frozen=True)
class OutlierRegression(LinearRegression):
    """The same with pairs of nothing but ones among the others ("many-outlier regression"), which are neither asked for
    nor say anything. In the paper each pair is one with a probability of 0.9; here a fixed number is, anywhere."""

    outliers: int = setting(32, "pairs of ones", minimum=0)

    @property
    def tokens(self) -> int:
        return 2 * (self.points + self.outliers)

    def item(self, chance: np.random.Generator) -> dict[str, Tensor]:
        count = self.points + self.outliers
        asked = np.sort(chance.choice(count, size=self.points, replace=False))
        x, y, weight = np.ones((count, self.dimensions)), np.ones(count), chance.normal(size=self.dimensions)
        x[asked] = chance.normal(size=(self.points, self.dimensions))
        y[asked] = x[asked] @ weight
        return self.asking_values(x, y, asked)
