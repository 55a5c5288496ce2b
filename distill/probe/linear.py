"""Linear probes: what can be read off hidden states and states by a linear map, found in closed form."""

import torch
from torch import Tensor

SKETCH = 2048  # numbers that a larger state is reduced to


class Ridge:
    """A ridge regression that takes its examples in batches and holds sums of products alone.

    Features are scaled to a mean square of 1 for the penalty, so that it means the same for large and small ones; a
    constant is added to them.

    Args:
        penalty: added to the diagonal of the features' correlations.
    """

    def __init__(self, penalty: float = 1e-4):
        self.penalty, self.count = penalty, 0
        self.products: Tensor | None = None  # (F+1, F+1), of features with each other
        self.crossed: Tensor | None = None  # (F+1, K), with targets
        self.weight: Tensor | None = None

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Takes examples (n, F) and their targets (n, K)."""
        x, y = _with_one(features), targets.float()
        # Each batch in float32, which is much the faster; their sum in float64.
        products, crossed = (x.T @ x).double(), (x.T @ y).double()
        if self.products is None or self.crossed is None:
            self.products, self.crossed = products, crossed
        else:
            self.products += products
            self.crossed += crossed
        self.count += len(x)
        self.weight = None

    def __call__(self, features: Tensor) -> Tensor:
        """What is expected for examples (n, F): (n, K), float32. Raises ValueError where it has seen none."""
        if self.products is None or self.crossed is None:
            raise ValueError("a probe has to see examples first: call add")
        if self.weight is None:
            scale = (self.products.diagonal() / self.count).sqrt().clamp(min=1e-12)
            correlations = self.products / self.count / (scale * scale[:, None])
            correlations.diagonal().add_(self.penalty)
            factor = torch.linalg.cholesky(correlations)
            solved = torch.cholesky_solve(self.crossed / self.count / scale[:, None], factor)
            self.weight = (solved / scale[:, None]).float()
        return _with_one(features) @ self.weight


class Fit:
    """How well targets are met: R^2, one less the squared error over that of their mean, over all targets together."""

    def __init__(self):
        self.count, self.error, self.squares = 0, 0.0, 0.0
        self.total = torch.zeros(())

    def add(self, found: Tensor, targets: Tensor) -> None:
        found, targets = found.double(), targets.double()
        self.count += len(targets)
        self.error += (found - targets).square().sum().item()
        self.squares += targets.square().sum().item()
        self.total = self.total + targets.sum(0)

    @property
    def r2(self) -> float:
        mean = self.total / self.count
        return 1 - self.error / (self.squares - self.count * mean.square().sum().item())


def sketched(state: Tensor, size: int = SKETCH) -> Tensor:
    """States (B, ...) as (B, at most `size`): larger ones by a count sketch (Charikar et al. 2002), a linear map that
    adds each number, with a random sign, to a random one of those that are left. The same for all states of a size."""
    flat = state.flatten(1)
    if flat.shape[1] <= size:
        return flat
    generator = torch.Generator().manual_seed(flat.shape[1])
    place = torch.randint(size, flat.shape[1:], generator=generator).to(flat.device)
    sign = (2 * torch.randint(2, flat.shape[1:], generator=generator) - 1).to(flat)
    return flat.new_zeros(len(flat), size).index_add_(1, place, flat * sign)


def _with_one(features: Tensor) -> Tensor:
    features = features.float()
    return torch.cat((features, features.new_ones(len(features), 1)), 1)
