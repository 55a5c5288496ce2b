"""Sliding-window attention beside a gated DeltaNet state. This file travels with exported checkpoints."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from .gated_delta import STRENGTH, STRENGTHS, decay_and_strength, recur, unit
from .modeling_mixer import Geometry, Transfer
from .state_space import WidenedLinear
from .window import WindowMixer


class WindowGatedDeltaMixer(WindowMixer):
    """Window and sinks beside the gated delta rule (arXiv 2412.06464), under which a token takes out what the state
    holds under its key before it writes:

        g_t = -exp(A_log) softplus(dt_proj(h_t) + dt_bias)        beta_t = sigmoid(b_proj(h_t) + b_bias)
        S_t = exp(g_t) S_{t-1} (I - beta_t B_t B_t^T) + beta_t v_t B_t^T
        r_t = S_t C_t

    Keys and queries of the state are brought to length 1.

    Args:
        options: as `WindowMixer`; what the state gives is always normed, and there is no map of keys unless it is said.
    """

    exact: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias")
    strengths: ClassVar[tuple[float, ...]] = STRENGTHS
    products: ClassVar[int] = 3

    def __init__(self, attention: nn.Module, geometry: Geometry, *, feature_map: str | None = None, **options):
        super().__init__(attention, geometry, feature_map=feature_map, skip=False, **options)
        self.b_proj = WidenedLinear(geometry.hidden_size, self.num_heads, bias=False)
        self.b_bias = nn.Parameter(torch.full((self.num_heads,), STRENGTH).logit())

    def steps(self, hidden: Tensor) -> Tensor:
        return torch.cat((self.dt_proj(hidden), self.b_proj(hidden) + self.b_bias), -1)

    def features(self, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        B, C = super().features(B, C)
        return unit(B).to(B.dtype), unit(C).to(C.dtype)

    def _recur(self, x, dt, B, C, state, stepping: bool, remember: bool, seq_idx=None) -> tuple[Tensor, Tensor | None]:
        a, b = dt.chunk(2, -1)
        g, beta = decay_and_strength(a, b, self.A_log, self.dt_bias)
        return recur(C, B, x, g, beta, state, stepping, remember, seq_idx)

    def log_decay(self, dt: Tensor) -> Tensor | None:
        return None

    def transfers(self, view) -> list[Transfer]:
        own = {"b_proj.weight": 0.0, "b_bias": torch.tensor(STRENGTH).logit().item()}
        return super().transfers(view) + [
            Transfer(f"{view.name}.{name}", "constant", value=value) for name, value in own.items()
        ]

    @torch.no_grad()
    def set_strength(self, strength: Tensor) -> None:
        self.b_bias.copy_(strength.logit())
