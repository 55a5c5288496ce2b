"""What a home is: a class of plain transformers that holds students of one kind of mixer exactly."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...students import HybridForCausalLM, StudentConfig


@dataclass(frozen=True)
class Home:
    """A class that students go out in, without code of their own.

    Attributes:
        model: the class.
        why_no_student, why_not: as in `Format`.
        config: takes a student; the config of the class that holds it.
        state: takes a student; its weights by the names that they have in the class.
        otherwise: takes what transformers writes as config.json; what of it is written otherwise, for other engines.
        note: what the card says of it, in Markdown.
    """

    model: type[PreTrainedModel]
    why_no_student: Callable[[StudentConfig], str | None]
    why_not: Callable[[HybridForCausalLM], str | None]
    config: Callable[[HybridForCausalLM], PreTrainedConfig]
    state: Callable[[HybridForCausalLM], dict[str, Tensor]]
    otherwise: Callable[[dict], dict]
    note: str


def mlp_of(layer: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """The projections of a layer's MLP: of gate, up and down."""
    mlp: Any = layer.mlp
    return mlp.gate_proj, mlp.up_proj, mlp.down_proj
