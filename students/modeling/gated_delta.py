"""The gated DeltaNet mixer (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464), with what a teacher can hand over.

As in Mamba-2 queries, keys and values of attention read and write a state that decays; but a token first takes out what
the state holds under its key, so that a key is found again with its latest value, and not with the sum of all. Keys and
queries have length 1. This file travels with exported checkpoints: it imports torch only.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fused_projection import FusedProjection
from .modeling_mixer import Geometry, Heads, Transfer
from .state_space import GATE_OPEN, PADDING_STEP, StateSpace, WidenedLinear

try:
    from transpoint.kernels.delta import delta_scan, delta_step
except ImportError:  # the plain reference, which travels beside this file
    from .delta_reference import delta_scan, delta_step  # type: ignore[no-redef]

NORM_EPS = 1e-6  # of keys and queries, as in transformers' Qwen3-Next
STRENGTH = 0.1  # how much of what is held under its key a token replaces, until `calibrate` has found it


class GatedDelta(StateSpace):
    """The recurrence alone. Keys B and queries C are of length 1, and `dt` has two numbers for each head, a and b;
    b_bias (or None) is added to b."""

    exact: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias")
    strengths: ClassVar[tuple[float, ...]] = (0.03, 0.1, 0.3, 0.8)
    products: ClassVar[int] = 3  # what the state holds under a key is read, too
    rates: ClassVar[tuple[float, float]] = (1e-6, 16.0)  # from 0 on, as flash-linear-attention starts it
    b_bias: nn.Parameter | None

    def _recur(self, x, dt, B, C, state, stepping: bool, remember: bool, seq_idx=None) -> tuple[Tensor, Tensor | None]:
        a, b = dt.to(torch.promote_types(dt.dtype, torch.float32)).chunk(2, -1)
        g = -self.A_log.float().exp() * F.softplus(a + self.dt_bias)
        beta = (b if self.b_bias is None else b + self.b_bias).sigmoid()
        if stepping:
            state = state.to(x.device)
            return delta_step(state, C[:, 0], B[:, 0], x[:, 0], g[:, 0], beta[:, 0])[:, None], state
        options = {"initial_state": state, "seq_idx": seq_idx}
        if remember:
            return delta_scan(C, B, x, g, beta, **options, return_final_state=True)
        return delta_scan(C, B, x, g, beta, **options), None

    def log_decay(self, dt: Tensor) -> Tensor | None:
        return None  # a token also turns the state

    @torch.no_grad()
    def start(self, generator: torch.Generator, spread: float) -> None:
        super().start(generator, spread)
        if self.b_bias is not None:
            self.b_bias.zero_()


class GatedDeltaMixer(GatedDelta, FusedProjection):
    """A gated DeltaNet mixer with the call signature of self-attention. H heads of queries, keys and values, each P.

    Rows of `in_proj`: z (H*P, if gated), v, k and q (H*P each), a (H), b (H). v, k and q pass a causal depthwise
    convolution and an optional SiLU, as in `Mamba2Mixer`; k and q then the teacher's norms and rotary embedding, where
    those are kept, and are brought to length 1.

        g_t = -exp(A_log) softplus(a_t + dt_bias)        beta_t = sigmoid(b_t)
        S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T
        out = out_proj(norm(S_t q_t) * SiLU(z_t))

    Keys and values are there once for each query head that reads them in the teacher, and learn by themselves from then
    on: no released kernel shares them.

    Args:
        attention: the self-attention it replaces, of the student's own tree, whose norms it takes over.
        geometry: of that attention.
        conv_kernel: taps of the convolution (1: a scale and a bias).
        conv_activation: "silu" or None, after the convolution.
        gate: whether the output is gated by SiLU(z).
        gate_bias: whether z and b have biases, by which they start as they should; else `calibrate` makes them so.
        rope: whether k and q take the teacher's rotary embedding.
        qk_norm: whether k and q take the teacher's norms, where it has them.
    """

    def __init__(
        self,
        attention: nn.Module,
        geometry: Geometry,
        *,
        conv_kernel: int = 4,
        conv_activation: str | None = "silu",
        gate: bool = True,
        gate_bias: bool = False,
        rope: bool = False,
        qk_norm: bool = True,
        norm_eps: float = 1e-5,
    ):
        super().__init__(attention, geometry, conv_activation, gate, rope, norm_eps)
        P, H = self.head_dim, self.num_heads
        self.state_heads = H
        self.sizes = {"z": H * P if gate else 0, "v": H * P, "k": H * P, "q": H * P, "a": H, "b": H}
        self.in_proj = WidenedLinear(geometry.hidden_size, sum(self.sizes.values()), bias=False)
        self.z_bias = nn.Parameter(torch.full((H * P,), GATE_OPEN)) if gate and gate_bias else None
        self.b_bias = nn.Parameter(torch.full((H,), STRENGTH).logit()) if gate_bias else None
        # No released class has a bias there: so there is one only where the teacher's projections have some.
        biased = not {"q_proj", "k_proj", "v_proj"}.isdisjoint(geometry.biases)
        self.add_recurrence(conv_kernel, norm=True, skip=False, conv_bias=biased)
        self.take_norms(attention, qk_norm)
        self.out_proj = nn.Linear(H * P, geometry.hidden_size, bias="o_proj" in geometry.biases)
        self.opens: Tensor | None = None  # the row that `open_gate` was given

    def _project(self, hidden: Tensor, position_embeddings, memory=None, stepping=False, padding=None, seq_idx=None):
        sizes = self.sizes
        widths = [sizes["z"], sizes["v"] + sizes["k"] + sizes["q"], sizes["a"] + sizes["b"]]
        z, vkq, dt = self.in_proj(hidden).split(widths, dim=-1)
        dt = dt if padding is None else dt.masked_fill(padding, PADDING_STEP)  # it neither decays nor changes the state
        vkq, conv_state = self._convolve(vkq, memory, stepping, padding, seq_idx)
        v, k, q = (part.unflatten(-1, (self.num_heads, -1)) for part in vkq.chunk(3, dim=-1))
        rotary = position_embeddings if self.rope else None
        k, q = (unit(self.place(t, norm, rotary)) for t, norm in ((k, self.k_norm), (q, self.q_norm)))
        return z, v, k, q, dt, conv_state

    def _gate_and_norm(self, y: Tensor, z: Tensor | None) -> Tensor:
        """The gate comes after the norm here: what is normed does not depend on it. y, z and what comes of it are
        (B,L,H*P). Released layers read with queries of length 1/sqrt(P), of which the norm leaves nothing but its
        epsilon's being P times as large.
        """
        eps = self.head_dim * self.norm_eps
        y = y.to(torch.promote_types(y.dtype, torch.float32)).unflatten(-1, (self.num_heads, -1))
        y = F.rms_norm(y, y.shape[-1:], eps=eps).flatten(2)
        y = y * self.norm.get_parameter("weight")  # type: ignore[union-attr]
        return y if z is None else y * F.silu(z.to(y.dtype))

    def transfers(self, view) -> list[Transfer]:
        shared = Heads(self.num_kv_heads, self.head_dim, self.num_heads // self.num_kv_heads)
        # Of a key and a query, which are brought to length 1, only the direction counts: the factor of a query is that
        # by which attention scales it, and keeps the SiLU nearly linear.
        found = self.projection_transfers(
            view,
            {
                "v": ("v_proj", 1.0, "x", shared),
                "k": ("k_proj", 1.0, "B", shared),
                "q": ("q_proj", self.geometry.scale, "C", Heads(self.num_heads, self.head_dim)),
            },
        )
        if self.b_bias is not None:
            found.append(Transfer(f"{view.name}.b_bias", "constant", value=torch.tensor(STRENGTH).logit().item()))
        return found

    @property
    def gate_shut(self) -> bool:
        return self.b_bias is None

    @torch.no_grad()
    def open_gate(self, row: Tensor) -> None:
        self.opens = row.to(self.in_proj.weight)
        self.in_proj.weight[: self.sizes["z"]] = GATE_OPEN * self.opens
        self.set_strength(torch.full((self.num_heads,), STRENGTH, device=row.device))

    @torch.no_grad()
    def set_strength(self, strength: Tensor) -> None:
        logits = strength.logit()
        if self.b_bias is not None:
            self.b_bias.copy_(logits)
        elif self.opens is not None:
            self.in_proj.weight[-self.num_heads :] = logits[:, None].to(self.opens) * self.opens


def unit(t: Tensor) -> Tensor:
    """Vectors (..., P) of length 1, in the dtype they come in, as in released layers: kernels multiply matrices in the
    widest that they are given."""
    precise = t.to(torch.promote_types(t.dtype, torch.float32))
    return (precise * torch.rsqrt(precise.square().sum(-1, keepdim=True) + NORM_EPS)).to(t.dtype)
