"""What mixers share that have a state beside attention's own projections: one set of weights for both.

Softmax attention and Mamba-2 read the same three projections: queries are C, keys B, values x. So such a mixer keeps
the teacher's own projections, norms and rotary embedding, and adds what only the recurrence has: step, decay and skip.
This file travels with exported checkpoints: it imports torch only.
"""

import torch
from torch import Tensor, nn

from .modeling_mixer import Geometry, Transfer
from .projections import Projections
from .state_space import GATE_OPEN, SILU_INPUT, StateSpace, WidenedLinear


class SharedProjections(Projections, StateSpace):
    """Attention's four projections and its norms, and a state that reads them.

    Args:
        attention: the self-attention it replaces, of the student's own tree, whose norms it takes over.
        geometry: of that attention.
        conv_kernel: taps of a causal depthwise convolution over v, k and q (0: none), for the state alone, as all that
            follows.
        conv_activation: "silu" or None, after the convolution.
        gate: whether what the state gives is gated by SiLU(z).
        norm: whether that is RMS-normalised, one head at a time.
        rope: whether B and C take the teacher's rotary embedding.
        qk_norm: whether B and C take the teacher's k/q norms, where it has them.
        skip: whether there is a term D x beside what the state gives.
    """

    def __init__(
        self,
        attention: nn.Module,
        geometry: Geometry,
        conv_kernel: int,
        conv_activation: str | None,
        gate: bool,
        norm: bool,
        rope: bool,
        qk_norm: bool,
        norm_eps: float,
        skip: bool = True,
    ):
        super().__init__(attention, geometry, conv_activation, gate, rope, norm_eps)
        self.add_projections(attention, geometry)
        normed = geometry.norm_over is not None
        self.qk_norm = qk_norm and normed
        # Without a convolution both forms read the same values and keys, and a cache holds them once.
        placed = rope or not geometry.rotary_dim
        self.shared = not conv_kernel and placed and self.qk_norm == normed

        self.dt_proj = WidenedLinear(geometry.hidden_size, self.num_heads, bias=False)
        self.add_recurrence(conv_kernel, norm, skip)
        self.z_proj = nn.Linear(geometry.hidden_size, self.num_heads * self.head_dim) if gate else None
        if self.z_proj is not None:
            nn.init.constant_(self.z_proj.bias, GATE_OPEN)

    def state_space_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by name that only the state-space form has."""
        return {name: p for name, p in self.named_parameters() if not name.startswith(self.copied)}

    def transfers(self, view) -> list[Transfer]:
        found = super().transfers(view)
        if self.conv1d is not None:
            channel, silu = 0, self.conv_activation == "silu"
            for part, heads in (("x", self.num_kv_heads), ("B", self.num_kv_heads), ("C", self.num_heads)):
                channels, channel = (channel, channel + heads * self.head_dim), channel + heads * self.head_dim
                tap = SILU_INPUT[part] if silu else 1.0
                found.append(Transfer(f"{view.name}.conv1d.weight", "identity", rows=channels, part=part, value=tap))
            found.append(Transfer(f"{view.name}.conv1d.bias", "constant", value=0.0))
        if self.gate:
            found.append(Transfer(f"{view.name}.z_proj.weight", "constant", value=0.0))
            found.append(Transfer(f"{view.name}.z_proj.bias", "constant", value=GATE_OPEN))
        found.append(Transfer(f"{view.name}.dt_proj.weight", "constant", value=0.0))
        return found + self.recurrence_transfers(view.name)

    def _read(self, hidden: Tensor, projected, placed, position_embeddings, seq_idx: Tensor) -> Tensor:
        """What the heads read (B,L,H*P) from the state, over packed documents."""
        (q, k, x), (C, B) = projected, placed
        if not self.shared:
            x, B, C, _ = self._inputs(q, k, x, position_embeddings, seq_idx=seq_idx)
        B, C = self.features(B, C)
        read, _ = self._recur(x, self.steps(hidden), B, C, None, False, False, seq_idx)
        return self._gate_and_norm(read.flatten(2), None if self.z_proj is None else self.z_proj(hidden))

    def steps(self, hidden: Tensor) -> Tensor:
        """What tells of each token (B,L,...) how it is written, as `_recur` takes it, padding being `PADDING_STEP`."""
        return self.dt_proj(hidden)

    def features(self, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        """What of keys B (B,L,K,P) and queries C (B,L,H,P) the state is written and read by."""
        return B, C * self.scale

    def _inputs(self, q, k, v, position_embeddings, memory=None, stepping=False, padding=None, seq_idx=None):
        """x (B,L,K,P), B (B,L,K,N), C (B,L,H,N) where they are not those of attention, and the convolution's tail."""
        tail = None
        if self.conv1d is not None:
            inputs = torch.cat([t.flatten(2) for t in (v, k, q)], -1)
            mixed, tail = self._convolve(inputs, memory, stepping, padding, seq_idx)
            widths = [t.shape[2] * self.head_dim for t in (v, k, q)]
            v, k, q = (t.unflatten(-1, (-1, self.head_dim)) for t in mixed.split(widths, -1))
        norms = (self.k_norm, self.q_norm) if self.qk_norm else (None, None)
        B, C = (
            self.place(t, n, position_embeddings if self.rope else None) for t, n in zip((k, q), norms, strict=True)
        )
        return v, B, C, tail
