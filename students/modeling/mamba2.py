"""The Mamba-2 mixer (Dao & Gu 2024, arXiv 2405.21060), with the parts of attention a teacher can hand over.

Attention is linear attention with a softmax; Mamba-2 is linear attention with decay. So queries become C, keys B,
values x, and the output projection stays. x and B keep the teacher's key/value heads (no copies), C has its query
heads. This file travels with exported checkpoints: it imports torch only.
"""

import torch
from torch import Tensor, nn

from .errors import StudentError
from .fused_projection import FusedProjection
from .modeling_mixer import Geometry, Heads, Transfer
from .state_space import GATE_OPEN, PADDING_STEP, WidenedLinear


class Mamba2Mixer(FusedProjection):
    """A Mamba-2 mixer with the call signature of self-attention. H heads, K of x and B, head_dim P, state N.

    Rows of `in_proj`: z (H*P, if gated), x (K*P), B (K*N), C (H*N), dt (H). x, B and C pass a causal depthwise
    convolution (its bias is theirs: `in_proj` has none, so that padding stays zero up to the convolution) and an
    optional SiLU; B and C then the teacher's k/q norm and rotary embedding, where those are kept.

        S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T
        y_t = S_t C_t + D x_t
        out = out_proj(norm(y_t * SiLU(z_t)))

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
        expand_kv: whether K is H, each key/value head being there once for each query head that reads it, and learning
            by itself from then on; else K is the teacher's number of key/value heads.
        state_factor: N is so many times P. What B gains starts as the keys of the token before, by the convolution, and
            what C gains as zero: so a student starts as without, and can learn to find what followed a token.
    """

    matrix = ("in_proj.", "conv1d.", "k_norm.", "q_norm.", "dt_bias", "A_log")

    def __init__(
        self,
        attention: nn.Module,
        geometry: Geometry,
        *,
        conv_kernel: int = 4,
        conv_activation: str | None = "silu",
        gate: bool = True,
        gate_bias: bool = True,
        norm: bool = True,
        rope: bool = False,
        qk_norm: bool = True,
        expand_kv: bool = False,
        state_factor: int = 1,
        norm_eps: float = 1e-5,
    ):
        super().__init__(attention, geometry, conv_activation, gate, rope, norm_eps)
        P, H, N = self.head_dim, self.num_heads, state_factor * self.head_dim
        self.state_factor = state_factor
        self.state_heads = K = H if expand_kv else self.num_kv_heads
        self.sizes = {"z": H * P if gate else 0, "x": K * P, "B": K * N, "C": H * N, "dt": H}

        self.in_proj = WidenedLinear(geometry.hidden_size, sum(self.sizes.values()), bias=False)
        self.z_bias = nn.Parameter(torch.full((H * P,), GATE_OPEN)) if gate and gate_bias else None
        self.add_recurrence(conv_kernel, norm)
        self.take_norms(attention, qk_norm)
        norms = self.q_norm is not None
        # Without norms the scale of q.k is folded into the rows of C; a norm would undo that.
        self.scale = geometry.scale if norms else 1.0
        if norms and geometry.norm_over == "all" and (expand_kv or state_factor > 1):
            raise StudentError(
                "this teacher norms all heads together, which neither student.expand_kv nor student.state_factor does: "
                "set student.qk_norm=false"
            )
        self.out_proj = nn.Linear(H * P, geometry.hidden_size, bias="o_proj" in geometry.biases)

    def _project(self, hidden: Tensor, position_embeddings, memory=None, stepping=False, padding=None, seq_idx=None):
        """z, x, B, C and dt of hidden states (B,L,hidden), and the convolution's tail."""
        widths = [self.sizes["z"], self.sizes["x"] + self.sizes["B"] + self.sizes["C"], self.sizes["dt"]]
        z, xBC, dt = self.in_proj(hidden).split(widths, dim=-1)
        dt = dt if padding is None else dt.masked_fill(padding, PADDING_STEP)
        xBC, conv_state = self._convolve(xBC, memory, stepping, padding, seq_idx)
        x, B, C = (
            part.unflatten(-1, (-1, self.head_dim))
            for part in xBC.split([self.sizes["x"], self.sizes["B"], self.sizes["C"]], dim=-1)
        )
        rotary = position_embeddings if self.rope else None
        B, C = self.place(B, self.k_norm, rotary), self.place(C, self.q_norm, rotary)
        if self.state_factor > 1:
            B, C = (t.unflatten(2, (-1, self.state_factor)).flatten(3) for t in (B, C))
        return z, x, B, C if self.q_norm is None else C * self.scale, dt, conv_state

    def mixing(self, hidden_states: Tensor, position_embeddings, seq_idx: Tensor) -> dict[str, Tensor]:
        _, _, B, C, dt, _ = self._project(hidden_states, position_embeddings, seq_idx=seq_idx)
        return {"dt": dt, "A": -torch.exp(self.A_log.float()), "B": B, "C": C, "dt_bias": self.dt_bias}

    def transfers(self, view) -> list[Transfer]:
        count, size, repeats = self.num_kv_heads, self.head_dim, self.state_heads // self.num_kv_heads
        # A query is scaled before it meets a key; where it is normed first, the mixer scales after its norm.
        scale = self.geometry.scale if self.q_norm is None else 1.0
        return self.projection_transfers(
            view,
            {
                "x": ("v_proj", 1.0, "x", Heads(count, size, repeats)),
                "B": ("k_proj", 1.0, "B", Heads(count, size, repeats, self.state_factor, again=True)),
                "C": ("q_proj", scale, "C", Heads(self.num_heads, size, 1, self.state_factor)),
            },
        )
