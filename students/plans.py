"""Layer plans of published hybrids, by name: which layers keep attention, and what becomes of it there.

A student's layers are its teacher's, and so a plan is laid on these: where the published model has attention a layer
keeps attention, and the others get the student's mixer in its place. Each layer keeps its own MLP or
experts. The figures are those of the papers; in a teacher of few layers the pattern is as much shorter.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Plan:
    """Attributes:
    kept: takes how many layers there are; which keep attention.
    attention: options of the softmax attention that these become, by name; none: it stays the teacher's own.
    least: how many layers there must be.
    """

    kept: Callable[[int], range]
    attention: dict[str, Any] = field(default_factory=dict)
    least: int = 2


def _jamba(layers: int) -> range:
    """The fifth layer of every eight."""
    period = min(8, layers)
    return range(period // 2, layers, period)


def _zamba(layers: int) -> range:
    """The last layer of every six, or of so many that there are two of them."""
    period = min(6, layers // 2)
    return range(period - 1, layers, period)


def _every_second(layers: int) -> range:
    return range(1, layers, 2)


PLANS: dict[str, Plan] = {
    # Lieber et al. 2024, arXiv 2403.19887: one attention layer in a block of eight, and experts. Its attention has no
    # positions; the teacher's has learned with them and keeps them, unless student.attention_positions says otherwise.
    "jamba": Plan(_jamba),
    # Ren et al. 2024, arXiv 2406.07522: Mamba and sliding-window attention by turns, an MLP after each.
    "samba": Plan(_every_second, {"attention_window": 2048}),
    # Park et al. 2024, arXiv 2402.04248: a Mamba block where positions would be added, then blocks of attention and
    # Mamba by turns, without positions. They stand where a Transformer has attention and MLP; here MLPs stay, and it
    # is layers that go by turns. Where their number is even the last is attention, and in the paper's model Mamba.
    "mambaformer": Plan(_every_second, {"attention_positions": False}),
    # Glorioso et al. 2024, arXiv 2405.16712 and 2411.15242: after every six Mamba layers one block of attention, the
    # same at all these places, with a LoRA of each place's own. Here it is attention that is shared, in the place of
    # every sixth layer; MLPs, which Zamba shares with it, stay the layers' own, and it reads no embeddings besides.
    "zamba": Plan(_zamba, {"attention_shared_rank": 128}, least=4),
}
