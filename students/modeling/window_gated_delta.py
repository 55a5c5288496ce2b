"""Sliding-window attention beside a gated DeltaNet state. This file travels with exported checkpoints."""

import torch
from torch import Tensor, nn

from .gated_delta import STRENGTH, GatedDelta, unit
from .modeling_mixer import Geometry, Transfer
from .state_space import WidenedLinear
from .window import WindowMixer


class WindowGatedDeltaMixer(GatedDelta, WindowMixer):
    """Window and sinks beside the gated delta rule (arXiv 2412.06464), under which a token takes out what the state
    holds under its key before it writes:

        g_t = -exp(A_log) softplus(dt_proj(h_t) + dt_bias)        beta_t = sigmoid(b_proj(h_t) + b_bias)
        S_t = exp(g_t) S_{t-1} (I - beta_t B_t B_t^T) + beta_t v_t B_t^T
        r_t = S_t C_t

    Keys and queries of the state are brought to length 1.

    Args:
        options: as `WindowMixer`; what the state gives is always normed, and there is no map of keys unless it is said.
    """

    b_bias: nn.Parameter

    def __init__(self, attention: nn.Module, geometry: Geometry, *, feature_map: str | None = None, **options):
        super().__init__(attention, geometry, feature_map=feature_map, skip=False, **options)
        self.b_proj = WidenedLinear(geometry.hidden_size, self.num_heads, bias=False)
        self.b_bias = nn.Parameter(torch.full((self.num_heads,), STRENGTH).logit())

    def steps(self, hidden: Tensor) -> Tensor:
        return torch.cat((self.dt_proj(hidden), self.b_proj(hidden)), -1)

    def features(self, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        B, C = super().features(B, C)
        return unit(B), unit(C)

    def transfers(self, view) -> list[Transfer]:
        own = {"b_proj.weight": 0.0, "b_bias": torch.tensor(STRENGTH).logit().item()}
        return super().transfers(view) + [
            Transfer(f"{view.name}.{name}", "constant", value=value) for name, value in own.items()
        ]

    @torch.no_grad()
    def set_strength(self, strength: Tensor) -> None:
        self.b_bias.copy_(strength.logit())
