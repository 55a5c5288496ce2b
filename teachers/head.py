"""One view of how a model's predictions come from its decoder's last hidden states, whatever its family.

Losses, caches and measurements start from hidden states and never hold a batch's logits. What lies between the two is
an output matrix and, in some families, a bias, a factor or a soft cap: read off the model, and then *checked* against
the logits that the model itself computes. So a family that does something else is refused, not trained wrongly.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import TeacherError

# Fields of a config by which logits are divided, and by which they are multiplied.
_DIVIDES = ("logits_scaling",)  # Granite
_MULTIPLIES = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
_CAPS = ("final_logit_softcapping", "logits_soft_cap")  # Gemma 2 and others; RecurrentGemma


@dataclass(frozen=True)
class OutputHead:
    """logits = c tanh(z / c), or z without a cap, where z = scale (W h + b) of last hidden states h."""

    module: nn.Module  # with the weight W (V, D), and a bias b (V) or None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def weight(self) -> Tensor:
        return self.module.weight  # type: ignore[return-value]  # torch's stubs: a tensor or a module

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    @property
    def extras(self) -> dict[str, float | bool]:
        """What there is besides the matrix, by name: empty for most families."""
        found = {"scale": self.scale} if self.scale != 1 else {}
        found |= {"softcap": self.softcap} if self.softcap is not None else {}
        return found | ({"bias": True} if self.bias is not None else {})

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) logits in float32 (float64 if they are), of hidden states (..., D)."""
        z = self.module(hidden)
        z = self.scale * (z if z.dtype == torch.float64 else z.float())
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def operands(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors (..., D') and (V, D') whose product is z: what the kernels of `kernels.kl` take.

        They are the hidden states and W, unless there is a scale or a bias; a bias is one column more, and a few of
        zeros up to a multiple of 8, as the kernels want them.
        """
        weight, bias = self.weight, self.bias
        if bias is not None:
            zeros = -(hidden.shape[-1] + 1) % 8
            hidden = torch.cat([hidden, hidden.new_ones(*hidden.shape[:-1], 1)], -1)
            hidden = nn.functional.pad(hidden, (0, zeros))
            weight = nn.functional.pad(torch.cat([weight, bias[:, None]], 1), (0, zeros))
        return (hidden if self.scale == 1 else hidden * self.scale), weight


def output_head(model: PreTrainedModel, check: bool = True) -> OutputHead:
    """The model's output head, checked on a few tokens unless told not to, or the model is on the meta device.

    Raises:
        TeacherError: the model has none, or its logits are something else.
    """
    module, config = model.get_output_embeddings(), model.config.get_text_config(decoder=True)
    if module is None:
        raise TeacherError(f"{type(model).__name__} is not understood: it has no output matrix")
    scale = 1.0
    for name in _DIVIDES:
        scale /= getattr(config, name, None) or 1.0
    for name in _MULTIPLIES:
        scale *= getattr(config, name, None) or 1.0
    cap = next((value for name in _CAPS if (value := getattr(config, name, None)) is not None), None)
    head = OutputHead(module, float(scale), None if cap is None else float(cap))
    if check and module.weight.device.type != "meta":
        _check(model, head)
    return head


@torch.no_grad()
def _check(model: PreTrainedModel, head: OutputHead, length: int = 8) -> None:
    """Refuses a head that does not give the model's own logits."""
    ids = torch.arange(length, device=model.device)[None] % len(cast("Tensor", model.get_input_embeddings().weight))
    training = model.training
    model.eval()
    try:
        expected = model(input_ids=ids, use_cache=False).logits
        found = head.logits(model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state)
    finally:
        model.train(training)
    if not expected.isfinite().all():  # of a model that is broken otherwise, nothing can be said
        return
    error = (found - expected).float().norm() / expected.float().norm()
    if not error < (1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2):
        raise TeacherError(
            f"{type(model).__name__} is not understood: its logits are not its output matrix times its last hidden "
            f"states, with scale, soft cap and bias as its config has them (relative difference {error:.1e})"
        )
