"""What the trainer takes, whoever makes it: an objective, and data to train on."""

from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class Objective(Protocol):
    """What a stage minimises: a module, and what it says of itself. `objectives` has those there are.

    Attributes:
        beside: what is no part of the module: it is not wrapped, moved, optimised or saved with it. The teacher, say.
    """

    beside: tuple[Any, ...]

    def __call__(self, batch: "dict[str, Tensor]") -> "tuple[Tensor, dict[str, Tensor]]":
        """The loss, a mean over the batch, and named metrics."""

    def models(self) -> "list[PreTrainedModel]":
        """Those that take part."""

    def compilable(self) -> list[tuple[object, str]]:
        """What can be compiled: objects, and the names of their functions."""

    def kind(self) -> Hashable:
        """What besides a batch's shapes the work of a pass depends on."""

    def modules(self) -> "Iterator[nn.Module]": ...

    def parameters(self) -> "Iterator[nn.Parameter]": ...

    def named_parameters(self) -> "Iterator[tuple[str, nn.Parameter]]": ...


class TrainingData(Protocol):
    """Sequences of equal length for batches. Where there are `state_dict(slots)` and `load_state_dict(state)`, they
    are its position, which checkpoints keep."""

    tokens_per_item: int

    def batch(self, step: int, batch_size: int, seed: int, slots: range, /) -> "list[dict[str, Tensor]]":
        """The items of batch `step` (from 0) at some of its slots."""

    def spread(self, count: int, /) -> "list[dict[str, Tensor]]":
        """Some items from all over the text, whatever `batch` does."""
