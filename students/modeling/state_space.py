"""What mixers with a state share (Mamba-2, arXiv 2405.21060): convolution, recurrence, padding, and their start.

This file travels with exported checkpoints: it imports torch only.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from .modeling_mixer import Geometry, Mixer, Transfer, state_flops

try:  # the fused kernels, where the package is installed
    from transpoint.kernels.conv import causal_conv1d, causal_conv1d_step
    from transpoint.kernels.norm import gated_rms_norm
    from transpoint.kernels.ssd import ssd_scan, ssd_step
except ImportError:  # the plain references, which travel beside this file
    from .conv_reference import causal_conv1d, causal_conv1d_step  # type: ignore[no-redef]
    from .norm_reference import gated_rms_norm  # type: ignore[no-redef]
    from .ssd_reference import ssd_scan, ssd_step  # type: ignore[no-redef]

GATE_OPEN = 1.2784645  # SiLU is 1 there
STEP_ONE = 0.5413249  # softplus is 1 there
PADDING_STEP = -1e4  # softplus is exactly 0 there: a padding token leaves the state as it is
SMALLEST_SCALE = 1e-3  # a step must be positive, though the best scale of a head may not be
# SiLU(e u) is e u / 2 + (e u)^2 / 4 + ...: a small input keeps it nearly linear, as attention's values and keys are.
# (Queries are small already, by 1/sqrt(P).) The norm, or calibration, takes the factor out again.
SILU_INPUT = {"x": 0.25, "B": 0.25, "C": 1.0}
# Half-life, in tokens, that a head starts with before `calibrate` has measured the teacher's.
HALF_LIFE = 32.0

# Between which steps, on a logarithmic scale, heads start that are trained from scratch.
STEPS = (1e-3, 1e-1)


def softplus_inverse(step: Tensor) -> Tensor:
    return torch.where(step > 20, step, step.expm1().log())


class WidenedLinear(nn.Linear):
    """A linear map without bias whose outputs lie in rows of a multiple of 8 numbers, as tensor cores want them.

    An odd number of heads makes for a width that they do not take: a product with an older kernel, at half the speed.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        missing = -self.out_features % 8
        if not missing or not torch.is_grad_enabled():  # decoding would copy the weight for each token
            return super().forward(inputs)
        wide = nn.functional.linear(inputs, nn.functional.pad(self.weight, (0, 0, 0, missing)))
        return wide[..., : self.out_features]


class StateSpace(Mixer):
    """What mixers with a state, and a decay for each head, share.

    All have dt_bias and A_log, D, conv1d and norm (or None for these), and q_norm and k_norm (or None).

    rates: between which -A starts, where it is trained from scratch.
    products: with the state, that each token takes: it is written and read.
    """

    rates: ClassVar[tuple[float, float]] = (1.0, 16.0)
    products: ClassVar[int] = 2

    exact: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias", "D")
    apart = ("conv1d", "norm")
    has_decay = True
    conv1d: nn.Conv1d | None
    norm: nn.Module | None
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    dt_bias: nn.Parameter
    A_log: nn.Parameter
    D: nn.Parameter

    def __init__(
        self,
        attention: nn.Module,
        geometry: Geometry,
        conv_activation: str | None,
        gate: bool,
        rope: bool,
        norm_eps: float,
    ):
        super().__init__(attention, geometry)
        self.conv_activation, self.gate, self.norm_eps = conv_activation, gate, norm_eps
        self.rope = rope and geometry.rotary_dim > 0
        self.state_heads = self.num_kv_heads  # of x and B
        self.state_factor = 1

    def add_recurrence(
        self,
        conv_kernel: int,
        norm: bool,
        skip: bool = True,
        conv_bias: bool = True,
        channels: int | None = None,
        steps: int | None = None,
        rates: tuple[int, ...] | None = None,
    ) -> None:
        """Makes what any state has. The parameters of a depthwise convolution: the convolution is `causal_conv1d`.

        Args:
            channels: of the convolution; None: those of x, B and C.
            steps: how many step sizes and skips there are, and
            rates: the shape of the rates of decay; None: one for each head.
        """
        P, H, N = self.head_dim, self.num_heads, self.state_size
        channels = self.state_heads * (P + N) + H * N if channels is None else channels
        self.conv1d = (
            nn.Conv1d(channels, channels, conv_kernel, groups=channels, bias=conv_bias) if conv_kernel else None
        )
        self.dt_bias = nn.Parameter(torch.full((steps or H,), STEP_ONE))
        self.A_log = nn.Parameter(torch.zeros(rates or (H,)))
        self.D = nn.Parameter(torch.zeros(steps or H)) if skip else None  # type: ignore[assignment]
        self.norm = nn.Module() if norm else None
        if self.norm is not None:
            self.norm.weight = nn.Parameter(torch.ones(H * P))

    def recurrence_transfers(self, name: str) -> list[Transfer]:
        """Of what no attention has: step, decay, skip, and the norm of what the recurrence reads."""
        decay = 0.5 ** (1 / HALF_LIFE)  # of the state in one token
        constants = {"dt_bias": STEP_ONE, "A_log": math.log(-math.log(decay))}
        constants |= {} if self.D is None else {"D": 0.0}
        constants |= {} if self.norm is None else {"norm.weight": 1.0}
        return [Transfer(f"{name}.{part}", "constant", value=value) for part, value in constants.items()]

    @torch.no_grad()
    def start(self, generator: torch.Generator, spread: float) -> None:
        super().start(generator, spread)
        self.start_state(generator)

    @torch.no_grad()
    def start_state(self, generator: torch.Generator) -> None:
        """Steps, decays and skip as mamba_ssm's Mamba2 starts them."""
        low, high = STEPS
        step = torch.empty_like(self.dt_bias).uniform_(math.log(low), math.log(high), generator=generator).exp()
        self.dt_bias.copy_(softplus_inverse(step))
        self.A_log.copy_(torch.empty_like(self.A_log).uniform_(*self.rates, generator=generator).log())
        if self.D is not None:
            self.D.fill_(1.0)

    @torch.no_grad()
    def set_decay(self, half_life: Tensor, scale: Tensor) -> None:
        ones = torch.ones_like(half_life)
        step = scale[:, 0].clamp(min=SMALLEST_SCALE) if self.norm is None else ones
        self.dt_bias.copy_(softplus_inverse(step))
        self.A_log.copy_((math.log(2) / (half_life * step)).log())
        if self.norm is not None:
            self.norm.get_parameter("weight").copy_(scale.expand(-1, self.head_dim).flatten())

    def state_space_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by name that only the state-space form has: all, where there is no other form."""
        return dict(self.named_parameters())

    @property
    def scales_channels(self) -> bool:
        return self.norm is not None

    def flops(self, length: int) -> float:
        taps = self.conv1d.weight.numel() if self.conv1d is not None else 0
        read = state_flops(self.num_heads, self.head_dim * self.state_size, length, self.trans_point)
        return read * self.products / 2 + (2.0 * taps if read else 0.0)

    def state_bytes(self) -> int:
        return 4 * self.num_heads * self.head_dim * self.state_size

    @property
    def state_size(self) -> int:
        """N, of a state (P, N)."""
        return self.state_factor * self.head_dim

    def _convolve(self, inputs, memory, stepping: bool, padding=None, seq_idx=None) -> tuple[Tensor, Tensor | None]:
        """The convolution of inputs (B,L,channels), and its tail where there is a memory. Padding (B,L,1) is zero
        before it, so that it reaches no token, and after it."""
        conv: nn.Conv1d = self.conv1d  # type: ignore[assignment]  # nobody calls this without one
        weight, bias = conv.weight.squeeze(1), conv.bias
        options = {"activation": self.conv_activation}
        if stepping:
            tail = memory.conv_state.to(inputs.device)
            return causal_conv1d_step(inputs[:, 0], tail, weight, bias, **options)[:, None], tail
        if padding is not None:
            inputs = inputs.masked_fill(padding, 0)
        options["seq_idx"], tail = seq_idx, None
        if memory is None:
            outputs = causal_conv1d(inputs, weight, bias, **options)
        else:
            outputs, tail = causal_conv1d(
                inputs, weight, bias, **options, initial_state=memory.conv_state, return_final_state=True
            )
        return (outputs if padding is None else outputs.masked_fill(padding, 0)), tail

    def _recur(self, x, dt, B, C, state, stepping: bool, remember: bool, seq_idx=None) -> tuple[Tensor, Tensor | None]:
        """What the recurrence reads from `state` on (B,L,H,P), and with `remember` the state after the last token."""
        A, options = -torch.exp(self.A_log.float()), {"D": self.D, "dt_bias": self.dt_bias}
        if stepping:
            state = state.to(x.device)
            return ssd_step(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], **options)[:, None], state
        options |= {"seq_idx": seq_idx, "initial_state": state}
        if remember:
            return ssd_scan(x, dt, A, B, C, **options, return_final_state=True)
        return ssd_scan(x, dt, A, B, C, **options), None

    def log_decay(self, dt: Tensor) -> Tensor | None:
        """The logarithm of what tokens with these dt (B,L,steps), as `_recur` takes them, leave of a state before them:
        (B,H,1,1), which multiplies the state once it is exponentiated. None: there is no such factor."""
        steps = nn.functional.softplus(dt.float() + self.dt_bias.float()).sum(1)
        return (-torch.exp(self.A_log.float()) * steps)[..., None, None]

    def _gate_and_norm(self, y: Tensor, z: Tensor | None) -> Tensor:
        """What comes after the recurrence, on y (B,L,H*P); z of the same shape, or None without a gate."""
        if self.norm is not None:
            return gated_rms_norm(y, self.norm.weight, z, groups=self.num_heads, eps=self.norm_eps)
        return y if z is None else y * nn.functional.silu(z)
