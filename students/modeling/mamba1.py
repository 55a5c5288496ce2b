"""The Mamba-1 mixer (Gu & Dao 2023, arXiv 2312.00752), with the parts of attention a teacher can hand over.

Queries become C, keys B, values x, and the output projection stays, as in Mamba-2; but each channel has steps of its
own, and each number of its state its own decay ("The Mamba in the Llama", arXiv 2408.15237, section 2.2). This file
travels with exported checkpoints: it imports torch only.
"""

import math

import torch
from torch import Tensor, nn

from .fused_projection import FusedProjection
from .modeling_mixer import Geometry, Heads, Transfer
from .state_space import GATE_OPEN, PADDING_STEP, SMALLEST_SCALE, WidenedLinear, softplus_inverse

try:
    from transpoint.kernels.selective import selective_scan, selective_step
except ImportError:  # the plain reference, which travels beside this file
    from .selective_reference import selective_scan, selective_step  # type: ignore[no-redef]

STATE_OF_X = 16  # numbers of the state of a channel where B and C come from x: the paper's
RANK_OF = 16  # numbers of a hidden state for each of those that steps are computed from: the paper's


class Mamba1Mixer(FusedProjection):
    """A Mamba-1 mixer with the call signature of self-attention. H heads of P channels, K of x and B, N = P.

    Rows of `in_proj`: z (H*P, if gated), x (K*P), B (K*N), C (H*N), dt (R). x, B and C pass a causal depthwise
    convolution and an optional SiLU, and B and C the teacher's norms and rotary embedding, as in `Mamba2Mixer`. The
    channels of a head share B and C; each number of a channel's state has its own decay.

        dt_t = softplus(dt_proj(dt_t) + dt_bias)
        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t
        out = out_proj(norm(h_t C_t + D x_t) * SiLU(z_t))

    From x (`selection`), rows of `in_proj` are z and x (H*P) alone, only x passes the convolution, and `x_proj` makes
    of it dt, B and C: these are RMS-normalised, as in Jamba, and shared by all channels, N = 16. None of the teacher's
    keys and queries can be had so, and they start at random: for models that learn from scratch.

    Args:
        attention: the self-attention it replaces, of the student's own tree, whose norms it takes over.
        geometry: of that attention.
        conv_kernel: taps of the convolution (1: a scale and a bias).
        conv_activation: "silu" or None, after the convolution.
        gate: whether the output is gated by SiLU(z).
        gate_bias: whether z has a bias, by which the gate starts open; else it is shut until `calibrate` opens it.
        norm: whether the gated output is RMS-normalised, one head at a time.
        rope: whether B and C take the teacher's rotary embedding.
        qk_norm: whether B and C take the teacher's k/q norms, where it has them.
        selection: what dt, B and C are computed from, "hidden" states or "x".
    """

    def __init__(
        self,
        attention: nn.Module,
        geometry: Geometry,
        *,
        conv_kernel: int = 4,
        conv_activation: str | None = "silu",
        gate: bool = True,
        gate_bias: bool = True,
        norm: bool = False,
        rope: bool = False,
        qk_norm: bool = True,
        selection: str = "hidden",
        norm_eps: float = 1e-5,
    ):
        super().__init__(attention, geometry, conv_activation, gate, rope, norm_eps)
        P, H, K, hidden = self.head_dim, self.num_heads, self.num_kv_heads, geometry.hidden_size
        self.from_x = selection == "x"
        self.rank = R = math.ceil(hidden / RANK_OF)
        N = self.state_size
        own = {"x": H * P} if self.from_x else {"x": K * P, "B": K * N, "C": H * N, "dt": R}
        self.sizes = {"z": H * P if gate else 0, **own}
        self.in_proj = WidenedLinear(hidden, sum(self.sizes.values()), bias=False)
        self.z_bias = nn.Parameter(torch.full((H * P,), GATE_OPEN)) if gate and gate_bias else None
        convolved = sum(self.sizes.get(part, 0) for part in "xBC")
        # A_log is no matrix, which weight decay would draw to a rate of 1.
        self.add_recurrence(conv_kernel, norm, channels=convolved, steps=H * P, rates=(H, P, N))
        if self.from_x:
            self.x_proj = nn.Linear(H * P, R + 2 * N, bias=False)
            self.dt_norm, self.B_norm, self.C_norm = (nn.RMSNorm(size, eps=norm_eps) for size in (R, N, N))
        self.take_norms(attention, qk_norm and not self.from_x)
        # Without norms the scale of q.k is folded into the rows of C; a norm would undo that.
        self.scale = 1.0 if self.q_norm is None else geometry.scale
        self.dt_proj = nn.Linear(R, H * P, bias=False)
        self.out_proj = nn.Linear(H * P, hidden, bias="o_proj" in geometry.biases)

    def _project(self, hidden: Tensor, position_embeddings, memory=None, stepping=False, padding=None, seq_idx=None):
        sizes, N = self.sizes, self.state_size
        convolved = sum(sizes.get(part, 0) for part in "xBC")
        z, xBC, dt = self.in_proj(hidden).split([sizes["z"], convolved, sizes.get("dt", 0)], dim=-1)
        xBC, conv_state = self._convolve(xBC, memory, stepping, padding, seq_idx)
        if self.from_x:
            x = xBC
            dt, B, C = self.x_proj(x).split([self.rank, N, N], dim=-1)
            dt, B, C = self.dt_norm(dt), self.B_norm(B).unsqueeze(2), self.C_norm(C).unsqueeze(2)
        else:
            x, B, C = (
                part.unflatten(-1, (-1, self.head_dim))
                for part in xBC.split([sizes["x"], sizes["B"], sizes["C"]], dim=-1)
            )
            rotary = position_embeddings if self.rope else None
            B, C = self.place(B, self.k_norm, rotary), self.place(C, self.q_norm, rotary) * self.scale
            x = x.repeat_interleave(self.num_heads // self.num_kv_heads, 2).flatten(2)
        dt = self.dt_proj(dt)
        dt = dt if padding is None else dt.masked_fill(padding, PADDING_STEP)
        return z, x, B, C, dt, conv_state

    def _recur(self, x, dt, B, C, state, stepping: bool, remember: bool, seq_idx=None) -> tuple[Tensor, Tensor | None]:
        """What the recurrence reads from `state` on (B,L,H*P), and with `remember` the state after the last token."""
        A, options = -torch.exp(self.A_log.float()).flatten(0, 1), {"D": self.D, "dt_bias": self.dt_bias}
        if stepping:
            state = state.to(x.device)
            return selective_step(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], **options)[:, None], state
        options |= {"seq_idx": seq_idx, "initial_state": state}
        if remember:
            return selective_scan(x, dt, A, B, C, **options, return_final_state=True)
        return selective_scan(x, dt, A, B, C, **options), None

    def log_decay(self, dt: Tensor) -> Tensor:
        """As `StateSpace.log_decay`, for each number of a state: (B,H*P,N)."""
        steps = nn.functional.softplus(dt.float() + self.dt_bias.float()).sum(1)
        return -torch.exp(self.A_log.float()).flatten(0, 1) * steps[..., None]

    def transfers(self, view) -> list[Transfer]:
        H, K, P = self.num_heads, self.num_kv_heads, self.head_dim
        if self.from_x:
            found = self.projection_transfers(view, {"x": ("v_proj", 1.0, "x", Heads(K, P, H // K))})
            found.append(Transfer(f"{view.name}.x_proj.weight", "uniform", value=(H * P) ** -0.5))
            norms = (f"{view.name}.{name}_norm.weight" for name in ("dt", "B", "C"))
            found += [Transfer(name, "constant", value=1.0) for name in norms]
            # What is normed is never small: steps are moved by no input only where this is zero.
            return [*found, Transfer(f"{view.name}.dt_proj.weight", "constant", value=0.0)]
        # A query is scaled before it meets a key; where it is normed first, the mixer scales after its norm.
        scale = self.geometry.scale if self.q_norm is None else 1.0
        sources = {
            "x": ("v_proj", 1.0, "x", Heads(K, P)),
            "B": ("k_proj", 1.0, "B", Heads(K, P)),
            "C": ("q_proj", scale, "C", Heads(H, P)),
        }
        # With rows of dt that are zero, no input moves a step; with this zero, too, none would ever learn to.
        learns = Transfer(f"{view.name}.dt_proj.weight", "uniform", value=self.rank**-0.5)
        return [*self.projection_transfers(view, sources), learns]

    def drops(self, view) -> list[str]:
        unread = [f"{held.name}." for held in (view.q_proj, view.k_proj)] if self.from_x else []
        return super().drops(view) + unread

    @torch.no_grad()
    def start_state(self, generator: torch.Generator) -> None:
        """Rates as S4D-Real's, the number of each in the state, and `dt_proj` as mamba_ssm's Mamba starts it."""
        super().start_state(generator)
        self.A_log.copy_(torch.arange(1.0, self.state_size + 1).log())
        bound = self.rank**-0.5
        self.dt_proj.weight.uniform_(-bound, bound, generator=generator)

    @torch.no_grad()
    def set_decay(self, half_life: Tensor, scale: Tensor) -> None:
        scale = scale.expand(-1, self.head_dim)
        step = scale.clamp(min=SMALLEST_SCALE) if self.norm is None else torch.ones_like(scale)
        self.dt_bias.copy_(softplus_inverse(step).flatten())
        self.A_log.copy_((math.log(2) / (half_life[:, None] * step)).log()[..., None].expand_as(self.A_log))
        if self.norm is not None:
            self.norm.get_parameter("weight").copy_(scale.flatten())

    @property
    def scales_channels(self) -> bool:
        return True  # by the norm, or by the steps

    @property
    def state_size(self) -> int:
        return STATE_OF_X if self.from_x else self.head_dim
