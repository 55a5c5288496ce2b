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
from .state_space import GATE_OPEN, PADDING_STEP, WidenedLinear

try:
    from transpoint.kernels.delta import delta_scan, delta_step
except ImportError:  # the plain reference, which travels beside this file
    from .delta_reference import delta_scan, delta_step  # type: ignore[no-redef]

NORM_EPS = 1e-6  # of keys and queries, as in transformers' Qwen3-Next
STRENGTH = 0.1  # how much of what is held under its key a token replaces, until `calibrate` has found it,
STRENGTHS = (0.03, 0.1, 0.3, 0.8)  # among these


class GatedDeltaMixer(FusedProjection):
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

    exact: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias")
    strengths: ClassVar[tuple[float, ...]] = STRENGTHS
    products: ClassVar[int] = 3  # what the state holds under a key is read, too
    rates: ClassVar[tuple[float, float]] = (1e-6, 16.0)  # from 0 on, as flash-linear-attention starts it

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

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache=None,
        padding_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **others,
    ) -> tuple[Tensor, None]:
        """Mixes hidden states (B,L,hidden) along L; arguments, results and errors as `FusedProjection.forward`."""
        padding_mask, seq_idx, *_ = self.told(attention_mask, padding_mask, seq_idx)
        batch, length, _ = hidden_states.shape
        memory = self.memory(cache, others, packed=seq_idx is not None)
        seq_idx = None if seq_idx is None else seq_idx.expand(batch, -1)
        stepping, padding, pads = self._padding(memory, padding_mask, length)
        sizes, H = self.sizes, self.num_heads
        widths = [sizes["z"], sizes["v"] + sizes["k"] + sizes["q"], sizes["a"], sizes["b"]]
        z, vkq, a, b = self.in_proj(hidden_states).split(widths, dim=-1)
        vkq, conv_state = self._convolve(vkq, memory, stepping, padding, seq_idx)
        v, k, q = (part.unflatten(-1, (H, -1)) for part in vkq.chunk(3, dim=-1))
        rotary = position_embeddings if self.rope else None
        # Back in v's dtype, as in released layers: kernels multiply matrices in the widest that they are given.
        k, q = (unit(self.place(t, norm, rotary)).to(v.dtype) for t, norm in ((k, self.k_norm), (q, self.q_norm)))
        b = b if self.b_bias is None else b + self.b_bias
        if padding is not None:  # it neither decays nor changes the state
            a, b = (t.masked_fill(padding, PADDING_STEP) for t in (a, b))
        g, beta = decay_and_strength(a, b, self.A_log, self.dt_bias)
        state = None if memory is None else memory.ssm_state
        y, state = recur(q, k, v, g, beta, state, stepping, memory is not None, seq_idx)
        if memory is not None:
            memory.advance(conv_state, state, length, memory.tokens_after(length, pads))
        z = z if self.z_bias is None else z + self.z_bias
        y = self._norm_and_gate(y, z if self.gate else None)
        return self.out_proj(y.to(hidden_states.dtype)), None

    def _norm_and_gate(self, y: Tensor, z: Tensor | None) -> Tensor:
        """The gate comes after the norm here: what is normed does not depend on it.

        y (B,L,H,P), z and what comes of it (B,L,H*P). Released layers read with queries of length 1/sqrt(P), of which
        the norm leaves nothing but its epsilon's being P times as large.
        """
        eps = self.head_dim * self.norm_eps
        y = F.rms_norm(y.to(_precise(y)), y.shape[-1:], eps=eps).flatten(2)
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

    @torch.no_grad()
    def start(self, generator: torch.Generator, spread: float) -> None:
        super().start(generator, spread)
        if self.b_bias is not None:
            self.b_bias.zero_()

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
    """Vectors (..., P) of length 1."""
    t = t.to(_precise(t))
    return t * torch.rsqrt(t.square().sum(-1, keepdim=True) + NORM_EPS)


def decay_and_strength(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of a token's decay, and how much of what is held under its key it replaces, (B,L,H) as a and b."""
    g = -A_log.float().exp() * F.softplus(a.to(_precise(a)) + dt_bias)
    return g, b.to(_precise(b)).sigmoid()


def recur(q, k, v, g, beta, state, stepping: bool, remember: bool, seq_idx) -> tuple[Tensor, Tensor | None]:
    """What the recurrence reads from `state` on (B,L,H,P), and with `remember` the state after the last token."""
    if stepping:
        state = state.to(v.device)
        return delta_step(state, q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0])[:, None], state
    options = {"initial_state": state, "seq_idx": seq_idx}
    if remember:
        return delta_scan(q, k, v, g, beta, **options, return_final_state=True)
    return delta_scan(q, k, v, g, beta, **options), None


def _precise(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
