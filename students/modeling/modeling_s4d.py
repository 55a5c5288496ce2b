"""The S4D mixer (Gu, Gupta, Goel and Re 2022, arXiv 2206.11893): a state that does not depend on its input.

Each channel of the values passes a diagonal state space of its own, by the same kernel at every token: nothing selects
what is kept or read. So of attention values and output projection carry over, and queries and keys are dropped. Against
Mamba-2 it shows what selection is worth. This file travels with exported checkpoints: it imports torch only.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from .cache_layers import StateLayer
from .fused_projection import FusedProjection
from .modeling_mixer import Geometry, Heads, Transfer
from .state_space import GATE_OPEN, HALF_LIFE, STEPS, WidenedLinear

try:
    from transpoint.kernels.s4d import s4d_scan, s4d_step
except ImportError:  # the same file, which travels beside this one
    from .s4d import s4d_scan, s4d_step  # type: ignore[no-redef]


class ModesLayer(StateLayer):
    """What an S4D layer remembers: the modes of a state (B, channels, 2 or 1, modes) are complex numbers, or real."""

    @property
    def log_left(self) -> Tensor | None:  # in complex numbers the rest is a turn
        return None if self.log_decay is None else self.log_decay[:, :, 0]

    def carried(self, log_decay: Tensor) -> Tensor | int:
        if self.ssm_state is None or log_decay.shape[2] == 1:
            return super().carried(log_decay)
        (real, imaginary), (rate, angle) = self.ssm_state.unbind(2), log_decay.unbind(2)
        cos, sin = rate.exp() * angle.cos(), rate.exp() * angle.sin()
        return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), 2)


class S4DMixer(FusedProjection):
    """An S4D mixer with the call signature of self-attention. H heads, K of x, head_dim P, so H*P channels.

    Rows of `in_proj`: z (H*P, if gated), x (K*P). x passes a causal depthwise convolution and an optional SiLU, as in
    `Mamba2Mixer`, and is then there once for each query head that reads it in the teacher. In each channel

        h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A x_t        y_t = Re(C . h_t) + D x_t
        out = out_proj(norm(y_t * SiLU(z_t)))

    with a step dt, rates A, weights C and a skip D of its own. It starts by reading the first mode alone, which does
    not oscillate: a mean of the values that falls off by the half-life.

    Args:
        attention: the self-attention it replaces, of the student's own tree.
        geometry: of that attention.
        conv_kernel: taps of the convolution (1: a scale and a bias).
        conv_activation: "silu" or None, after the convolution.
        gate: whether the output is gated by SiLU(z).
        norm: whether the gated output is RMS-normalised, one head at a time.
        state_size: N, of a channel in real numbers.
        modes: how the rates start: "lin", N/2 complex ones -1/2 + i pi n (S4D-Lin), each of which stands for its
            conjugate too; or "real", N real ones -(n + 1) (S4D-Real), n from 0.
    """

    remembers = ModesLayer
    exact: ClassVar[tuple[str, ...]] = ("dt_log", "A_log", "A_imag", "C_real", "C_imag", "D")

    def __init__(
        self,
        attention: nn.Module,
        geometry: Geometry,
        *,
        conv_kernel: int = 4,
        conv_activation: str | None = "silu",
        gate: bool = True,
        norm: bool = True,
        state_size: int = 64,
        modes: str = "lin",
        norm_eps: float = 1e-5,
    ):
        super().__init__(attention, geometry, conv_activation, gate, False, norm_eps)
        P, H, K = self.head_dim, self.num_heads, self.num_kv_heads
        self.parts = 2 if modes == "lin" else 1  # numbers to a mode
        self.modes = state_size // self.parts
        self.sizes = {"z": H * P if gate else 0, "x": K * P}
        self.in_proj = WidenedLinear(geometry.hidden_size, sum(self.sizes.values()), bias=False)
        self.z_bias = nn.Parameter(torch.full((H * P,), GATE_OPEN)) if gate else None
        self.conv1d = nn.Conv1d(K * P, K * P, conv_kernel, groups=K * P)
        self.dt_log = nn.Parameter(torch.zeros(H * P))
        self.A_log = nn.Parameter(torch.zeros(H * P, self.modes))  # of minus the real part
        self.C_real = nn.Parameter(torch.zeros(H * P, self.modes))
        pairs = self.parts == 2
        self.A_imag, self.C_imag = (nn.Parameter(torch.zeros(H * P, self.modes)) if pairs else None for _ in range(2))
        self.D = nn.Parameter(torch.zeros(H * P))
        self.q_norm = self.k_norm = None
        self.norm = nn.Module() if norm else None
        if self.norm is not None:
            self.norm.weight = nn.Parameter(torch.ones(H * P))
        self.out_proj = nn.Linear(H * P, geometry.hidden_size, bias="o_proj" in geometry.biases)

    def _project(self, hidden: Tensor, position_embeddings, memory=None, stepping=False, padding=None, seq_idx=None):
        # Padding, before all tokens of a row, leaves a state of zero as it is: it is zero after the convolution.
        z, x = self.in_proj(hidden).split(list(self.sizes.values()), dim=-1)
        x, conv_state = self._convolve(x, memory, stepping, padding, seq_idx)
        repeats = self.num_heads // self.num_kv_heads
        x = x.unflatten(-1, (-1, self.head_dim)).repeat_interleave(repeats, 2).flatten(2)
        return z, x, None, None, self.dt_log.exp().expand_as(x), conv_state

    def _recur(self, x, dt, B, C, state, stepping: bool, remember: bool, seq_idx=None) -> tuple[Tensor, Tensor | None]:
        weights = _numbers(self.C_real, self.C_imag)
        system = {"dt": self.dt_log.exp(), "A": self._rates, "C": weights, "D": self.D}
        if stepping:
            state = state.to(x.device)
            return s4d_step(state, x[:, 0], **system)[:, None], state
        options = {"initial_state": state, "seq_idx": seq_idx}
        if remember:
            return s4d_scan(x, **system, **options, return_final_state=True)
        return s4d_scan(x, **system, **options), None

    def log_decay(self, dt: Tensor) -> Tensor:
        """As `StateSpace.log_decay`, for each number of a state: (B,H*P,parts,modes)."""
        return (dt.sum(1)[..., None, None] * self._rates).float()

    @property
    def _rates(self) -> Tensor:
        return _numbers(-self.A_log.exp(), self.A_imag)

    def transfers(self, view) -> list[Transfer]:
        return self.projection_transfers(view, {"x": ("v_proj", 1.0, "x", Heads(self.num_kv_heads, self.head_dim))})

    def drops(self, view) -> list[str]:
        return [*super().drops(view), f"{view.q_proj.name}.", f"{view.k_proj.name}."]

    def recurrence_transfers(self, name: str) -> list[Transfer]:
        n = range(self.modes)
        rates = [0.5 if self.parts == 2 else i + 1.0 for i in n]
        constants: dict[str, float | tuple[float, ...]] = {
            "dt_log": math.log(math.log(2) / (HALF_LIFE * rates[0])),
            "A_log": tuple(map(math.log, rates)),
            "C_real": (self._mean(rates[0]), *[0.0] * (self.modes - 1)),
            "D": 0.0,
        }
        constants |= {"A_imag": tuple(math.pi * i for i in n), "C_imag": 0.0} if self.parts == 2 else {}
        constants |= {} if self.norm is None else {"norm.weight": 1.0}
        return [Transfer(f"{name}.{part}", "constant", value=value) for part, value in constants.items()]

    @torch.no_grad()
    def start_state(self, generator: torch.Generator) -> None:
        """Steps log-uniform, and weights of all modes drawn, as the paper has them; rates as transferred, the paper's,
        too."""
        low, high = STEPS
        self.dt_log.uniform_(math.log(low), math.log(high), generator=generator)
        for weights in (self.C_real, self.C_imag):
            if weights is not None:
                weights.normal_(std=self.parts**-0.5, generator=generator)
        self.D.normal_(generator=generator)

    @torch.no_grad()
    def set_decay(self, half_life: Tensor, scale: Tensor) -> None:
        """Of the first mode: the others, which are read once they are trained, keep their rates beside it."""
        half_life, scale = half_life.repeat_interleave(self.head_dim), scale.expand(-1, self.head_dim).flatten()
        rate = self.A_log[:, 0].exp()
        self.dt_log.copy_((math.log(2) / (half_life * rate)).log())
        if self.norm is not None:
            self.norm.get_parameter("weight").copy_(scale)
            scale = torch.ones_like(scale)
        self.C_real[:, 0] = scale * self._mean(rate)

    def _mean(self, rate):
        """The weight C of a real mode of this rate that makes a mean of it: what all tokens are read with, the sum of
        C (exp(dt A) - 1) / A exp(dt A)^k over k, is -C / A, and counts twice in a pair."""
        return rate / self.parts

    @property
    def scales_channels(self) -> bool:
        return True

    @property
    def state_size(self) -> int:
        return self.modes * self.parts


def _numbers(real: Tensor, imaginary: Tensor | None) -> Tensor:
    """(channels, 2 or 1, modes), of parts (channels, modes)."""
    return real[:, None] if imaginary is None else torch.stack((real, imaginary), 1)
